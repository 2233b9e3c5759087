"""The sampler against a naive float64 oracle, and beside itself in other batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.engine import sampler
from lattice_serve.engine.errors import NumericalError
from lattice_serve.engine.sampler import (
    Sampled,
    SampleRow,
    TokenCounts,
    penalised,
    prompt_logprobs,
    sample,
    uniform,
)
from lattice_serve.engine.sampling import SamplingParams

VOCAB = 12
INF = math.inf


def row(
    seed: int = 0,
    index: int = 0,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    forbidden: tuple[int, ...] = (),
    vocab_size: int = VOCAB,
    **params: Any,
) -> SampleRow:
    given_params = SamplingParams(**({"max_tokens": 1000} | params))
    counts = None
    if penalised(given_params):
        counts = TokenCounts(prompt, vocab_size)
        for token_id in output:
            counts.add(token_id)
    return SampleRow(given_params, seed, index, counts, forbidden)


def normal(rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: Tensor, number: int, **params: Any) -> list[int]:
    """Tokens that `number` indices of one seed give for one row of logits `[V]`."""
    rows = [row(7, index, vocab_size=len(logits), **params) for index in range(number)]
    return [sampled.token_id for sampled in sample(logits.expand(number, -1), rows)]


def probabilities(logits: list[float], r: SampleRow, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """The distribution that a row is drawn from, as plainly as it can be written."""
    p = r.params
    scores = [logit + p.logit_bias.get(i, 0.0) for i, logit in enumerate(logits)]
    if r.index < p.min_tokens and any(s > -INF for i, s in enumerate(scores) if i not in r.forbidden):
        scores = [-INF if i in r.forbidden else s for i, s in enumerate(scores)]
    for i in {*prompt, *output}:
        scores[i] = scores[i] / p.repetition_penalty if scores[i] > 0 else scores[i] * p.repetition_penalty
    for i in set(output):
        scores[i] -= p.frequency_penalty * output.count(i) + p.presence_penalty
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if p.temperature == 0:
        return [float(i == ranked[0]) for i in range(len(scores))]
    weights = [math.exp((s - max(scores)) / p.temperature) for s in scores]
    kept = ranked[: p.top_k or None]
    total = sum(weights[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if reached < p.top_p * total:
            nucleus.append(i)
        reached += weights[i]
    final = [i for i in nucleus if weights[i] >= p.min_p]
    total = sum(weights[i] for i in final)
    return [weights[i] / total if i in final else 0.0 for i in range(len(scores))]


# Steps of an eighth: ties are common, and float64 has no rounding to differ in.
logit = st.integers(-80, 80).map(lambda n: n / 8)
token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=8)
seeds = st.integers(-(2**63), 2**63 - 1)
some_params: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"max_tokens": st.just(1000)},
    optional={
        "temperature": st.sampled_from([0.0, 1e-4, 0.5, 1.0, 1.7, 100.0]),
        "top_p": st.sampled_from([1e-9, 0.13, 0.5, 0.9, 0.9999]),
        "top_k": st.integers(1, VOCAB + 2),
        "min_p": st.sampled_from([0.01, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.7, 2.0]),
        "frequency_penalty": st.sampled_from([-1.5, 0.3, 2.0]),
        "repetition_penalty": st.sampled_from([1e-300, 0.5, 1.3, 100.0]),
        "logit_bias": st.dictionaries(token, st.sampled_from([-100.0, -2.5, 3.0, 100.0]), max_size=4),
        "min_tokens": st.integers(0, 3),
        "logprobs": st.integers(0, 5),
    },
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], SampleRow, list[int], list[int]]:
    logits = draw(st.lists(logit | st.just(-INF), min_size=VOCAB, max_size=VOCAB).filter(lambda x: max(x) > -INF))
    prompt, output = draw(tokens), draw(tokens)
    forbidden = tuple(draw(st.lists(token, max_size=3) | st.just(list(range(VOCAB)))))
    made = row(
        draw(seeds), draw(st.integers(0, 5)), prompt=prompt, output=output, forbidden=forbidden, **draw(some_params)
    )
    return logits, made, prompt, output


@settings(deadline=None)
@given(cases())
def test_draws_come_from_the_oracles_distribution(case: tuple[list[float], SampleRow, list[int], list[int]]) -> None:
    """200 indices: every token the oracle gives a fair chance appears, and none that it excludes."""
    logits, made, prompt, output = case
    number = 200
    rows = [
        SampleRow(made.params, made.seed, index, made.counts, made.forbidden)
        for index in range(made.index + 3, made.index + 3 + number)
    ]
    got = [sampled.token_id for sampled in sample(torch.tensor(logits).expand(number, -1), rows)]
    expected = probabilities(logits, rows[0], prompt, output)
    assert {i for i, p in enumerate(expected) if p > 0.2} <= set(got)
    assert set(got) <= {i for i, p in enumerate(expected) if p > 0}


@settings(deadline=None)
@given(cases())
def test_min_tokens_holds_at_its_index(case: tuple[list[float], SampleRow, list[int], list[int]]) -> None:
    logits, made, prompt, output = case
    (sampled,) = sample(torch.tensor([logits]), [made])
    assert probabilities(logits, made, prompt, output)[sampled.token_id] > 0


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 100.0},
        {"top_k": 3},
        {"top_k": 3, "top_p": 0.8},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 4, "top_p": 0.9, "min_p": 0.1},
        {"logit_bias": {0: 2.0, 4: -3.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [5, 4096])
def test_frequencies_are_the_distributions(vocab_size: int, params: dict[str, Any]) -> None:
    """Chi-square over the ten likeliest tokens and the rest: 11 cells, 0.001 quantile at most 29.6."""
    logits = normal(1, vocab_size, 2.5)[0]
    number = 2000 if vocab_size == 4096 else 20_000
    expected = probabilities(logits.double().tolist(), row(**params), (), ())
    cells = sorted(range(vocab_size), key=lambda i: -expected[i])[:10]
    got = draws(logits, number, **params)
    pairs = [(got.count(i), number * expected[i]) for i in cells]
    pairs.append((number - sum(n for n, _ in pairs), number - sum(e for _, e in pairs)))
    assert all(n == 0 for n, e in pairs if e < 1e-6)
    assert sum((n - e) ** 2 / e for n, e in pairs if e >= 1e-6) < 30


@pytest.mark.parametrize("vocab_size", [2, 5, 4096])
def test_equal_logits_are_drawn_evenly(vocab_size: int) -> None:
    got = draws(torch.zeros(vocab_size), 4000)
    half = vocab_size // 2
    assert abs(sum(token_id < half for token_id in got) / 4000 - half / vocab_size) < 0.03


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1e-4},
        {"temperature": 5e-324},
        {"top_k": 1},
        {"top_p": 0.0},
        {"temperature": 100.0, "top_p": 0.0, "top_k": 3, "min_p": 0.1},
        {"top_p": 1e-12},
        {"top_p": 5e-324},
        {"min_p": 1.0},
        {"temperature": 100.0, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [5, 4096])
def test_narrow_parameters_are_greedy(vocab_size: int, params: dict[str, Any]) -> None:
    logits = normal(20, vocab_size)
    rows = [row(i, i, vocab_size=vocab_size, **params) for i in range(20)]
    assert [s.token_id for s in sample(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0, "logit_bias": {0: -1.0}}])
def test_the_lowest_id_wins_a_tie(params: dict[str, Any]) -> None:
    for vocab_size in (5, 100, 4096):
        for first in (1, vocab_size // 2, vocab_size - 2):
            logits = torch.full((1, vocab_size), -1.0)
            logits[0, first:] = 2.0
            assert sample(logits, [row(vocab_size=vocab_size, **params)])[0].token_id == first


def test_zeros_of_either_sign_tie() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    (sampled,) = sample(logits, [row(temperature=0, logprobs=3, vocab_size=4)])
    assert sampled.token_id == 1
    assert sampled.logprob is not None
    assert [token_id for token_id, _ in sampled.logprob.top] == [1, 2, 3]


def test_top_k_keeps_that_many_even_among_ties() -> None:
    assert set(draws(torch.zeros(VOCAB), 300, top_k=3)) == {0, 1, 2}


def test_min_p_keeps_the_equally_likely() -> None:
    logits = torch.zeros(VOCAB)
    logits[3:] = -1e-3
    assert set(draws(logits, 200, min_p=1.0)) == {0, 1, 2}


def test_high_temperature_flattens() -> None:
    assert len(set(draws(torch.linspace(-5, 5, VOCAB), 500, temperature=100.0))) == VOCAB


def test_a_bias_of_100_forces_and_of_minus_100_bans() -> None:
    logits = normal(1, VOCAB)[0]
    assert set(draws(logits, 50, logit_bias={4: 100.0})) == {4}
    assert set(draws(torch.zeros(2), 100, logit_bias={0: -100.0})) == {1}


def test_forbidden_tokens_until_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, -INF]])
    for index, expected in [(0, 2), (1, 2), (2, 0)]:
        made = row(0, index, temperature=0, min_tokens=2, forbidden=(0, 1), vocab_size=4)
        assert sample(logits, [made])[0].token_id == expected
    only = row(0, 0, temperature=0, min_tokens=2, forbidden=(0, 1, 2), vocab_size=4)
    assert sample(logits, [only])[0] == Sampled(0, None, True)


def test_penalties_as_they_are_defined() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])

    def greedy(**params: Any) -> int:
        return sample(logits, [row(temperature=0, vocab_size=4, **params)])[0].token_id

    assert greedy(prompt=[0], repetition_penalty=1.1) == 1
    assert greedy(prompt=[0, 1], repetition_penalty=1.1) == 0
    assert greedy(prompt=[0], presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert greedy(output=[0], presence_penalty=0.2) == 1
    assert greedy(output=[0, 0, 1], frequency_penalty=0.2) == 1
    assert greedy(output=[0, 0, 1], presence_penalty=0.2) == 0
    below = torch.tensor([[-1.0, -1.1]])
    made = row(temperature=0, vocab_size=2, prompt=[0], repetition_penalty=1.2)
    assert sample(below, [made])[0].token_id == 1


def test_counts_hold_what_was_added() -> None:
    counts = TokenCounts([3, 3, 1], 5)
    counts.add(4)
    counts.add(4)
    assert counts.prompt.tolist() == [False, True, False, True, False]
    assert counts.output.tolist() == [0, 0, 0, 0, 2]


def test_counting_goes_on_outside_inference_mode() -> None:
    with torch.inference_mode():
        counts = TokenCounts([], 3)
        counts.add(1)
    counts.add(1)
    assert counts.output.tolist() == [0, 2, 0]


def test_the_same_seed_and_index_give_the_same_token_and_others_differ() -> None:
    logits = torch.zeros(1, 4096)

    def one(seed: int, index: int) -> int:
        return sample(logits, [row(seed, index, vocab_size=4096)])[0].token_id

    places = [(seed, index) for seed in (-1, 0, 1, 2**63 - 1, -(2**63)) for index in range(20)]
    first = [one(*place) for place in places]
    assert [one(*place) for place in places] == first
    # 100 of 4096 evenly: a repeat or two is chance, many are not.
    assert len(set(first)) > 90


def test_uniform_is_uniform_over_indices_and_over_seeds() -> None:
    for numbers in ([uniform(5, i) for i in range(4000)], [uniform(i, 5) for i in range(4000)]):
        assert all(0 <= x < 1 for x in numbers)
        cells = [0] * 16
        for x in numbers:
            cells[int(x * 16)] += 1
        assert sum((n - 250) ** 2 / 250 for n in cells) < 38
        mean = sum(numbers) / 4000
        neighbours = sum((a - mean) * (b - mean) for a, b in pairwise(numbers)) / 4000
        assert abs(neighbours * 12) < 0.05


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9999}, {"min_p": 1e-6}])
def test_the_ends_of_the_uniform_range_stay_within_the_possible(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    logits = torch.tensor([[-INF, 0.3, 0.1, 0.2, -INF]])
    for end, expected in ((0.0, {1}), (1 - 2.0**-53, {2, 3})):
        monkeypatch.setattr(sampler, "uniform", lambda seed, index, end=end: end)
        assert sample(logits, [row(vocab_size=5, **params)])[0].token_id in expected


def test_uniform_stays_what_it_was() -> None:
    """The published first output of SplitMix64 from state 0."""
    assert uniform(0, 0) == (16294208416658607535 >> 11) * 2.0**-53
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_row_gives_the_same_bits_in_any_batch(data: st.DataObject) -> None:
    number = data.draw(st.integers(2, 7))
    logits, rows = [], []
    for _ in range(number):
        one, made, _, _ = data.draw(cases())
        logits.append(one)
        rows.append(made)
    alone = [sample(torch.tensor([one]), [made])[0] for one, made in zip(logits, rows, strict=True)]
    order = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=12))
    assert sample(torch.tensor([logits[i] for i in order]), [rows[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("vocab_size", [5, 777, 4096, 4099])
def test_large_batches_give_the_bits_of_single_rows(vocab_size: int) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.7, "logprobs": 20},
        {"top_p": 0.9},
        {"top_k": 40, "temperature": 1.3, "logprobs": 0},
        {"min_p": 0.05},
        {"repetition_penalty": 1.2, "prompt": [1, 2, 3], "output": [2, 2]},
        {"logit_bias": {3: 4.0}, "temperature": 0.0},
    ]
    logits = normal(67, vocab_size)
    rows = [row(i, i % 5, vocab_size=vocab_size, **kinds[i % len(kinds)]) for i in range(67)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(67)]
    backwards = sample(logits.flip(0), rows[::-1])
    assert together == backwards[::-1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert sample(logits, rows) == together
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("vocab_size", [1, 5, 777, 4096])
@pytest.mark.parametrize("temperature", [1e-310, 0.1, 0.8, 1.0, 30.0])
def test_the_cpus_way_to_draw_gives_the_tokens_of_the_tensors_way(vocab_size: int, temperature: float) -> None:
    """Also where logits are equal, or minus infinity."""
    logits = torch.cat((normal(40, vocab_size), normal(20, vocab_size).round(), torch.zeros(20, vocab_size)))
    logits[:10, 1::3] = -INF
    rows = [row(i, 3 * i, temperature=temperature) for i in range(len(logits))]
    expected = sampler._draw(logits.double(), rows)
    assert [sampled.token_id for sampled in sample(logits, rows)] == expected.tolist()


def test_the_exponential_does_not_depend_on_the_place_in_memory() -> None:
    """The one function here that is not exact: the same bits in the vector loop and in its tail."""
    values = normal(1, 300, 20).double().squeeze()
    alone = torch.stack([value.clone().exp() for value in values])
    for start in range(9):
        for length in (1, 3, 8, 15, 31, 33, 290):
            assert torch.equal(values[start : start + length].exp(), alone[start : start + length])


def test_the_logits_are_left_as_they_were() -> None:
    logits = normal(3, VOCAB)
    before = logits.clone()
    sample(logits, [row(logit_bias={1: 5.0}, logprobs=2), row(top_p=0.5), row(temperature=0, min_tokens=1)])
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"logprobs": 2}, {"top_p": 0.5}, {"logit_bias": {0: 1.0}}])
def test_a_row_that_is_not_finite_fails_alone(bad: str, params: dict[str, Any]) -> None:
    logits = normal(5, VOCAB)
    rows = [row(i, **params) for i in range(5)]
    expected = sample(logits, rows)
    if bad == "all -inf":
        logits[2] = -INF
    else:
        logits[2, 7] = float(bad)
    got = sample(logits, rows)
    assert got[2] == Sampled(0, None, False)
    assert got[:2] + got[3:] == expected[:2] + expected[3:]
    assert all(sampled.finite for sampled in expected)


def test_a_batch_of_nothing_but_bad_rows() -> None:
    assert sample(torch.full((2, VOCAB), math.nan), [row(), row(temperature=0)]) == [Sampled(0, None, False)] * 2


def test_huge_logits_are_still_a_distribution() -> None:
    logits = torch.full((1, VOCAB), -3e38)
    logits[0, 5] = 3e38
    kinds: list[dict[str, Any]] = [{}, *({"repetition_penalty": x, "output": [5]} for x in (1e-300, 100.0))]
    for params in kinds:
        assert sample(logits, [row(**params)])[0] == Sampled(5, None, True)


@pytest.mark.parametrize("vocab_size", [5, 4096])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_logprobs_are_the_models_own(vocab_size: int, k: int) -> None:
    """Bias, temperature and truncation choose the token but do not show in its log-probability."""
    logits = normal(4, vocab_size)
    expected = logits.double().log_softmax(-1)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.1}, {"top_k": 2}, {"logit_bias": {1: 100.0}}]
    for i, sampled in enumerate(sample(logits, [row(i, logprobs=k, **kind) for i, kind in enumerate(kinds)])):
        logprob = sampled.logprob
        assert logprob is not None
        assert logprob.token_id == sampled.token_id
        assert logprob.logprob == pytest.approx(expected[i, sampled.token_id].item(), abs=1e-6)
        values, ids = expected[i].topk(min(k, vocab_size))
        assert [token_id for token_id, _ in logprob.top] == ids.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-6)
        assert all(value == logprob.logprob for token_id, value in logprob.top if token_id == logprob.token_id)


def test_logprobs_only_where_asked() -> None:
    assert [s.logprob is None for s in sample(normal(3, VOCAB), [row(), row(logprobs=0), row()])] == [True, False, True]


@given(st.lists(logit | st.just(-INF), min_size=VOCAB, max_size=VOCAB).filter(lambda x: max(x) > -INF), token)
def test_prompt_logprobs_equal_the_oracle(logits: list[float], target: int) -> None:
    (got,) = prompt_logprobs(torch.tensor([logits]), [target], 20)
    norm = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
    assert got.logprob == pytest.approx(logits[target] - norm, abs=1e-9)
    ranked = sorted(range(VOCAB), key=lambda i: (-logits[i], i))
    assert [token_id for token_id, _ in got.top] == ranked
    assert [value for _, value in got.top] == pytest.approx([logits[i] - norm for i in ranked], abs=1e-9)


def test_prompt_logprobs_of_any_split_have_the_same_bits() -> None:
    logits = normal(33, 4096)
    targets = list(range(0, 3300, 100))
    whole = prompt_logprobs(logits, targets, 3)
    assert whole == [prompt_logprobs(logits[i : i + 1], [targets[i]], 3)[0] for i in range(33)]
    assert prompt_logprobs(logits[:0], [], 3) == []
    assert all(len(entry.top) == 0 for entry in prompt_logprobs(logits, targets, 0))


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_prompt_logprobs_of_bad_logits_are_an_error(bad: float) -> None:
    logits = normal(3, VOCAB)
    logits[1, 4] = bad
    with pytest.raises(NumericalError, match="not finite"):
        prompt_logprobs(logits, [0, 1, 2], 1)

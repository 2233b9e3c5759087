"""The whole network by Triton's kernels: float64, and a sequence's bits in any batch and any cut of its prompt."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import LatticeForCausalLM
from lattice_serve.kernels.mixers.lattice import MixerState, StateLayout
from lattice_serve.kernels.mixers.segments import Segments
from tests.kernels.harness import poison, same_bits
from tests.kernels.naive import error
from tests.triton_device import DEVICE

# isort: split
from lattice_serve.kernels.decoder.triton import TritonDecoder, ladder
from lattice_serve.kernels.decoder.triton_prompts import PromptStep
from lattice_serve.kernels.mixers.chunks import DeviceSegments, list_segments, tile_tokens

CONFIG = LatticeConfig(
    vocab_size=70,
    hidden_size=40,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=20,
    num_slots=5,
    intermediate_size=50,
    chunk_size=4,
    torch_dtype="float32",
)
TOKENS, ROWS = 40, 6
NEAR = 3e-2 if DEVICE == "cuda" else 6e-2
"""Of activations in bfloat16, which Triton's interpreter rounds towards zero: errors are twice as large."""
Part = tuple[int, int, list[int]]
"""Row, position and ids."""


class Network:
    """A model of random weights, its decoder, and state rows at their start."""

    def __init__(self, quantization: Any = None, **changes: Any) -> None:
        config = CONFIG.model_copy(update=changes)
        self.model = LatticeForCausalLM(config).requires_grad_(False)
        self.model.initialize(0)
        layout = StateLayout(self.model.shape, config.num_hidden_layers)
        start = poison(layout.row_size)
        for i, layer in enumerate(self.model.layers):
            layout.store(start, i, MixerState.initial(self.model.shape, layer.mixer.weights(), 1))
        for name, parameter in self.model.named_parameters():
            if name.endswith(("weight", "embedding", "head")) and config.torch_dtype == "bfloat16":
                parameter.data = parameter.bfloat16()
        self.model.to(DEVICE)
        self.start = start.to(DEVICE)
        self.pool = self.start.repeat(ROWS, 1)
        self.decoder = TritonDecoder(
            self.model.decoder_weights(), layout, self.pool, max_tokens=TOKENS, quantization=quantization
        )

    def run(self, decodes: list[Part], prompts: list[Part]) -> list[Tensor]:
        """All logits of a batch, part by part."""
        parts = decodes + prompts
        ids = [token for _, _, part in parts for token in part]
        segments = Segments.of([(row, position, len(part)) for row, position, part in parts], len(decodes))
        with torch.inference_mode():
            logits = self.decoder(ids, segments, range(len(ids)))[0].clone()
        return list(logits.split([len(part) for _, _, part in parts]))

    def alone(self, prompt: list[int], answer: list[int], row: int = 0) -> Tensor:
        """Logits of all tokens of a sequence, its prompt in one piece."""
        self.pool[row] = self.start
        logits = self.run([], [(row, 0, prompt)])
        for place, token in enumerate(answer):
            logits += self.run([(row, len(prompt) + place, [token])], [])
        return torch.cat(logits)


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(9, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def truth(model: LatticeForCausalLM, ids: list[int]) -> Tensor:
    logits: Tensor = model.double()(torch.tensor([ids], device=DEVICE))[0]
    return logits[0]


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(num_hidden_layers=1, num_heads=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"objective": "similarity", "chunk_size": 1, "use_forget_gate": False, "conv_kernel_size": 1},
        {"hidden_size": 64, "head_dim": 16, "num_slots": 32, "intermediate_size": 64, "chunk_size": 16},
        {"hidden_size": 7, "num_heads": 1, "head_dim": 1, "intermediate_size": 3, "vocab_size": 9},
    ],
)
def test_it_is_the_model_in_float64(changes: dict[str, Any]) -> None:
    network = Network(**changes)
    prompt, answer = tokens(19), tokens(2, seed=1)
    logits = network.alone(prompt, answer)
    assert error(logits, truth(network.model, prompt + answer)) <= 1e-5


def test_bfloat16_is_near_it() -> None:
    network = Network(torch_dtype="bfloat16")
    prompt, answer = tokens(9), tokens(2, seed=1)
    logits = network.alone(prompt, answer)
    assert error(logits, truth(network.model, prompt + answer)) <= NEAR


def test_int8_is_near_the_model_of_rounded_weights() -> None:
    """Near, because activations are bfloat16."""
    network = Network(quantization="int8", tie_word_embeddings=False)
    prompt, answer = tokens(9), tokens(2, seed=1)
    logits = network.alone(prompt, answer)
    for name, parameter in network.model.named_parameters():
        if name.endswith(("weight", "head")):
            scale = parameter.abs().amax(dim=1, keepdim=True) / 127
            parameter.data = (parameter / scale).round() * scale
    assert error(logits, truth(network.model, prompt + answer)) <= NEAR


@settings(max_examples=4)
@given(data=st.data())
def test_neighbours_and_cuts_do_not_matter(network: Network, data: st.DataObject) -> None:
    """Prompts cut at any multiples of C beside others in prefill and in decode."""
    C = CONFIG.chunk_size
    sizes = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=3), label="tokens of each prompt")
    rows = data.draw(st.permutations(range(ROWS)), label="rows")
    sequences = [(tokens(n, seed), tokens(2, seed=9 + seed)) for seed, n in enumerate(sizes)]
    expected = [network.alone(*sequence) for sequence in sequences]
    network.pool[:] = network.start
    done, logits = [0] * len(sizes), [list[Tensor]() for _ in sizes]
    while any(done[i] < n + 2 for i, n in enumerate(sizes)):
        decodes, prompts, order = [], [], []
        for i, (prompt, answer) in enumerate(sequences):
            left = len(prompt) - done[i]
            if left > 0:
                chunks = data.draw(st.integers(1, 3), label="chunks of a piece")
                end = min(left, (done[i] // C + chunks) * C - done[i])
                prompts.append((i, (rows[i], done[i], prompt[done[i] : done[i] + end])))
            elif -left < len(answer):
                decodes.append((i, (rows[i], done[i], answer[-left : 1 - left])))
        order = [i for i, _ in decodes + prompts]
        for i, part in zip(order, network.run([p for _, p in decodes], [p for _, p in prompts]), strict=True):
            logits[i].append(part)
            done[i] += len(part)
    for parts, alone in zip(logits, expected, strict=True):
        assert same_bits(torch.cat(parts), alone)


def test_only_what_is_wanted_comes_back(network: Network) -> None:
    ids = tokens(6)
    network.pool[:] = network.start
    expected = torch.cat(network.run([(0, 0, ids[:1]), (1, 0, ids[1:2])], [(2, 0, ids[2:])]))
    segments = Segments.of([(0, 0, 1), (1, 0, 1), (2, 0, 4)], 2)
    for wanted in ([1, 0, 5], [5, 5, 2], []):
        network.pool[:] = network.start
        assert same_bits(network.decoder(ids, segments, wanted)[0], expected[wanted])


def test_what_is_not_finite_stays_in_its_sequence(network: Network) -> None:
    prompt, answer = tokens(5), tokens(1, seed=1)
    expected = network.alone(prompt, answer)
    network.pool[:] = network.start
    network.pool[2] = float("nan")
    first, broken, last = network.run([], [(1, 0, prompt), (2, 0, prompt), (4, 0, prompt)])
    assert same_bits(first, expected[:5])
    assert same_bits(last, expected[:5])
    assert bool(broken.isnan().all())
    broken, fine = network.run([(2, 5, answer), (4, 5, answer)], [])
    assert same_bits(fine, expected[5:])
    assert bool(broken.isnan().all())


@pytest.mark.parametrize(
    ("ids", "segment", "wanted", "names"),
    [
        ([], (0, 0, 1), [], "ids"),
        ([1, 2], (0, 0, 1), [0], "ids"),
        ([70], (0, 0, 1), [0], "ids"),
        ([-1], (0, 0, 1), [0], "ids"),
        ([1] * (TOKENS + 1), (0, 0, TOKENS + 1), [0], "ids"),
        ([1], (0, 0, 1), [1], "wanted"),
        ([1], (0, 0, 1), [-1], "wanted"),
        ([1], (6, 0, 1), [0], "pool"),
    ],
)
def test_what_does_not_fit_is_refused(
    network: Network, ids: list[int], segment: tuple[int, int, int], wanted: list[int], names: str
) -> None:
    before = network.pool.clone()
    with pytest.raises(ValueError, match=names):
        network.decoder(ids, Segments.of([segment]), wanted)
    with pytest.raises(ValueError, match="wanted: give the places of decode before"):
        network.decoder([1, 2], Segments.of([(0, 0, 1), (1, 0, 1)], 1), [1, 0])
    with pytest.raises(ValueError, match="hidden"):
        network.decoder([1, 2], Segments.of([(0, 0, 1), (1, 0, 1)], 1), [], [0])
    with pytest.raises(ValueError, match="one token each"):
        network.decoder([1, 2], Segments.of([(0, 0, 2)], 1), [1])
    assert same_bits(network.pool, before)


def test_hidden_states_are_those_that_the_head_takes(network: Network) -> None:
    ids = tokens(6)
    network.pool[:] = network.start
    segments = Segments.of([(0, 0, 1), (2, 0, 5)], 1)
    with torch.inference_mode():
        logits, hidden = network.decoder(ids, segments, [3, 5], [3, 5])
        again, none = network.decoder(ids[:1], Segments.of([(0, 1, 1)], 1), [])
    assert error(hidden.double() @ network.model.head_weight.double().mT, logits.double()) <= 1e-6
    assert (again.shape, none.shape) == ((0, 70), (0, 40))


@pytest.mark.parametrize("most", [1, 2, 5, 16, 100, 256])
def test_the_ladder_ends_at_its_most_and_wastes_little(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert all(after <= 1.5 * before or after == before + 1 for before, after in itertools.pairwise(sizes))


# What tokens of none come to is whatever memory held, numbers too large included.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("C", [1, 4])
def test_a_step_of_prompts_is_filled_up_with_none(C: int) -> None:
    """Tokens, segments and chunks that only fill it leave no trace in any state row; the others have the same bits."""
    network, device = Network(chunk_size=C), torch.device(DEVICE)
    step = PromptStep(network.decoder._network, TOKENS, C, device)
    if DEVICE == "cuda":
        with torch.inference_mode():
            step.capture(torch.cuda.graph_pool_handle())
    assert torch.equal(network.pool, network.start.repeat(ROWS, 1))
    for parts in ([(3, 7), (0, 1), (5, 12)], [(1, 40)], [(4, 2)]):
        segments = Segments.of([(row, 0, length) for row, length in parts])
        ids = [(7 * i + 3) % 70 for i in range(segments.starts[-1])]
        assert step.holds(segments)
        results = []
        for filled in (False, True):
            network.pool.copy_(network.start.repeat(ROWS, 1))
            if filled:  # outside of inference mode, in which it was captured
                hidden = step(ids, segments)
            else:
                listed = DeviceSegments.of(segments, C, device)
                hidden = network.decoder._network.prefill(torch.tensor(ids, device=device), listed)
            results.append((hidden.clone(), network.pool.clone()))
        (hidden, pool), (of_filled, pool_of_filled) = results
        assert same_bits(of_filled, hidden)
        assert same_bits(pool_of_filled, pool)


def test_a_step_of_prompts_says_what_it_does_not_hold() -> None:
    step = PromptStep(Network().decoder._network, 40, 4, torch.device(DEVICE))
    assert not step.holds(Segments.of([(0, 0, 41)]))
    assert not step.holds(Segments.of([(row, 0, 1) for row in range(6)]))
    assert step.holds(Segments.of([(row, 3, 6) for row in range(5)]))  # three chunks each
    assert step.holds(Segments.of([(0, 3, 40)]))


@given(
    st.sampled_from([1, 2, 4, 16]),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=9),
)
def test_a_step_has_room_for_the_chunks_of_any_segments(C: int, parts: list[tuple[int, int]]) -> None:
    segments = Segments.of([(row, position, length) for row, (position, length) in enumerate(parts)])
    n, tokens = len(parts), int(segments.starts[-1])
    chunks = -(-tokens // tile_tokens(C)) + 2 * n
    assert len(list_segments(segments, C, n, chunks)) == 4 * n + 1 + 5 * chunks

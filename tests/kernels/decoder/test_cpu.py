"""The whole network as one kernel: the float64 model, and the same bits alone, in any batch, split and team."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.engine.models.lattice.config import LatticeConfig
from lattice_serve.engine.models.lattice.model import DenseOps, LatticeForCausalLM
from lattice_serve.kernels.decoder.cpu import CpuDecoder
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.mixers.lattice import MixerState, StateLayout
from lattice_serve.kernels.mixers.segments import Segments
from lattice_serve.kernels.numba.features import Products, available_products
from tests.kernels.harness import poison, same_bits
from tests.kernels.naive import error

CONFIG = LatticeConfig(
    vocab_size=70,
    hidden_size=40,
    num_hidden_layers=2,
    num_heads=3,
    head_dim=20,
    num_slots=5,
    intermediate_size=530,
    chunk_size=4,
)
TOKENS = 48


class Network:
    """A model of random weights, its decoder, and state rows at their start."""

    def __init__(
        self,
        *,
        threads: int = 1,
        parallel_from: int = 0,
        wide_from: int = TOKENS + 1,
        max_tokens: int = TOKENS,
        rows: int = 6,
        quantization: Any = None,
        products: Products | None = "float32",
        **changes: Any,
    ) -> None:
        self.products, self.quantization = products, quantization
        config = CONFIG.model_copy(update=changes)
        self.model = LatticeForCausalLM(config).requires_grad_(False)
        self.model.initialize(0)
        dtype = torch.float32 if config.torch_dtype == "float32" else torch.bfloat16
        for name, parameter in self.model.named_parameters():
            if name.endswith(("weight", "embedding", "head")):
                parameter.data = parameter.to(dtype)
        layout = StateLayout(self.model.shape, config.num_hidden_layers)
        self.start = poison(layout.row_size)
        for i, layer in enumerate(self.model.layers):
            layout.store(self.start, i, MixerState.initial(self.model.shape, layer.mixer.weights(), 1))
        self.pool = self.start.repeat(rows, 1)
        self.decoder = CpuDecoder(
            self.model.decoder_weights(),
            layout,
            self.pool,
            max_tokens=max_tokens,
            threads=threads,
            parallel_from=parallel_from,
            wide_from=wide_from,
            quantization=quantization,
            products=products,
        )

    def run(self, batch: Sequence[tuple[int, int, list[int]]]) -> list[Tensor]:
        """All logits of a batch of (row, position, ids)."""
        ids = [token for _, _, part in batch for token in part]
        segments = Segments.of([(row, position, len(part)) for row, position, part in batch])
        return list(self.decoder(ids, segments, range(len(ids)))[0].clone().split([len(part) for _, _, part in batch]))

    def alone(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Logits of a sequence in one step, and its row after it."""
        self.pool[0] = self.start
        (logits,) = self.run([(0, 0, ids)])
        return logits, self.pool[0].clone()


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PRODUCTS = [
    *((None, each) for each in available_products("bfloat16")), *(("int8", each) for each in available_products("int8"))
]  # fmt: skip
"""What weights are kept as if not as bfloat16, and what this machine has to multiply with them."""
every_product = pytest.mark.parametrize(("quantization", "products"), PRODUCTS)


@pytest.fixture(scope="module", params=PRODUCTS)
def network(request: pytest.FixtureRequest) -> Network:
    quantization, products = request.param
    return Network(quantization=quantization, products=products)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_dtype": "float32"},
        {"tie_word_embeddings": False},
        {"objective": "similarity", "chunk_size": 1, "use_forget_gate": False, "conv_kernel_size": 1},
        {"hidden_size": 64, "head_dim": 16, "num_slots": 32, "intermediate_size": 64, "chunk_size": 16},
        {"hidden_size": 7, "num_heads": 1, "head_dim": 1, "intermediate_size": 3, "vocab_size": 9},
    ],
)
def test_it_is_the_model_in_float64(changes: dict[str, Any], threads: int) -> None:
    network = Network(threads=threads, **changes)
    ids = [token % network.model.config.vocab_size for token in tokens(TOKENS)]
    logits, _ = network.alone(ids)
    truth, _ = network.model.double()(torch.tensor([ids]))
    assert error(logits, truth[0]) <= 1e-5


class RoundedOps(DenseOps):
    """Activations are rounded to bfloat16 wherever they are multiplied with a matrix."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().linear(x.float().bfloat16().to(weight.dtype), weight)


@pytest.mark.parametrize("products", [each for each in available_products("bfloat16") if each != "float32"])
@pytest.mark.parametrize("hidden_size", [40, 64])
def test_it_is_the_model_in_float64_of_rounded_activations(products: Products, hidden_size: int) -> None:
    """As far as roundings agree: one that float32 and float64 do differently moves an activation by 2^-8 of itself."""
    network = Network(products=products, hidden_size=hidden_size)
    logits, _ = network.alone(tokens(TOKENS))
    model = network.model.double()
    ops = RoundedOps(model, model.initial_state(1))
    truth = ops.linear(model.hidden(torch.tensor([tokens(TOKENS)]), ops), model.head_weight)
    assert error(logits, truth[0]) <= 1e-2


def test_weights_of_float32_are_multiplied_in_float32() -> None:
    network = Network(torch_dtype="float32", products=None)
    logits, _ = network.alone(tokens(TOKENS))
    truth, _ = network.model.double()(torch.tensor([tokens(TOKENS)]))
    assert error(logits, truth[0]) <= 1e-5
    with pytest.raises(ValueError, match="float32 is multiplied here by float32, not amx"):
        Network(torch_dtype="float32", products="amx")


@pytest.mark.parametrize("products", available_products("int8"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_is_the_model_of_rounded_weights(products: Products, dtype: str) -> None:
    """Where activations are rounded, too, a whole number of theirs is 2^-15 of the largest."""
    network = Network(torch_dtype=dtype, quantization="int8", products=products, tie_word_embeddings=False)
    logits, _ = network.alone(tokens(TOKENS))
    model = network.model.double()
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "head")):
            scale = parameter.abs().amax(dim=1, keepdim=True).float() / 127
            parameter.data = (parameter.float() / scale).round().double() * scale.double()
    truth, _ = model(torch.tensor([tokens(TOKENS)]))
    assert error(logits, truth[0]) <= (1e-5 if products == "float32" else 1e-3)


def test_whole_numbers_have_the_same_bits_by_tiles_and_by_vectors() -> None:
    logits = [
        Network(quantization="int8", products=products).alone(tokens(TOKENS))[0]
        for products in available_products("int8")
        if products != "float32"
    ]
    assert all(same_bits(each, logits[0]) for each in logits)


@settings(max_examples=30)
@given(pieces=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_any_split_gives_the_same_bits(network: Network, pieces: list[int]) -> None:
    ids = tokens(sum(pieces))
    expected, row = network.alone(ids)
    network.pool[3] = network.start
    position, logits = 0, []
    for n in pieces:
        logits += network.run([(3, position, ids[position : position + n])])
        position += n
    assert same_bits(torch.cat(logits), expected)
    if position % CONFIG.chunk_size == 0:  # what a chunk has left behind differs by its cuts, and means nothing
        return
    assert same_bits(network.pool[3], row)


@settings(max_examples=30)
@given(data=st.data())
def test_neighbours_do_not_matter(network: Network, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6), label="tokens of each sequence")
    places = data.draw(st.permutations(range(6)), label="rows")
    sequences = [tokens(n, seed) for seed, n in enumerate(sizes)]
    expected = [network.alone(ids)[0] for ids in sequences]
    network.pool[:] = network.start
    logits = network.run([(place, 0, ids) for place, ids in zip(places, sequences, strict=False)])
    for mine, theirs in zip(logits, expected, strict=True):
        assert same_bits(mine, theirs)


@every_product
@pytest.mark.parametrize("threads", [2, 5])
def test_any_team_gives_the_same_bits(threads: int, quantization: str | None, products: Products) -> None:
    """More threads than there are processors, step after step, large and small."""
    # Small steps are one thread's between larger ones.
    alone, team = (
        Network(threads=count, parallel_from=200_000, quantization=quantization, products=products)
        for count in (1, threads)
    )
    for seed in range(30):
        sizes = [1, 1, 9] if seed % 2 else [1 + seed]
        batch = [(row, 0, tokens(n, seed)) for row, n in enumerate(sizes)]
        results = []
        for network in (alone, team):
            network.pool[:] = network.start
            results.append((torch.cat(network.run(batch)), network.pool.clone()))
        assert all(map(same_bits, *results)), seed


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("quantization", "products", "changes"),
    [
        *[
            (*each, changes)
            for each in PRODUCTS
            for changes in ({}, {"head_dim": 64, "num_slots": 30, "chunk_size": 1})
        ],
        (None, "float32", {"torch_dtype": "float32"}),
    ],
)
def test_rows_shared_out_give_the_same_bits(
    changes: dict[str, Any], threads: int, quantization: str | None, products: Products
) -> None:
    """As weights shared out do, whatever prompts and single tokens a step has."""
    narrow, wide = (
        Network(threads=threads, quantization=quantization, products=products, wide_from=wide_from, **changes)
        for wide_from in (TOKENS + 1, 1)
    )
    for sizes in ([TOKENS], [1, 30, 1], [2, 1, 17, 16, 9], [33]):
        results = []
        for network in (narrow, wide):
            network.pool[:] = network.start
            network.run([(row, 0, tokens(3 + row, row)) for row in range(len(sizes))])
            batch = [(row, 3 + row, tokens(n, 9 + row)) for row, n in enumerate(sizes)]
            results.append((torch.cat(network.run(batch)), network.pool.clone()))
        assert all(map(same_bits, *results)), sizes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("quantization", "products"), PRODUCTS)
def test_prompts_of_many_rows_have_the_bits_of_short_pieces(
    threads: int, quantization: str | None, products: Products
) -> None:
    """Where weights stay in a cache while rows pass by, and SwiGLU takes its turns beside them."""
    narrow, wide = (
        Network(
            threads=threads, quantization=quantization, products=products, wide_from=wide_from, max_tokens=600,
            hidden_size=96,
        )
        for wide_from in (601, 128)
    )  # fmt: skip
    for sizes in ([600], [270, 1, 300]):
        parts = [tokens(n, row) for row, n in enumerate(sizes)]
        wide.pool[:] = narrow.pool[:] = narrow.start
        at_once = wide.run([(row, 0, part) for row, part in enumerate(parts)])
        for row, part in enumerate(parts):
            pieces = [narrow.run([(row, at, part[at : at + 48])])[0] for at in range(0, len(part), 48)]
            assert same_bits(at_once[row], torch.cat(pieces)), (sizes, row)
        assert same_bits(wide.pool, narrow.pool), sizes


def test_members_that_sleep_are_woken() -> None:
    network = Network(threads=3)
    expected, _ = network.alone(tokens(9))
    for _ in range(5):
        _wait(lambda: network.decoder.team.sleepers == 2)
        assert same_bits(network.alone(tokens(9))[0], expected)


def test_a_team_ends_with_its_decoder() -> None:
    before = threading.active_count()
    for asleep in (False, True):
        network = Network(threads=3)
        network.alone(tokens(3))
        assert threading.active_count() == before + 2
        if asleep:
            _wait(lambda network=network: network.decoder.team.sleepers == 2)  # type: ignore[misc]
        del network
        _wait(lambda: threading.active_count() == before)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_only_what_is_wanted_comes_back(network: Network) -> None:
    ids = tokens(9)
    expected, _ = network.alone(ids)
    for wanted in ([], [8], [3, 3, 0]):
        network.pool[0] = network.start
        assert same_bits(network.decoder(ids, Segments.of([(0, 0, 9)]), wanted)[0], expected[wanted])


def test_hidden_states_are_those_of_the_logits(network: Network) -> None:
    ids = tokens(9)
    expected, _ = network.alone(ids)
    network.pool[0] = network.start
    _, every = network.decoder(ids, Segments.of([(0, 0, 9)]), [], range(9))
    head = network.model.head_weight.double()
    if network.quantization is not None:
        whole, scales = quantize(head)
        head = whole.double() * scales.double()[:, None]
    factors = every.bfloat16() if network.products in ("amx", "avx512_bf16") else every
    # Whole numbers of activations are 2^-15 of a row's largest apart.
    near = 1e-4 if network.products in ("amx_int8", "avx512_vnni") else 1e-6
    torch.testing.assert_close(factors.double() @ head.T, expected.double(), rtol=1e-4, atol=near)
    every = every.clone()
    network.pool[0] = network.start
    for first, last in ((0, 2), (2, 9)):
        logits, some = network.decoder(ids[first:last], Segments.of([(0, first, last - first)]), [0], [1, 0])
        assert same_bits(logits, expected[[first]])
        assert same_bits(some, every[[first + 1, first]])


def test_what_is_not_finite_stays_in_its_sequence(network: Network) -> None:
    ids = tokens(5)
    expected, _ = network.alone(ids)
    network.pool[:] = network.start
    network.pool[2] = float("nan")
    first, broken, last = network.run([(1, 0, ids), (2, 0, ids), (4, 0, ids)])
    assert same_bits(first, expected)
    assert same_bits(last, expected)
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
    assert same_bits(network.pool, before)

"""The CPU mixer: the reference in float32, and the same bits however its tokens are cut, mixed and spread out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, StateLayout, mix
from lattice_serve.kernels.mixers.segments import Segments
from tests.kernels.harness import bands, poison, same_bits
from tests.kernels.mixers.lattice.mixer import CpuMixer
from tests.kernels.naive import OBJECTIVES, cast, error, lengths, random_mixer

SHAPE = MixerShape(H=2, d=24, m=17, C=4, taps=4, objective="decoding", use_forget_gate=True, norm_eps=1e-6)
DIMENSIONS = [(24, 17, 4), (7, 9, 3), (5, 1, 2), (1, 3, 4), (70, 50, 1)]  # d, m, taps
LAYERS, LAYER = 3, 1

every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_chunk_size = pytest.mark.parametrize("C", [1, 2, 4, 16])

shapes = st.builds(
    lambda dims, **others: replace(SHAPE, d=dims[0], m=dims[1], taps=dims[2], **others),
    st.sampled_from(DIMENSIONS),
    H=st.sampled_from([1, 3]),
    C=st.sampled_from([1, 2, 3, 4, 16, 24]),
    objective=st.sampled_from(OBJECTIVES),
    use_forget_gate=st.booleans(),
)


class Layer:
    """The middle one of three layers, and state rows that are NaN wherever it has no business."""

    def __init__(self, shape: MixerShape, weights: MixerWeights) -> None:
        self.shape, self.weights = shape, cast(weights, torch.float32)
        self.layout = StateLayout(shape, LAYERS)
        self.kernel = CpuMixer(self.layout, LAYER, self.weights)

    def rows(self, count: int, state: MixerState | None = None) -> Tensor:
        """A pool [count, row_size]: all rows at `state`, or at a sequence's start."""
        row = poison(self.layout.row_size)
        self.layout.store(row, LAYER, state or MixerState.initial(self.shape, self.weights, 1))
        return row.repeat(count, 1)

    def load(self, row: Tensor, position: int) -> MixerState:
        return self.layout.load(row, LAYER, position)

    def run(self, pool: Tensor, batch: Sequence[tuple[int, int, Tensor]]) -> list[Tensor]:
        """Outputs of a batch of (row, position, z): nothing but these and the layer's part of the rows is written."""
        parts = [z for _, _, z in batch]
        sizes = [len(z) for z in parts]
        segments = Segments.of([(row, position, len(z)) for row, position, z in batch])
        z, before = torch.cat(parts), pool.clone()
        with bands(z, pool, poison(len(z), self.shape.out_width)) as (banded_z, banded_pool, out):
            assert self.kernel(banded_z, banded_pool, segments, out) is out
        assert same_bits(banded_z, z)
        pool.copy_(banded_pool)
        own = torch.zeros(pool.shape, dtype=torch.bool)
        for row, _, _ in batch:
            self.layout.blocks(own[row], LAYER).fill_(True)
        assert same_bits(torch.where(own, before, pool), before)
        return list(out.split(sizes))

    def alone(self, z: Tensor) -> tuple[Tensor, MixerState]:
        """Output of a whole sequence in one call, and its state after it."""
        pool = self.rows(1)
        (y,) = self.run(pool, [(0, 0, z)])
        return y, self.load(pool[0], len(z))


def random_layer(shape: MixerShape, T: int, *, B: int = 1) -> tuple[Layer, Tensor]:
    """A layer, and z [B, T, in_width] to run through it."""
    z, weights = random_mixer(shape, T, B=B)
    return Layer(shape, weights), z.float()


def same_state(actual: MixerState, expected: MixerState) -> bool:
    """The bits of all that means something at the state's position."""
    mine, theirs = ((*state.lattice.tensors(), state.tail) for state in (actual, expected))
    return actual.lattice.position == expected.lattice.position and all(map(same_bits, mine, theirs))


@pytest.mark.parametrize(("d", "m", "taps"), DIMENSIONS)
@pytest.mark.parametrize("use_forget_gate", [True, False])
@every_objective
@every_chunk_size
def test_it_is_the_reference(C: int, objective: str, use_forget_gate: bool, d: int, m: int, taps: int) -> None:
    """Five sequences, each in two pieces, within 1e-5 where the function itself is not more sensitive than that.

    "encoding" has steps as long as |v|^2. With |v| of 3, rounding z to float32 moves 100 tokens of the float64
    reference by 8e-5, and float32 forms by up to 8e-4 (this one, and the reference in float32). So v is short there.
    With d = 1 no update is orthogonal to a column but 0: R is a sum of terms that cancel all but prod mu, which is
    nothing beside their rounding after 16 tokens that forget. So gates are near 1 there.
    """
    shape = replace(SHAPE, C=C, objective=objective, use_forget_gate=use_forget_gate, d=d, m=m, taps=taps)
    sizes = lengths(C)
    z, weights = random_mixer(shape, max(sizes), B=len(sizes))
    if objective == "encoding":
        weights.conv[2 * shape.H * m :] *= 0.25 / d**0.5
    if d == 1:
        weights.gate_bias[shape.H :] += 5
    z, layer = z.float(), Layer(shape, weights)
    pool = layer.rows(len(sizes))
    first = layer.run(pool, [(i, 0, z[i, : -(-n // 2)]) for i, n in enumerate(sizes)])
    second = layer.run(pool, [(i, -(-n // 2), z[i, -(-n // 2) : n]) for i, n in enumerate(sizes) if n > 1])
    exact = cast(layer.weights, torch.float64)
    for i, n in enumerate(sizes):
        y, truth = mix(z[i : i + 1, :n].double(), exact, shape, MixerState.initial(shape, exact, 1))
        mine, state = torch.cat((first[i], second[i - 1])) if n > 1 else first[i], layer.load(pool[i], n)
        assert error(mine, y[0]) <= 1e-5, n
        assert error(state.lattice.memory(), truth.lattice.memory()) <= 1e-5, n
        assert torch.equal(state.tail, truth.tail.float()), n


@settings(max_examples=50)
@given(shape=shapes, pieces=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_split_gives_the_same_bits(shape: MixerShape, pieces: list[int]) -> None:
    layer, z = random_layer(shape, sum(pieces))
    y, truth = layer.alone(z[0])
    pool, outputs, position = layer.rows(1), [], 0
    for piece in z[0].split(pieces):
        outputs += layer.run(pool, [(0, position, piece)])
        position += len(piece)
    assert same_bits(torch.cat(outputs), y)
    assert same_state(layer.load(pool[0], position), truth)


@settings(max_examples=50)
@given(shape=shapes, sequences=st.permutations(range(5)), data=st.data())
def test_neighbours_and_places_do_not_matter(shape: MixerShape, sequences: list[int], data: st.DataObject) -> None:
    """A batch of up to five sequences, somewhere in a pool of seven rows, each after tokens of its own."""
    batch = sequences[: data.draw(st.integers(1, 5), label="sequences in the batch")]
    places = data.draw(st.permutations(range(7)), label="rows")
    layer, z = random_layer(shape, 40, B=5)
    pool, pieces, expected = layer.rows(7), [], []
    for i in batch:
        before, now = data.draw(st.integers(0, 20), label="before"), data.draw(st.integers(1, 20), label="now")
        own = layer.rows(1)
        if before:
            layer.run(own, [(0, 0, z[i, :before])])
        piece = z[i, before : before + now]
        pool[places[i]] = own[0]
        pieces.append((places[i], before, piece))
        expected.append((layer.run(own, [(0, before, piece)])[0], layer.load(own[0], before + now)))
    outputs = layer.run(pool, pieces)
    for mine, (y, state), (place, before, piece) in zip(outputs, expected, pieces, strict=True):
        assert same_bits(mine, y)
        assert same_state(layer.load(pool[place], before + len(piece)), state)


@every_objective
@every_chunk_size
def test_what_a_row_does_not_need_has_no_influence(C: int, objective: str) -> None:
    """A row as the kernel left it, with what a finished chunk left behind; one without that; and one with NaN there."""
    layer, z = random_layer(replace(SHAPE, C=C, objective=objective), 4 * C + 3)
    layout = layer.layout
    _, h, c, b, _, _, tail = layout.offsets
    for position in range(2 * C + 2):
        pool = layer.rows(3)
        if position:
            layer.run(pool, [(0, 0, z[0, :position])])
        state, pending = layer.load(pool[0], position), position % C
        pool[1:] = pool[0]
        for row, nothing in ((1, 0.0), (2, float("nan"))):
            blocks = layout.blocks(pool[row], LAYER)
            blocks[:, h + pending * layout.d : c] = nothing
            blocks[:, c + pending * layout.m : b] = nothing
            if not pending:
                blocks[:, b:tail] = nothing
        assert same_state(layer.load(pool[2], position), state)
        y, *others = layer.run(pool, [(row, position, z[0, position:]) for row in range(3)])
        assert bool(y.isfinite().all())
        for row, mine in enumerate(others, start=1):
            assert same_bits(mine, y), position
            assert same_state(layer.load(pool[row], len(z[0])), layer.load(pool[0], len(z[0]))), position


@every_chunk_size
@pytest.mark.parametrize("position", [1, 5, 16, 22])
def test_a_copy_of_a_row_continues_like_the_row(C: int, position: int) -> None:
    """In another pool, at another place, whatever became of the first."""
    layer, z = random_layer(replace(SHAPE, C=C), 40)
    y, truth = layer.alone(z[0])
    pool = layer.rows(2)
    layer.run(pool, [(1, 0, z[0, :position])])
    saved = pool[1].clone()
    layer.run(pool, [(1, position, z[0, :9])])
    other = layer.rows(4)
    other[2] = saved
    (mine,) = layer.run(other, [(2, position, z[0, position:])])
    assert same_bits(mine, y[position:])
    assert same_state(layer.load(other[2], 40), truth)


@pytest.mark.parametrize(("d", "m", "taps"), DIMENSIONS)
@every_chunk_size
def test_a_state_comes_back_from_a_row_as_it_was(C: int, d: int, m: int, taps: int) -> None:
    """Each layer's own, and a tensor of its own; its bits, where nothing is divided."""
    shape = replace(SHAPE, C=C, d=d, m=m, taps=taps)
    z, weights = random_mixer(shape, C + 1, B=LAYERS)
    layout = StateLayout(shape, LAYERS)
    assert layout.head_size * 4 % 64 == 0
    assert layout.row_bytes == 4 * layout.row_size == 4 * LAYERS * shape.H * layout.head_size
    for position in sorted({0, 1, C - 1, C, C + 1}):
        _, states = mix(z[:, :position], weights, shape, MixerState.initial(shape, weights, LAYERS))
        expected, row = states.to("cpu").split(LAYERS), poison(layout.row_size)
        for i, state in enumerate(expected):
            layout.store(row, i, state)
        loaded = [layout.load(row, i, position) for i in range(LAYERS)]
        row.zero_()
        for mine, state in zip(loaded, expected, strict=True):
            # These lie in the row relative to a: two roundings.
            for name in ("c", "b", "e"):
                whole = getattr(state.lattice, name)
                torch.testing.assert_close(getattr(mine.lattice, name), whole, rtol=5e-7, atol=0)
                setattr(mine.lattice, name, whole)
            assert same_state(mine, state)


@pytest.mark.parametrize("gate", ["none", "mixed", "floor"])
@every_objective
@every_chunk_size
def test_one_token_4096_times(C: int, objective: str, gate: str) -> None:
    """Everything stays finite and the memory on the sphere, where errors could feed on themselves."""
    shape = replace(SHAPE, C=C, objective=objective, use_forget_gate=gate != "none")
    z, weights = random_mixer(shape, 1, B=1)
    if gate == "floor":
        weights.gate_bias[shape.H :] = -50
    y, state = Layer(shape, weights).alone(z[0].float().expand(4096, -1))
    assert bool(y.isfinite().all())
    assert float((state.lattice.anchor.norm(dim=2) - 1).abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_taken_in_float32(dtype: torch.dtype) -> None:
    z, weights = random_mixer(SHAPE, 9)
    weights = cast(weights, dtype)
    layer = Layer(SHAPE, weights)
    y, _ = layer.alone(z[0].float())
    weights.conv.requires_grad_()
    layer.kernel = CpuMixer(layer.layout, LAYER, weights)
    mine, _ = layer.alone(z[0].float())
    assert same_bits(mine, y)


@pytest.mark.parametrize(("rows", "more", "dtype", "row"), [
    (1, 16, torch.float32, 0), (1, 0, torch.float32, 1), (1, 0, torch.float32, -1), (1, 0, torch.float64, 0)
])  # fmt: skip
def test_a_pool_that_does_not_fit_is_refused(rows: int, more: int, dtype: torch.dtype, row: int) -> None:
    layer, z = random_layer(SHAPE, 1)
    pool = torch.zeros(rows, layer.layout.row_size + more, dtype=dtype)
    with pytest.raises(ValueError, match="pool"):
        layer.kernel(z[0], pool, Segments.of([(row, 0, 1)]), torch.zeros(1, SHAPE.out_width))


def test_segments_name_their_tokens() -> None:
    assert list(Segments.of([(4, 0, 3), (0, 7, 1)])) == [(4, 0, 0, 3), (0, 7, 3, 4)]
    with pytest.raises(ValueError, match="two segments"):
        Segments.of([(4, 0, 3), (0, 7, 1), (4, 3, 1)])
    with pytest.raises(ValueError, match="no token"):
        Segments.of([(4, 0, 3), (0, 7, 0)])

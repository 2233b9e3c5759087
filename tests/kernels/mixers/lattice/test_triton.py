"""The mixer's Triton kernels against float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lattice_serve.kernels.mixers.lattice import MixerShape, MixerState, MixerWeights, StateLayout, mix
from lattice_serve.kernels.mixers.segments import Segments
from tests.kernels.harness import same_bits
from tests.kernels.naive import normal
from tests.triton_device import DEVICE

# isort: split
from lattice_serve.kernels.mixers.chunks import DeviceSegments
from lattice_serve.kernels.mixers.lattice.triton.decode import mix_decode
from lattice_serve.kernels.mixers.lattice.triton.prefill import mix_prefill

ROWS, LAYERS, LAYER = 4, 2, 1
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
"""Of outputs of size about 1, by the dtype of the pool: a state in bfloat16 is rounded at every step."""


def shape(**changes: Any) -> MixerShape:
    fields: dict[str, Any] = {
        "H": 2, "d": 24, "m": 20, "C": 4, "taps": 4, "objective": "decoding", "use_forget_gate": True, "norm_eps": 1e-6,
    }  # fmt: skip
    return MixerShape(**fields | changes)


class Case:
    """A layer with random weights, a pool whose rows are at their start, and the float64 truth."""

    def __init__(self, s: MixerShape, pool_dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.shape, self.layout = s, StateLayout(s, LAYERS)
        self.weights = MixerWeights(
            conv=normal(s.conv_width, s.taps, seed=seed + 1).float() * 0.5,
            gate_bias=normal(2 * s.H, seed=seed + 2).float(),
            norm=1 + 0.1 * normal(s.d, seed=seed + 3).float(),
            anchor=normal(s.H, s.d, s.m, seed=seed + 4).float(),
        )
        whole = torch.full((ROWS + 2, self.layout.row_size), float("nan"))
        for row in range(1, ROWS + 1):
            for layer in range(LAYERS):
                self.layout.store(whole[row], layer, MixerState.initial(s, self.weights, 1))
        self.whole = whole.to(pool_dtype).to(DEVICE)
        self.pool = self.whole[1:-1]
        self.start = self.pool.clone()
        self.device_weights = MixerWeights(
            conv=self.weights.conv.to(DEVICE), gate_bias=self.weights.gate_bias.to(DEVICE),
            norm=self.weights.norm.to(DEVICE), anchor=self.weights.anchor.to(DEVICE),
        ).by_taps()  # fmt: skip

    def z(self, tokens: int, seed: int) -> Tensor:
        return normal(tokens, self.shape.in_width, seed=100 + seed).float().to(DEVICE)

    def truth(self, z: Tensor) -> Tensor:
        """Outputs [T, out_width] of a sequence from its start, in float64."""
        double = MixerWeights(
            conv=self.weights.conv.double(), gate_bias=self.weights.gate_bias.double(),
            norm=self.weights.norm.double(), anchor=self.weights.anchor.double(),
        )  # fmt: skip
        state = MixerState.initial(self.shape, double, 1)
        return mix(z[None].cpu().double(), double, self.shape, state)[0][0]

    def prefill(self, parts: Sequence[tuple[int, int, Tensor]], **options: Any) -> list[Tensor]:
        """Outputs of (row, position, z) of each segment."""
        segments = DeviceSegments.of(
            Segments.of([(row, position, len(z)) for row, position, z in parts]), self.shape.C, DEVICE
        )
        z = torch.cat([z for _, _, z in parts])
        out, whole = _guarded(len(z), self.shape.out_width)
        mix_prefill(z, self.pool, LAYER, segments, self.device_weights, self.layout, out, **options)
        _assert_bands(whole)
        return list(out.split([len(z) for _, _, z in parts]))

    def decode(self, tokens: Sequence[tuple[int, int, Tensor]]) -> Tensor:
        """Outputs of one token each, of (row, position, z [in_width])."""
        rows, positions = (torch.tensor(column, device=DEVICE) for column in zip(*[t[:2] for t in tokens], strict=True))
        out, whole = _guarded(len(tokens), self.shape.out_width)
        z = torch.stack([z for _, _, z in tokens])
        mix_decode(z, self.pool, LAYER, rows, positions, self.device_weights, self.layout, out)
        _assert_bands(whole)
        return out

    def run(self, z: Tensor, cuts: Sequence[int], row: int = 2) -> Tensor:
        """Outputs of a sequence cut so: a piece of one token is a decode step."""
        outs, position = [], 0
        for length in cuts:
            piece = z[position : position + length]
            if length == 1:
                outs.append(self.decode([(row, position, piece[0])]))
            else:
                outs += self.prefill([(row, position, piece)])
            position += length
        assert position == len(z)
        self.assert_others_untouched({row})
        return torch.cat(outs)

    def assert_others_untouched(self, used: set[int]) -> None:
        assert bool(self.whole[[0, -1]].isnan().all()), "written beside the pool"
        other = slice(0, self.layout.layer_size)
        for row in range(ROWS):
            kept = slice(None) if row not in used else other
            assert same_bits(self.pool[row, kept].cpu(), self.start[row, kept].cpu()), f"row {row} was touched"


def _guarded(*size: int) -> tuple[Tensor, Tensor]:
    whole = torch.full((size[0] + 2, size[1]), -12345.0, device=DEVICE)
    whole[1:-1] = float("nan")
    return whole[1:-1], whole


def _assert_bands(whole: Tensor) -> None:
    assert bool((whole[[0, -1]] == -12345).all()), "written beside the output"


def close(out: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32) -> None:
    error = (out.cpu().double() - truth).abs().max().item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("objective", ["decoding", "similarity", "encoding"])
@pytest.mark.parametrize(("C", "forget"), [(1, True), (4, True), (4, False), (16, True)])
def test_one_piece(objective: str, C: int, forget: bool) -> None:
    case = Case(shape(objective=objective, C=C, use_forget_gate=forget))
    z = case.z(2 * C + 3, 0)
    close(case.run(z, [len(z)]), case.truth(z))


@pytest.mark.parametrize("objective", ["decoding", "similarity", "encoding"])
@pytest.mark.parametrize(("C", "forget"), [(1, True), (4, True), (4, False), (16, True)])
def test_token_by_token(objective: str, C: int, forget: bool) -> None:
    case = Case(shape(objective=objective, C=C, use_forget_gate=forget))
    z = case.z(C + 3, 0)
    close(case.run(z, [1] * len(z)), case.truth(z))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 33])
def test_lengths(length: int) -> None:
    case = Case(shape())
    z = case.z(length, 1)
    segments = [(2, 0, z)]
    close(case.prefill(segments)[0], case.truth(z))


@pytest.mark.parametrize("cuts", [[3, 1, 1, 6], [1, 1, 5, 1, 3], [4, 4, 3], [2, 9], [10, 1]])
def test_any_split(cuts: list[int]) -> None:
    case = Case(shape())
    z = case.z(sum(cuts), 2)
    close(case.run(z, cuts), case.truth(z))


@pytest.mark.parametrize(("d", "m"), [(64, 64), (32, 16), (40, 72)])
def test_dimensions(d: int, m: int) -> None:
    case = Case(shape(H=1, d=d, m=m))
    z = case.z(7, 3)
    close(case.run(z, [5, 1, 1]), case.truth(z))


def test_many_sequences_at_once() -> None:
    case = Case(shape())
    lengths = {3: 7, 0: 1, 1: 4}
    zs = {row: case.z(length + 1, 10 + row) for row, length in lengths.items()}
    outs = case.prefill([(row, 0, zs[row][:length]) for row, length in lengths.items()])
    for (row, length), out in zip(lengths.items(), outs, strict=True):
        close(out, case.truth(zs[row])[:length])
    last = case.decode([(row, length, zs[row][length]) for row, length in lengths.items()])
    for (row, length), out in zip(lengths.items(), last, strict=True):
        close(out, case.truth(zs[row])[length])
    case.assert_others_untouched(set(lengths))


def test_idle_rows_touch_nothing() -> None:
    case = Case(shape())
    z = case.z(1, 4)
    poison = torch.full_like(z[0], float("nan"))
    out = case.decode([(-1, 0, poison), (2, 0, z[0]), (-1, 7, poison)])
    close(out[1:2], case.truth(z))
    assert not bool(out[[0, 2]].any()), "an idle row's output is not zeros"
    case.assert_others_untouched({2})


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [3, 1, 5]])
def test_a_state_in_bfloat16(cuts: list[int]) -> None:
    case = Case(shape(), torch.bfloat16)
    z = case.z(9, 5)
    close(case.run(z, cuts), case.truth(z), torch.bfloat16)


@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 2e-5), ("tf32x3", 2e-5), ("tf32", 2e-2), ("bf16", 4e-2)])
def test_precision(precision: str, tolerance: float) -> None:
    case = Case(shape())
    z = case.z(9, 6)
    (out,) = case.prefill([(2, 0, z)], precision=precision)
    assert (out.cpu().double() - case.truth(z)).abs().max().item() <= tolerance


def test_a_segment_goes_on_with_the_chunk_that_it_has_begun() -> None:
    device = DeviceSegments.of(Segments.of([(3, 5, 30), (1, 0, 16), (2, 16, 1)]), 16, "cpu")
    assert device.firsts.tolist() == [0, 3, 4]
    assert device.chunks.view(-1, 5).tolist() == [
        [3, 5, 0, 30, -5], [3, 5, 0, 30, 11], [3, 5, 0, 30, 27], [1, 0, 30, 46, 30], [2, 16, 46, 47, 46],
    ]  # fmt: skip
    tokens = DeviceSegments.of(Segments.of([(3, 5, 17), (1, 0, 16)]), 1, "cpu")
    assert tokens.firsts.tolist() == [0, 2]
    assert tokens.chunks.view(-1, 5)[:, 4].tolist() == [0, 16, 17]


def test_what_does_not_fit_is_named() -> None:
    case = Case(shape())
    z = case.z(2, 7)
    rows = torch.tensor([0, 1], device=DEVICE)
    out = torch.empty(2, case.shape.out_width, device=DEVICE)
    arguments: dict[str, Any] = {
        "z": z, "pool": case.pool, "layer": LAYER, "rows": rows, "positions": rows, "weights": case.device_weights,
        "layout": case.layout, "out": out,
    }  # fmt: skip
    wrong: dict[str, Any] = {
        "z": z[:, 1:], "pool": case.pool.double(), "layer": 2, "rows": rows.int(), "positions": rows[:1],
        "out": out.bfloat16(),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            mix_decode(**arguments | {name: value})
    segments = DeviceSegments.of(Segments.of([(0, 0, 2)]), case.shape.C, DEVICE)
    with pytest.raises(ValueError, match="precision"):
        mix_prefill(z, case.pool, LAYER, segments, case.device_weights, case.layout, out, precision="fp8")

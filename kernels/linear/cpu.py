"""``x weight^T`` on the CPU, every output added up in one order: k = 0, 1, 2, ..., whatever the number of rows.

So a row's bits depend on nothing but the row: not on how many rows there are, not on its place among them, not on the
number of threads. Weights are packed once into strips of 16 outputs, k by k, that are read from start to end: few rows
are multiplied at the speed of memory, many at that of the processor's multipliers. Sums are float32.

What multiplies follows from how the activations lie (`kernels.linear.activations`): float32 by fused multiply-adds
with weights that are widened on the way; bfloat16 by VDPBF16PS, in pairs of k, or by AMX, 32 of k at once; whole
numbers with weights of int8 by AMX or by vectors of bytes (`kernels.linear.int8`). A single row of bfloat16 is not left
to AMX, but to vectors that add up as it does (`kernels.numba.bf16_row`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload, register_jitable
from torch import Tensor

from lattice_serve.kernels.linear.activations import ByteTiles, activations, fill
from lattice_serve.kernels.linear.bf16 import STRIPS, by_tiles_of_halves, stream_steps
from lattice_serve.kernels.linear.int8 import FEW, LARGEST_K, by_tiles_of_bytes, by_vectors_of_bytes
from lattice_serve.kernels.linear.overlap import nothing, take_turns
from lattice_serve.kernels.linear.quantize import quantize
from lattice_serve.kernels.numba.amx import (
    BYTE_TILE_K,
    TILE,
    TILE_K,
)
from lattice_serve.kernels.numba.bf16_row import flush_denormals, line, restore_denormals
from lattice_serve.kernels.numba.dots import tile
from lattice_serve.kernels.numba.features import Products, Stored, available_products
from lattice_serve.kernels.numba.lanes import LANES, aligned, padded
from lattice_serve.kernels.numba.vector import load, splat, store

PANEL = STRIPS * LANES
"""Outputs that a thread takes at once: four strips."""
_ROWS = 6
"""Rows of a tile of one vector: 12 sums in the 16 registers of AVX2."""
_SUMS = 4 * TILE * TILE
"""Floats of the sums of a block of tiles, or of the few rows of vectors."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in strips [K, 16], N filled up with zeros."""

    N: int
    K: int
    strips: Any
    """float32 [padded(N) K], or uint32 [padded(N) (K + 1) // 2] with the bits of two bfloat16, or int8, fours of k of
    16 outputs in turn, with zeros to the end of the last tile."""
    scales: Any
    """float32 [padded(N)], one an output, where the strips are int8; else [0]."""

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K], float32 or bfloat16."""
        N, K = weight.shape
        return cls(N, K, _pack(weight), np.zeros(0, dtype=np.float32))

    @classmethod
    def quantized(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K] as int8 with a scale for each output; see `linear.quantize`.

        Raises ValueError where K is so large that sums of whole numbers might not fit.
        """
        if weight.shape[1] > LARGEST_K:
            raise ValueError(f"a matrix of {weight.shape[1]} inputs is too wide for int8: leave quantization out")
        whole, scales = quantize(weight)
        filled = torch.zeros(padded(len(weight)))
        filled[: len(weight)] = scales
        N, K = weight.shape
        return cls(N, K, _pack(whole), filled.numpy())

    @property
    def stored(self) -> Stored:
        kinds: dict[str, Stored] = {"float32": "float32", "uint32": "bfloat16", "int8": "int8"}
        return kinds[self.strips.dtype.name]

    @property
    def nbytes(self) -> int:
        return int(self.strips.nbytes + self.scales.nbytes)

    def __call__(self, x: Tensor, products: Products = "float32") -> Tensor:
        """x [M, K] float32 and contiguous -> [M, N] float32. Raises ValueError when it is not.

        Unless products are of float32, x is rounded: to bfloat16, or to whole numbers of two bytes. The weight must be
        what they multiply.
        """
        if x.ndim != 2 or x.shape[1] != self.K or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be contiguous float32 [M, {self.K}], not {x.dtype} {tuple(x.shape)}")
        if products not in (available := available_products(self.stored)):
            raise ValueError(f"weights of {self.stored} are multiplied here by {', '.join(available)}, not {products}")
        M, N = len(x), padded(self.N)
        rows, out = np.zeros((M, padded(self.K)), dtype=np.float32), aligned(M * N, np.float32)
        rows[:, : self.K] = x.numpy()
        given = activations(products, M, self.K)
        fill(rows.reshape(-1), M, self.K, given)
        scratch = aligned(scratch_size(self.K), np.float32)
        linear(
            self.strips, 0, self.scales, 0, self.N, self.K, given, M, out, 0, N, False, 0, panel_count(self.N), scratch
        )  # fmt: skip
        return torch.from_numpy(out.reshape(M, N)[:, : self.N])


def scratch_size(K: int) -> int:
    """Floats that `linear` wants of its thread, on a cache line."""
    return _SUMS + STRIPS * _filled_size(K)


def _pack(weight: Tensor) -> Any:
    N, K = weight.shape
    # k that lie side by side for each output, and what K is filled up to.
    together, whole = {torch.bfloat16: (2, 2), torch.int8: (4, BYTE_TILE_K)}.get(weight.dtype, (1, 1))
    filled = weight.detach().new_zeros(padded(N), -(-K // whole) * whole)
    filled[:N, :K] = weight.detach()
    view = filled.view(-1, LANES, filled.shape[1] // together, together).movedim(1, 2)
    strips = torch.from_numpy(aligned(filled.numel() * filled.itemsize, np.uint8)).view(filled.dtype)
    strips.view(view.shape).copy_(view)
    return strips.view(torch.uint32).numpy() if weight.dtype == torch.bfloat16 else strips.numpy()


@njit(cache=True)
def panel_count(N: int) -> int:
    return -(-N // PANEL)


@njit(cache=True)
def _emit(sums: Any, o_sums: int, row: int, column: int, n: int, to: Any) -> None:
    """n sums to their place in a row, the first of the panels at its start."""
    scales, o_s, out, o_out, out_row, add = to
    o = o_out + row * out_row + column
    for j in range(0, n, LANES):
        value = load(sums, o_sums + j)
        if len(scales) > 0:
            value = value * load(scales, o_s + column + j)
        if add:
            value = load(out, o + j) + value
        store(out, o + j, value)


@njit(cache=True)
def _rows(rows: int, x: Any, o_x: int, x_row: int, w: Any, o_w: int, K: int, sums: Any) -> None:
    """A tile of up to `_ROWS` rows and one strip."""
    if rows == 6:
        tile(6, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)
    elif rows == 5:
        tile(5, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)
    elif rows == 4:
        tile(4, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)
    elif rows == 3:
        tile(3, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)
    elif rows == 2:
        tile(2, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)
    else:
        tile(1, 1, x, o_x, x_row, w, o_w, LANES, 0, K, sums, 0, LANES)


@njit(cache=True)
def _by_vectors(
    w: Any, o_w: int, size: int, strips: int, steps: int, x: Any, x_row: int, M: int, sums: Any, column: int, to: Any
) -> None:
    """A panel of strips that are `size` apart, in so many steps along x_row; column: of its first output."""
    if M == 1 and strips == STRIPS:
        tile(1, 4, x, 0, 0, w, o_w, LANES, size, steps, sums, 0, 0)
        _emit(sums, 0, 0, column, PANEL, to)
        return
    for s in range(strips):
        i = 0
        while i < M:
            # As many tiles as it takes, all but equally tall: a low one would leave the processor waiting.
            rows = -(-(M - i) // -(-(M - i) // _ROWS))
            _rows(rows, x, i * x_row, x_row, w, o_w + s * size, steps, sums)
            for r in range(rows):
                _emit(sums, r * LANES, i + r, column + s * LANES, LANES, to)
            i += rows


@njit(cache=True)
def _strips_of(panel: int, N: int) -> int:
    return min(STRIPS, padded(N) // LANES - panel * STRIPS)


def _panels(
    w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
) -> int:  # fmt: skip
    """Panels by what multiplies activations such as x, and the turns of `aside` that were taken meanwhile; in compiled
    code only.

    What is looked up in arrays is looked up once for all of them: at one row a panel takes but a microsecond.
    """
    raise NotImplementedError


@overload(_panels, strict=False)
def _panels_of(
    w: Any, o_w: Any, N: Any, K: Any, x: Any, M: Any, first: Any, last: Any, scratch: Any, to: Any, aside: Any
) -> Any:  # fmt: skip
    def by_float32(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        size = strip_size(K, w)
        for panel in range(first, last):
            at, strips = o_w + panel * STRIPS * size, _strips_of(panel, N)
            _by_vectors(w, at, size, strips, K, x, padded(K), M, scratch, panel * PANEL, to)
        return 0

    def by_float32_of_int8(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        fours, size, steps = w.view(np.int32), strip_size(K, w) // 4, -(-K // 4) * 4
        for panel in range(first, last):
            at, strips = o_w // 4 + panel * STRIPS * size, _strips_of(panel, N)
            _by_vectors(fours, at, size, strips, steps, x, padded(K), M, scratch, panel * PANEL, to)
        return 0

    def by_pairs(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        size = strip_size(K, w)
        for panel in range(first, last):
            at, strips = o_w + panel * STRIPS * size, _strips_of(panel, N)
            _by_vectors(w, at, size, strips, (K + 1) // 2, x, padded(K) // 2, M, scratch, panel * PANEL, to)
        return 0

    def by_tiles(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        _, _, out, o_out, out_row, add = to
        size, steps, place = strip_size(K, w), -(-K // TILE_K), out.ctypes.data + 4 * o_out
        weights, filled, rows = w.ctypes.data, scratch.ctypes.data + 4 * _SUMS, x.ctypes.data
        turn, share = np.int64(0), -(-aside.rows // max(1, (last - first) * stream_steps(M, steps)))
        control = flush_denormals()
        for panel in range(first, last):
            o, strips = o_w + panel * STRIPS * size, _strips_of(panel, N)
            at, bytes_ = weights + 4 * o, 4 * size
            if K % TILE_K > 0:
                _fill_tiles(w, o, strips, K, scratch, _SUMS)
                at, bytes_ = filled, 4 * _filled_size(K)
            to_ = place + 4 * panel * PANEL
            if M != 1:
                turn = by_tiles_of_halves(at, bytes_, strips, steps, rows, M, to_, out_row, add, aside, turn, share)
            elif strips == STRIPS:
                line(4, rows, at, bytes_, steps, add, to_)
            else:
                for s in range(strips):
                    line(1, rows, at + s * bytes_, bytes_, steps, add, to_ + 4 * s * LANES)
        restore_denormals(control)
        return turn

    def by_byte_tiles(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        size, steps, sums, weights = strip_size(K, w), -(-K // BYTE_TILE_K), scratch.view(np.int32), w.ctypes.data
        lines, offsets = x.lines.ctypes.data, x.offsets.ctypes.data
        for panel in range(first, last):
            at, strips = weights + o_w + panel * STRIPS * size, _strips_of(panel, N)
            if M <= FEW:
                by_vectors_of_bytes(at, size, strips, steps, lines, offsets, x.scales, M, sums, panel * PANEL, to)
            else:
                by_tiles_of_bytes(at, size, strips, steps, lines, x.scales, M, sums, panel * PANEL, to)
        return 0

    def by_byte_vectors(
        w: Any, o_w: int, N: int, K: int, x: Any, M: int, first: int, last: int, scratch: Any, to: Any, aside: Any
    ) -> int:  # fmt: skip
        size, steps, sums, weights = strip_size(K, w), -(-K // BYTE_TILE_K), scratch.view(np.int32), w.ctypes.data
        lines, offsets = x.lines.ctypes.data, x.offsets.ctypes.data
        for panel in range(first, last):
            at, strips = weights + o_w + panel * STRIPS * size, _strips_of(panel, N)
            by_vectors_of_bytes(at, size, strips, steps, lines, offsets, x.scales, M, sums, panel * PANEL, to)
        return 0

    if isinstance(x, types.BaseTuple):
        return by_byte_tiles if x.instance_class is ByteTiles else by_byte_vectors
    if x.dtype == types.float32:
        return by_float32_of_int8 if w.dtype == types.int8 else by_float32
    return by_pairs if x.dtype == types.uint32 else by_tiles


def strip_size(K: int, w: Any) -> int:
    """Elements of one strip; in compiled code only."""
    raise NotImplementedError


@overload(strip_size, strict=False)
def _strip_size_of(K: Any, w: Any) -> Any:
    if w.dtype == types.uint32:
        return lambda K, w: LANES * ((K + 1) // 2)
    if w.dtype == types.int8:
        return lambda K, w: LANES * (-(-K // BYTE_TILE_K) * BYTE_TILE_K)
    return lambda K, w: LANES * K


@register_jitable
def _filled_size(K: int) -> int:
    """Floats of a strip of bfloat16, in pairs and with zeros to the end of the last tile."""
    return -(-K // TILE_K) * TILE * TILE


@njit(cache=True)
def _fill_tiles(w: Any, o_w: int, strips: int, K: int, out: Any, o_out: int) -> None:
    """Strips of bfloat16 to strips that are `_filled_size` apart."""
    size, bits = strip_size(K, w), w.view(np.float32)
    for s in range(strips):
        o, to = o_w + s * size, o_out + s * _filled_size(K)
        for i in range(0, size, LANES):
            store(out, to + i, load(bits, o + i))
        for i in range(size, _filled_size(K), LANES):
            store(out, to + i, splat(np.float32(0)))


# Both are put in place where they are called, so that products are compiled once, not for each literal argument.
@njit(inline="always")
def linear(
    w: Any, o_w: int, scales: Any, o_s: int, N: int, K: int, x: Any, M: int, out: Any, o_out: int, out_row: int,
    add: bool, first: int, last: int, scratch: Any,
) -> None:  # fmt: skip
    """Panels `first` to `last` of a packed weight: those outputs of x [M, K] weight^T to out, or added to it.

    The strips begin at o_w of w, the scales at o_s of scales; x: `activations` of M rows of K; row after row of the
    outputs begins at o_out of out, out_row on; scratch: `scratch_size` floats on a cache line. All arrays are [..].
    Outputs beyond N up to `padded(N)` become 0.
    """
    linear_beside(
        w, o_w, scales, o_s, N, K, x, M, out, o_out, out_row, add, first, last, scratch, nothing(out, x)
    )  # fmt: skip


@njit(inline="always")
def linear_beside(
    w: Any, o_w: int, scales: Any, o_s: int, N: int, K: int, x: Any, M: int, out: Any, o_out: int, out_row: int,
    add: bool, first: int, last: int, scratch: Any, aside: Any,
) -> None:  # fmt: skip
    """The same, and `linear.aside` meanwhile where there is time, and else after it."""
    to = (scales, o_s, out, o_out - first * PANEL, out_row, add)
    take_turns(aside, _panels(w, o_w, N, K, x, M, first, last, scratch, to, aside), aside.rows)

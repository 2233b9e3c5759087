"""``x weight^T`` on the CPU, every output added up in one order: k = 0, 1, 2, ..., whatever the number of rows.

So a row's bits depend on nothing but the row: not on how many rows there are, not on its place among them, not on the
number of threads. Weights are packed once into strips of 16 outputs, k by k, that are read from start to end: few rows
are multiplied at the speed of memory, many at that of the processor's multipliers. Sums are float32.

What multiplies follows from how the activations lie (`kernels.linear.activations`): float32 by fused multiply-adds
with weights that are widened on the way; bfloat16 by VDPBF16PS, in pairs of k, or by AMX, 32 of k at once. These want
weights of bfloat16: int8 are widened, exactly, strip by strip into memory that stays in the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload, register_jitable
from torch import Tensor

from lattice_serve.kernels.cpu.amx import TILE, TILE_BYTES, TILE_K, block, configure, release
from lattice_serve.kernels.cpu.products import tile
from lattice_serve.kernels.cpu.vector import load, pairs, splat, store, widened
from lattice_serve.kernels.cpu_features import Products
from lattice_serve.kernels.lanes import LANES, aligned, padded
from lattice_serve.kernels.linear.activations import activations, fill
from lattice_serve.kernels.linear.quantize import quantize

PANEL = 64
"""Outputs that a thread takes at once: four strips."""
_STRIPS = PANEL // LANES
_ROWS = 6
"""Rows of a tile of one vector: 12 sums in the 16 registers of AVX2."""
_SUMS = 4 * TILE * TILE
"""Floats of the sums of a block of tiles, or of the few rows of vectors."""
_DEPTH = 8
"""Tiles of a strip that are multiplied with all of many rows before the next ones are: those of a panel and of two
tiles of rows stay in the first-level cache."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in strips [K, 16], N filled up with zeros."""

    N: int
    K: int
    strips: Any
    """float32 or int8 [padded(N) K], or uint32 [padded(N) (K + 1) // 2] with the bits of two bfloat16."""
    scales: Any
    """float32 [padded(N)], one an output, where the strips are int8; else [0]."""

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K], float32 or bfloat16."""
        N, K = weight.shape
        return cls(N, K, _pack(weight), np.zeros(0, dtype=np.float32))

    @classmethod
    def quantized(cls, weight: Tensor) -> PackedWeight:
        """weight [N, K] as int8 with a scale for each output; see `linear.quantize`."""
        whole, scales = quantize(weight)
        filled = torch.zeros(padded(len(weight)))
        filled[: len(weight)] = scales
        N, K = weight.shape
        return cls(N, K, _pack(whole), filled.numpy())

    @property
    def nbytes(self) -> int:
        return int(self.strips.nbytes + self.scales.nbytes)

    def __call__(self, x: Tensor, products: Products = "float32") -> Tensor:
        """x [M, K] float32 and contiguous -> [M, N] float32. Raises ValueError when it is not.

        Unless products are of float32, x is rounded to bfloat16, and weights must not be float32.
        """
        if x.ndim != 2 or x.shape[1] != self.K or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be contiguous float32 [M, {self.K}], not {x.dtype} {tuple(x.shape)}")
        if products != "float32" and self.strips.dtype == np.float32:
            raise ValueError(f"weights are float32: {products} multiplies bfloat16 and int8")
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
    return _SUMS + _STRIPS * _widened_size(K)


def _pack(weight: Tensor) -> Any:
    N, K = weight.shape
    halves = 2 if weight.dtype == torch.bfloat16 else 1
    whole = weight.detach().new_zeros(padded(N), -(-K // halves) * halves)
    whole[:N, :K] = weight.detach()
    view = whole.view(-1, LANES, whole.shape[1] // halves, halves).movedim(1, 2)
    strips = torch.from_numpy(aligned(whole.numel() * whole.itemsize, np.uint8)).view(whole.dtype)
    strips.view(view.shape).copy_(view)
    return strips.view(torch.uint32).numpy() if halves == 2 else strips.numpy()


@njit(cache=True)
def panel_count(N: int) -> int:
    return -(-N // PANEL)


@njit(cache=True)
def _emit(sums: Any, o_sums: int, row: int, column: int, n: int, to: Any) -> None:
    """n sums to their place in a panel."""
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
    w: Any, o_w: int, size: int, strips: int, steps: int, x: Any, x_row: int, M: int, sums: Any, to: Any
) -> None:
    """A panel of strips that are `size` apart, in so many steps along x_row."""
    if M == 1 and strips == _STRIPS:
        tile(1, 4, x, 0, 0, w, o_w, LANES, size, steps, sums, 0, 0)
        _emit(sums, 0, 0, 0, PANEL, to)
        return
    for s in range(strips):
        i = 0
        while i < M:
            # As many tiles as it takes, all but equally tall: a low one would leave the processor waiting.
            rows = -(-(M - i) // -(-(M - i) // _ROWS))
            _rows(rows, x, i * x_row, x_row, w, o_w + s * size, steps, sums)
            for r in range(rows):
                _emit(sums, r * LANES, i + r, s * LANES, LANES, to)
            i += rows


@njit(cache=True)
def _by_tiles(w: int, size: int, whole: bool, strips: int, steps: int, x: int, M: int, sums: Any, to: Any) -> None:
    """A panel of strips that are `size` bytes apart, of int8 if whole; x and w are addresses.

    Sums that are not scaled are worked out where they go to.
    """
    scales, _, out, o_out, out_row, add = to
    scaled = len(scales) > 0
    # Weights for fewer rows come from memory, strip by strip; sums that are scaled have no place before they are whole.
    depth = steps if scaled or whole or M < 8 * TILE else _DEPTH
    for k in range(0, steps, depth):
        count, o_x, o_k = min(depth, steps - k), x + k * TILE_BYTES, w + k * TILE_BYTES
        i = 0
        while i < M:
            rows, height = min(M - i, TILE), 1
            if M - i >= 2 * TILE and strips == _STRIPS:
                rows, height = 2 * TILE, 2
            width = _STRIPS // height if strips == _STRIPS else 1
            if i == 0 or rows < TILE:
                configure(min(rows, TILE))
            at, x_next = o_x + i // TILE * steps * TILE_BYTES, steps * TILE_BYTES
            for s in range(0, strips, width):
                place, next_row = out.ctypes.data + 4 * (o_out + i * out_row + s * LANES), 4 * out_row
                if scaled:
                    place, next_row = sums.ctypes.data, 4 * width * LANES
                begins, o_w = k > 0 or (add and not scaled), o_k + s * size
                if whole and height == 2:
                    block(2, 2, 1, at, x_next, o_w, size, count, begins, place, next_row)
                elif whole and width == _STRIPS:
                    block(1, 4, 1, at, x_next, o_w, size, count, begins, place, next_row)
                elif whole:
                    block(1, 1, 1, at, x_next, o_w, size, count, begins, place, next_row)
                elif height == 2:
                    block(2, 2, 0, at, x_next, o_w, size, count, begins, place, next_row)
                elif width == _STRIPS:
                    block(1, 4, 0, at, x_next, o_w, size, count, begins, place, next_row)
                else:
                    block(1, 1, 0, at, x_next, o_w, size, count, begins, place, next_row)
                if scaled:
                    for r in range(rows):
                        _emit(sums, r * width * LANES, i + r, s * LANES, width * LANES, to)
            i += rows
    release()


def _panel(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
    """A panel of strips by what multiplies activations such as x; in compiled code only."""
    raise NotImplementedError


@overload(_panel, strict=False)
def _panel_of(w: Any, o_w: Any, strips: Any, K: Any, x: Any, M: Any, scratch: Any, to: Any) -> Any:
    def by_float32(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
        _by_vectors(w, o_w, strip_size(K, w), strips, K, x, padded(K), M, scratch, to)

    def by_pairs(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
        _by_vectors(w, o_w, strip_size(K, w), strips, (K + 1) // 2, x, padded(K) // 2, M, scratch, to)

    def by_pairs_of_int8(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
        _widen(w, o_w, strips, K, scratch, _SUMS)
        wide, size = scratch.view(np.uint32), _widened_size(K)
        _by_vectors(wide, _SUMS, size, strips, (K + 1) // 2, x, padded(K) // 2, M, scratch, to)

    def by_tiles(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
        at, size, steps = w.ctypes.data + 4 * o_w, 4 * strip_size(K, w), -(-K // TILE_K)
        if K % TILE_K > 0:
            _widen(w, o_w, strips, K, scratch, _SUMS)
            at, size = scratch.ctypes.data + 4 * _SUMS, 4 * _widened_size(K)
        _by_tiles(at, size, False, strips, steps, x.ctypes.data, M, scratch, to)

    def by_tiles_of_int8(w: Any, o_w: int, strips: int, K: int, x: Any, M: int, scratch: Any, to: Any) -> None:
        # Few rows wait for memory, which must not wait for them: each tile is widened as it comes. Many share it.
        at, size, whole, steps = w.ctypes.data + o_w, strip_size(K, w), M <= 2 * TILE, -(-K // TILE_K)
        if M > 2 * TILE or K % TILE_K > 0:
            _widen(w, o_w, strips, K, scratch, _SUMS)
            at, size, whole = scratch.ctypes.data + 4 * _SUMS, 4 * _widened_size(K), False
        _by_tiles(at, size, whole, strips, steps, x.ctypes.data, M, scratch, to)

    if x.dtype == types.float32:
        return by_float32
    if x.dtype == types.uint32:
        return by_pairs if w.dtype == types.uint32 else by_pairs_of_int8
    return by_tiles if w.dtype == types.uint32 else by_tiles_of_int8


def strip_size(K: int, w: Any) -> int:
    """Elements of one strip."""
    return LANES * (-(-K // 2) if w.dtype == np.uint32 else K)


@overload(strip_size, strict=False)
def _strip_size_of(K: Any, w: Any) -> Any:
    if w.dtype == types.uint32:
        return lambda K, w: LANES * ((K + 1) // 2)
    return lambda K, w: LANES * K


@register_jitable
def _widened_size(K: int) -> int:
    """Floats of a strip of bfloat16, in pairs and with zeros to the end of the last tile."""
    return -(-K // TILE_K) * TILE * TILE


def _widen(w: Any, o_w: int, strips: int, K: int, out: Any, o_out: int) -> None:
    """Strips of int8 or bfloat16 to strips of bfloat16, `_widened_size` apart; in compiled code only."""
    raise NotImplementedError


@overload(_widen, strict=False)
def _widen_of(w: Any, o_w: Any, strips: Any, K: Any, out: Any, o_out: Any) -> Any:
    zero = np.float32(0)

    def of_bfloat16(w: Any, o_w: int, strips: int, K: int, out: Any, o_out: int) -> None:
        size, bits = strip_size(K, w), w.view(np.float32)
        for s in range(strips):
            o, to = o_w + s * size, o_out + s * _widened_size(K)
            for i in range(0, size, LANES):
                store(out, to + i, load(bits, o + i))
            for i in range(size, _widened_size(K), LANES):
                store(out, to + i, splat(zero))

    def of_int8(w: Any, o_w: int, strips: int, K: int, out: Any, o_out: int) -> None:
        for s in range(strips):
            o, to = o_w + s * strip_size(K, w), o_out + s * _widened_size(K)
            for k in range(0, K - 1, 2):
                store(out, to + k // 2 * LANES, pairs(widened(w, o + k * LANES), widened(w, o + (k + 1) * LANES)))
            if K % 2 == 1:
                store(out, to + K // 2 * LANES, pairs(widened(w, o + (K - 1) * LANES), splat(zero)))
            for i in range((K + 1) // 2 * LANES, _widened_size(K), LANES):
                store(out, to + i, splat(zero))

    return of_bfloat16 if w.dtype == types.uint32 else of_int8


@njit(cache=True)
def linear(
    w: Any, o_w: int, scales: Any, o_s: int, N: int, K: int, x: Any, M: int, out: Any, o_out: int, out_row: int,
    add: bool, first: int, last: int, scratch: Any,
) -> None:  # fmt: skip
    """Panels `first` to `last` of a packed weight: those outputs of x [M, K] weight^T to out, or added to it.

    The strips begin at o_w of w, the scales at o_s of scales; x: `activations` of M rows of K; row after row of the
    outputs begins at o_out of out, out_row on; scratch: `scratch_size` floats on a cache line. All arrays are [..].
    Outputs beyond N up to `padded(N)` become 0.
    """
    size = strip_size(K, w)
    for panel in range(first, last):
        begin = panel * PANEL
        strips = min(PANEL, padded(N) - begin) // LANES
        to = (scales, o_s + begin, out, o_out + begin - first * PANEL, out_row, add)
        _panel(w, o_w + begin // LANES * size, strips, K, x, M, scratch, to)

"""The matrix unit of x86 (AMX) in Numba kernels: eight tile registers of 16 lines of 64 bytes, and products of them.

An output's sum is worked out in one order, a line of k at a time, whatever the height of the tiles is.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.lowering import build_prefetch, build_x86

TILE = 16
"""Lines of a tile, and float32, int32, pairs of bfloat16 or fours of int8 of a line."""
TILE_K = 2 * TILE
"""What a line holds of bfloat16."""
BYTE_TILE_K = 4 * TILE
"""What a line holds of int8."""
TILE_BYTES = 4 * TILE * TILE

_FIRST, _LAST = 4, 7
"""Registers 0 to 3 hold sums; from 4 on lie activations, and weights behind them."""
_PRODUCTS = ("tdpbf16ps", "tdpbssd")
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_MEMORY = _BYTE.as_pointer()


@intrinsic
def configure(typingctx: Any, rows: Any) -> Any:
    """Begin: sums, and activations, which follow them from register 4 to 4, have so many lines, all others 16.

    For 16 rows all eight registers are alike.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lines = builder.trunc(values[0], _BYTE)
        place = cgutils.alloca_once(builder, ir.ArrayType(_BYTE, 64))
        builder.store(ir.Constant(ir.ArrayType(_BYTE, 64), None), place)
        memory = builder.bitcast(place, _MEMORY)
        builder.store(_BYTE(1), memory)  # the palette
        for register in range(_LAST + 1):
            builder.store(_BYTE(64), builder.gep(memory, [_LONG(16 + 2 * register)]))
            height = lines if register <= _FIRST else _BYTE(TILE)
            builder.store(height, builder.gep(memory, [_LONG(48 + register)]))
        build_x86(builder, "ldtilecfg", memory)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """End: the system need not save the registers any more."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        build_x86(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _memory(builder: Any, address: Any, *more: Any) -> Any:
    for offset in more:
        address = builder.add(address, offset)
    return builder.inttoptr(address, _MEMORY)


def _cells(R: int, S: int) -> dict[tuple[int, int], Any]:
    """The register of each tile of sums."""
    return {(i // S, i % S): _BYTE(i) for i in range(R * S)}


def _build_begin(builder: Any, R: int, S: int, add: Any, out: Any, out_next: Any) -> None:
    with builder.if_else(add) as (then, otherwise):
        with then:
            _build_sums(builder, "tileloadd64", R, S, out, out_next)
        with otherwise:
            for register in _cells(R, S).values():
                build_x86(builder, "tilezero", register)


def _build_sums(builder: Any, name: str, R: int, S: int, out: Any, out_next: Any) -> None:
    for (r, s), register in _cells(R, S).items():
        place = _memory(builder, out, builder.mul(out_next, _LONG(r * TILE)), _LONG(s * 4 * LANES))
        build_x86(builder, name, register, place, out_next)


def _build_step(
    builder: Any, R: int, S: int, product: str, load_x: str, x: Any, x_next: Any, w: Any, w_next: Any
) -> None:
    line, activations = _LONG(4 * LANES), [_BYTE(_FIRST + r) for r in range(R)]
    free = [_BYTE(register) for register in range(_FIRST + R, _LAST + 1)]
    for r in range(R):
        build_x86(builder, load_x, activations[r], _memory(builder, x, builder.mul(x_next, _LONG(r))), line)
    for s in range(S):
        weights = free[s % len(free)]
        build_x86(builder, "tileloadd64", weights, _memory(builder, w, builder.mul(w_next, _LONG(s))), line)
        for r in range(R):
            build_x86(builder, product, _cells(R, S)[r, s], activations[r], weights)


@intrinsic(prefer_literal=True)
def block(
    typingctx: Any, rows: Any, strips: Any, whole: Any, x: Any, x_next: Any, w: Any, w_next: Any, steps: Any, add: Any,
    out: Any, out_next: Any,
) -> Any:  # fmt: skip
    """Sums of `rows` tiles of activations (1, or 2 where all have 16 lines) with `strips` strips of weights.

    rows and strips, at most four in product, are literals. x, w and out are addresses, multiples of 64. Tile after tile
    of activations, each of a line of k, begins at x, those of the second 16 rows x_next bytes on; tiles of weights for
    16 outputs, pairs or fours of k in a line, begin at w, those of the next 16 w_next bytes on. The sums of a row of
    activations go to out, side by side, those of the next out_next bytes on; if add is true they begin with what is
    there. Where `whole`, a literal, is 1, activations and weights are int8 and sums int32, else bfloat16 and float32.
    """
    literals = (rows, strips, whole)
    if not all(isinstance(number, types.IntegerLiteral) for number in literals):
        raise TypeError("rows, strips and whole of a block must be literals")
    R, S, int8 = (number.literal_value for number in literals)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_next, w, w_next, steps, add, out, out_next = values[3:]
        product = _PRODUCTS[int8]
        _build_begin(builder, R, S, add, out, out_next)
        with cgutils.for_range(builder, steps, intp=_LONG) as loop:
            at = builder.mul(loop.index, _LONG(TILE_BYTES))
            _build_step(builder, R, S, product, "tileloadd64", builder.add(x, at), x_next, builder.add(w, at), w_next)
        _build_sums(builder, "tilestored64", R, S, out, out_next)
        return context.get_dummy_value()

    i = types.intp
    return types.void(*literals, i, i, i, i, i, types.boolean, i, i), codegen


@intrinsic
def begin(typingctx: Any, add: Any, out: Any, out_next: Any) -> Any:
    """A `block` of 2 by 2 tiles in pieces, between which other work can be done: the first."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _build_begin(builder, 2, 2, *values)
        return context.get_dummy_value()

    return types.void(types.boolean, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx: Any, whole: Any, x: Any, x_next: Any, w: Any, w_next: Any) -> Any:
    """One step of it. Activations are loaded so that they pass the first cache by, and weights stay there."""
    if not isinstance(whole, types.IntegerLiteral):
        raise TypeError("whole of a step must be a literal")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _build_step(builder, 2, 2, _PRODUCTS[whole.literal_value], "tileloaddt164", *values[1:])
        return context.get_dummy_value()

    return types.void(whole, *[types.intp] * 4), codegen


@intrinsic
def end(typingctx: Any, out: Any, out_next: Any) -> Any:
    """The last."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _build_sums(builder, "tilestored64", 2, 2, *values)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def ask(typingctx: Any, address: Any) -> Any:
    """Ask for a cache line, into the second-level cache; where there is no memory, nothing happens."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        build_prefetch(builder, builder.inttoptr(values[0], _MEMORY), level=2)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@njit(cache=True)
def block_shape(lines: int, strips: int) -> tuple[int, int, int]:
    """Lines, tiles of them and strips of the next `block`, where so many lines are left and a panel has so many strips.

    Of a whole panel, of four strips, a block takes two tiles by two, or one by four; of another, one by one.
    """
    if strips < 4:
        return min(lines, TILE), 1, 1
    return (2 * TILE, 2, 2) if lines >= 2 * TILE else (min(lines, TILE), 1, 4)

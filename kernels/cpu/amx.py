"""The matrix unit of x86 (AMX) in Numba kernels: eight tile registers of 16 lines of 64 bytes, and products of them.

An output's sum is worked out in one order, a line of k at a time, whatever the height of the tiles is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lattice_serve.kernels.cpu.lowering import build_prefetch, build_x86
from lattice_serve.kernels.lanes import LANES

TILE = 16
"""Lines of a tile, and float32, int32, pairs of bfloat16 or fours of int8 of a line."""
TILE_K = 2 * TILE
"""What a line holds of bfloat16."""
BYTE_TILE_K = 4 * TILE
"""What a line holds of int8."""
TILE_BYTES = 4 * TILE * TILE

_FIRST, _LAST = 4, 7
"""Registers 0 to 3 hold sums; from 4 on lie activations, and weights behind them."""
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


def _build_block(
    builder: Any, R: int, S: int, product: str, load_x: str, places: tuple[Any, ...], aside: Callable[[Any], None]
) -> None:
    """Code for R by S tiles of sums; `aside` builds what else is done in a step, of which it is given the number."""
    x, x_next, w, w_next, steps, add, out, out_next = places
    cells = [(r, s) for r in range(R) for s in range(S)]
    sums = {cell: _BYTE(i) for i, cell in enumerate(cells)}
    activations = [_BYTE(_FIRST + r) for r in range(R)]
    free = [_BYTE(register) for register in range(_FIRST + R, _LAST + 1)]
    line = _LONG(4 * LANES)

    def memory(address: Any, *more: Any) -> Any:
        for offset in more:
            address = builder.add(address, offset)
        return builder.inttoptr(address, _MEMORY)

    to = {(r, s): memory(out, builder.mul(out_next, _LONG(r * TILE)), _LONG(s * 4 * LANES)) for r, s in cells}
    with builder.if_else(add) as (then, otherwise):
        with then:
            for cell in cells:
                build_x86(builder, "tileloadd64", sums[cell], to[cell], out_next)
        with otherwise:
            for cell in cells:
                build_x86(builder, "tilezero", sums[cell])
    with cgutils.for_range(builder, steps, intp=_LONG) as loop:
        at = builder.mul(loop.index, _LONG(TILE_BYTES))
        for r in range(R):
            build_x86(builder, load_x, activations[r], memory(x, builder.mul(x_next, _LONG(r)), at), line)
        for s in range(S):
            weights = free[s % len(free)]
            build_x86(builder, "tileloadd64", weights, memory(w, builder.mul(w_next, _LONG(s)), at), line)
            for r in range(R):
                build_x86(builder, product, sums[r, s], activations[r], weights)
        aside(loop.index)
    for cell in cells:
        build_x86(builder, "tilestored64", sums[cell], to[cell], out_next)


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
        product = "tdpbssd" if int8 else "tdpbf16ps"
        _build_block(builder, R, S, product, "tileloadd64", values[3:], lambda step: None)
        return context.get_dummy_value()

    i = types.intp
    return types.void(*literals, i, i, i, i, i, types.boolean, i, i), codegen


@intrinsic
def stream(
    typingctx: Any, x: Any, x_next: Any, w: Any, w_next: Any, steps: Any, add: Any, out: Any, out_next: Any, ahead: Any,
    lines: Any,
) -> Any:  # fmt: skip
    """`block` of 2 by 2 tiles of bfloat16, for one after another of many rows with the same weights.

    Weights stay in the first-level cache, for activations are loaded so that they pass it by. Every step asks for so
    many lines of weights that are wanted later, in each of two strips: those of the first step are at `ahead`.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *places, ahead, lines = values
        w_next = places[3]

        def ask(step: Any) -> None:
            first = builder.add(ahead, builder.mul(builder.mul(step, lines), _LONG(4 * LANES)))
            with cgutils.for_range(builder, lines, intp=_LONG) as loop:
                line = builder.add(first, builder.mul(loop.index, _LONG(4 * LANES)))
                for address in (line, builder.add(line, w_next)):
                    build_prefetch(builder, builder.inttoptr(address, _MEMORY), level=2)

        _build_block(builder, 2, 2, "tdpbf16ps", "tileloaddt164", tuple(places), ask)
        return context.get_dummy_value()

    i = types.intp
    return types.void(i, i, i, i, i, types.boolean, i, i, i, i), codegen


@njit(cache=True)
def block_shape(lines: int, strips: int) -> tuple[int, int, int]:
    """Lines, tiles of them and strips of the next `block`, where so many lines are left and a panel has so many strips.

    Of a whole panel, of four strips, a block takes two tiles by two, or one by four; of another, one by one.
    """
    if strips < 4:
        return min(lines, TILE), 1, 1
    return (2 * TILE, 2, 2) if lines >= 2 * TILE else (min(lines, TILE), 1, 4)

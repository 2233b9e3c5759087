"""Products of bytes by vectors of x86 (AVX512_VNNI): four of k in each of 16 lanes at once, with sums of int32.

Sums of whole numbers are exact, so they are the same as those of the matrix unit (`kernels.numba.amx`), whose tiles of
activations and weights are read here as well.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lattice_serve.kernels.numba.amx import TILE, TILE_BYTES
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.lowering import (
    I32,
    WHOLE,
    build_ahead,
    build_dot_bytes,
    build_prefetch,
    build_read,
    build_splat,
    build_write,
)

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_TOP_BITS = ir.Constant(WHOLE, [-0x7F7F7F80] * LANES)
"""0x80 in every byte: with it turned over, a signed byte is 128 more, and unsigned."""
AHEAD = 4 * TILE_BYTES
"""Bytes of a strip that are asked for before they are wanted: what the processor foresees by itself ends with a page,
and at the beginning of a strip. A third more bytes a second at one row."""


@intrinsic(prefer_literal=True)
def dots(
    typingctx: Any, lines: Any, strips: Any, x: Any, w: Any, w_next: Any, steps: Any, offsets: Any, out: Any,
    out_next: Any,
) -> Any:  # fmt: skip
    """int32 sums of so many lines of a tile of activations with `strips` strips of weights.

    lines and strips are literals, all else are addresses and distances in bytes, of arrays of int8 as `amx.block` takes
    them. x: where the first of the lines begins in the first tile. offsets: int32, 128 times the sum of each line,
    which is what is too much when weights count as unsigned.
    """
    literals = (lines, strips)
    if not all(isinstance(number, types.IntegerLiteral) for number in literals):
        raise TypeError("lines and strips of dots must be literals")
    L, S = (number.literal_value for number in literals)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, w, w_next, steps, offsets, out, out_next = values[2:]
        cells = [(line, s) for line in range(L) for s in range(S)]
        sums = {cell: cgutils.alloca_once(builder, WHOLE) for cell in cells}  # registers, after LLVM's passes

        def pointer(address: Any) -> Any:
            return builder.inttoptr(address, _BYTE.as_pointer())

        def read(address: Any, kind: Any, align: int = 4 * LANES) -> Any:
            return build_read(builder, pointer(address), kind, align)

        def splat(address: Any) -> Any:
            return builder.bitcast(build_splat(builder, read(address, I32, 4)), WHOLE)

        for line in range(L):
            begin = builder.neg(splat(builder.add(offsets, _LONG(4 * line))))
            for s in range(S):
                builder.store(begin, sums[line, s])
        with cgutils.for_range(builder, steps, intp=_LONG) as loop:
            at = builder.mul(loop.index, _LONG(TILE_BYTES))
            tile = builder.add(x, at)
            strip = [builder.add(builder.add(w, at), builder.mul(w_next, _LONG(s))) for s in range(S)]
            ahead = build_ahead(builder, at, AHEAD, w_next, S)
            for four in range(TILE):
                lines_at = [builder.add(each, _LONG(four * 4 * LANES)) for each in strip]
                for each in lines_at:
                    build_prefetch(builder, pointer(builder.add(each, builder.sub(ahead, at))))
                weights = [builder.xor(read(each, WHOLE), _TOP_BITS) for each in lines_at]
                for line in range(L):
                    factor = splat(builder.add(tile, _LONG(line * 4 * LANES + 4 * four)))
                    for s in range(S):
                        place = sums[line, s]
                        builder.store(build_dot_bytes(builder, weights[s], factor, builder.load(place)), place)
        for line, s in cells:
            place = builder.add(out, builder.add(builder.mul(out_next, _LONG(line)), _LONG(s * 4 * LANES)))
            build_write(builder, builder.load(sums[line, s]), pointer(place))
        return context.get_dummy_value()

    i = types.intp
    return types.void(*literals, i, i, i, i, i, i, i), codegen

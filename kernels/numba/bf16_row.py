"""Products of bfloat16 of one row by vectors of AVX-512, each sum worked out as the matrix unit (`numba.amx`) does it.

Of 32 of k the even and the odd ones are added up apart, in turn; both sums are added, and that to what there was. A
product of two bfloat16 is exact in float32, so nothing else is rounded. The unit takes denormal numbers for zeros, and
so do vectors between `flush_denormals` and `restore_denormals`. One row waits for memory: vectors can read ahead.
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
    VECTOR,
    WHOLE,
    ZERO,
    build_ahead,
    build_fmuladd,
    build_high,
    build_low,
    build_prefetch,
    build_read,
    build_splat,
    build_write,
    build_x86,
)
from lattice_serve.kernels.numba.vnni import AHEAD

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_MEMORY = _BYTE.as_pointer()
_FLUSH = 0x8040
"""Bits of MXCSR: what would be denormal is zero, read or written."""


def _control(builder: Any, name: str, place: Any) -> None:
    build_x86(builder, f"sse.{name}mxcsr", builder.bitcast(place, _MEMORY))


@intrinsic
def flush_denormals(typingctx: Any) -> Any:
    """Begin to take denormal numbers for zeros; returns what `restore_denormals` wants."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, I32)
        _control(builder, "st", place)
        before = builder.load(place)
        builder.store(builder.or_(before, I32(_FLUSH)), place)
        _control(builder, "ld", place)
        return before

    return types.int32(), codegen


@intrinsic
def restore_denormals(typingctx: Any, before: Any) -> Any:
    """End."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, I32)
        builder.store(values[0], place)
        _control(builder, "ld", place)
        return context.get_dummy_value()

    return types.void(types.int32), codegen


@intrinsic(prefer_literal=True)
def line(typingctx: Any, strips: Any, x: Any, w: Any, w_next: Any, steps: Any, add: Any, out: Any) -> Any:
    """Sums of a line of tiles of activations with `strips` strips of weights, side by side to out.

    strips is a literal. x, w and out are addresses: the line begins at x in the first of so many tiles, the pairs of
    16 outputs at w, those of the next 16 w_next bytes on. If add is true, sums begin with what is there.
    """
    if not isinstance(strips, types.IntegerLiteral):
        raise TypeError("strips of a line must be a literal")
    S = range(strips.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, w, w_next, steps, add, out = values[1:]
        sums = [cgutils.alloca_once(builder, VECTOR) for _ in S]  # registers, after LLVM's passes

        def pointer(address: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), _MEMORY)

        places = [pointer(out, _LONG(s * 4 * LANES)) for s in S]
        with builder.if_else(add) as (then, otherwise):
            with then:
                for s in S:
                    builder.store(build_read(builder, places[s]), sums[s])
            with otherwise:
                for s in S:
                    builder.store(ZERO, sums[s])
        with cgutils.for_range(builder, steps, intp=_LONG) as loop:
            at = builder.mul(loop.index, _LONG(TILE_BYTES))
            starts = [builder.add(w, builder.mul(w_next, _LONG(s))) for s in S]
            ahead = build_ahead(builder, at, AHEAD, w_next, len(S))
            even, odd = [ZERO for _ in S], [ZERO for _ in S]
            for pair in range(TILE):
                inside = _LONG(pair * 4 * LANES)
                for s in S:
                    build_prefetch(builder, pointer(starts[s], builder.add(ahead, inside)))
                bits = build_read(builder, pointer(x, builder.add(at, _LONG(4 * pair))), I32, 4)
                both = builder.bitcast(build_splat(builder, bits), WHOLE)
                low, high = build_low(builder, both), build_high(builder, both)
                for s in S:
                    weights = build_read(builder, pointer(starts[s], builder.add(at, inside)), WHOLE, 4 * LANES)
                    even[s] = build_fmuladd(builder, low, build_low(builder, weights), even[s])
                    odd[s] = build_fmuladd(builder, high, build_high(builder, weights), odd[s])
            for s in S:
                both = builder.fadd(even[s], odd[s])
                builder.store(builder.fadd(builder.load(sums[s]), both), sums[s])
        for s in S:
            build_write(builder, builder.load(sums[s]), places[s])
        return context.get_dummy_value()

    i = types.intp
    return types.void(strips, i, i, i, i, types.boolean, i), codegen

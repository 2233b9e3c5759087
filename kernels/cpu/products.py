"""The products that Numba kernels are made of, as intrinsics: dots, sums of lines, and tiles of a matrix product."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lattice_serve.kernels.cpu.lowering import (
    VECTOR,
    WHOLE,
    ZERO,
    build_byte,
    build_dot_pairs,
    build_fmuladd,
    build_halved,
    build_high,
    build_low,
    build_neighbours,
    build_pointer,
    build_read,
    build_splat,
    build_write,
    checked,
)
from lattice_serve.kernels.lanes import LANES


@intrinsic
def eight_dots(typingctx: Any, x: Any, o_x: Any, w: Any, o_w: Any, w_row: Any, n: Any, out: Any, o_out: Any) -> Any:
    """out[o_out + r] = sum_i x[o_x + i] w[o_w + r w_row + i] for r < 8 and i < n, a multiple of 16.

    Arrays are float32 [..]. Lanes are added up as `total` does.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, o_x, w, o_w, w_row, n, out, o_out = values
        x_data = build_pointer(context, builder, signature.args[0], x, o_x)
        w_data = build_pointer(context, builder, signature.args[2], w, o_w)
        rows = [builder.gep(w_data, [builder.mul(w_row, w_row.type(r))]) for r in range(8)]
        sums = [cgutils.alloca_once_value(builder, ZERO) for _ in rows]
        for place in sums:
            builder.store(ZERO, place)
        with cgutils.for_range_slice(builder, n.type(0), n, n.type(LANES), n.type) as (i, _):
            a = build_read(builder, builder.gep(x_data, [i]))
            for row, place in zip(rows, sums, strict=True):
                b = build_read(builder, builder.gep(row, [i]))
                builder.store(build_fmuladd(builder, a, b, builder.load(place)), place)
        parts = [build_halved(builder, builder.load(place)) for place in sums]
        while len(parts) > 1:
            parts = [build_neighbours(builder, a, b, 8) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        build_write(builder, parts[0], build_pointer(context, builder, signature.args[6], out, o_out))
        return context.get_dummy_value()

    i = types.intp
    return types.void(checked(x), i, checked(w), i, i, i, checked(out), i), codegen


@intrinsic(prefer_literal=True)
def combine(
    typingctx: Any, vectors: Any, x: Any, o_x: Any, x_step: Any, w: Any, o_w: Any, w_step: Any, K: Any, out: Any,
    o_out: Any,
) -> Any:  # fmt: skip
    """out[o_out + j] += sum_k x[o_x + k x_step] w[o_w + k w_step + j] for j < 16 vectors, a literal.

    Even and odd k are added up apart, so that twice as many sums are under way. Arrays are float32 [..].
    """
    if not isinstance(vectors, types.IntegerLiteral):
        raise TypeError("vectors of a combination must be a literal")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, o_x, x_step, w, o_w, w_step, K, out, o_out = values[1:]
        index = K.type
        x_data = build_pointer(context, builder, signature.args[1], x, o_x)
        w_data = build_pointer(context, builder, signature.args[4], w, o_w)
        out_data = build_pointer(context, builder, signature.args[8], out, o_out)
        lanes = [index(v * LANES) for v in range(vectors.literal_value)]
        places = [builder.gep(out_data, [lane]) for lane in lanes]
        evens, odds = ([cgutils.alloca_once(builder, VECTOR) for _ in lanes] for _ in range(2))
        for place, even, odd in zip(places, evens, odds, strict=True):
            builder.store(build_read(builder, place), even)
            builder.store(ZERO, odd)

        def step(k: Any, sums: list[Any]) -> None:
            factor = build_splat(builder, builder.load(builder.gep(x_data, [builder.mul(k, x_step)])))
            row = builder.gep(w_data, [builder.mul(k, w_step)])
            for lane, place in zip(lanes, sums, strict=True):
                weight = build_read(builder, builder.gep(row, [lane]))
                builder.store(build_fmuladd(builder, factor, weight, builder.load(place)), place)

        whole = builder.and_(K, index(-2))
        with cgutils.for_range_slice(builder, index(0), whole, index(2), index) as (k, _):
            step(k, evens)
            step(builder.add(k, index(1)), odds)
        with builder.if_then(builder.icmp_signed("<", whole, K)):
            step(whole, evens)
        for place, even, odd in zip(places, evens, odds, strict=True):
            build_write(builder, builder.fadd(builder.load(even), builder.load(odd)), place)
        return context.get_dummy_value()

    i = types.intp
    return types.void(vectors, checked(x), i, i, checked(w), i, i, i, checked(out), i), codegen


@intrinsic(prefer_literal=True)
def tile(
    typingctx: Any, rows: Any, vectors: Any, x: Any, o_x: Any, x_row: Any, w: Any, o_w: Any, w_step: Any, w_vector: Any,
    K: Any, out: Any, o_out: Any, out_row: Any,
) -> Any:  # fmt: skip
    """out[o_out + r out_row + j] = sum_k x[o_x + r x_row + k] w_k[j], k = 0, 1, 2, ...

    For r < rows and j < 16 vectors, literals both. One accumulator an output, and fused multiply-adds in the order of
    k: how many rows and vectors a tile has changes no bit.
    x and out are float32 [..]. Vector v of w_k begins at o_w + v w_vector + k w_step where w is float32 [..]; where it
    is uint32, it is half of what begins at o_w + v w_vector + (k // 2) w_step: the bits of two bfloat16, for even k in
    the lower half. So two steps of k lie in one element, and it takes one operation to widen either. Where it is int32,
    it is a quarter of what begins at o_w + v w_vector + (k // 4) w_step, a signed byte, the lowest for the first k; K
    is a multiple of four.
    Where x is uint32, too, k counts pairs, and VDPBF16PS multiplies and adds up both of one at once.
    """
    literals = (rows, vectors)
    if not all(isinstance(number, types.IntegerLiteral) for number in literals):
        raise TypeError("rows and vectors of a tile must be literals")
    R, V = (number.literal_value for number in literals)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, o_x, x_row, w, o_w, w_step, w_vector, K, out, o_out, out_row = values[2:]
        index = K.type
        x_data = build_pointer(context, builder, signature.args[2], x, o_x)
        w_data = build_pointer(context, builder, signature.args[5], w, o_w)
        paired = signature.args[2].dtype == types.uint32
        out_data = build_pointer(context, builder, signature.args[10], out, o_out)
        x_rows = [builder.gep(x_data, [builder.mul(x_row, index(r))]) for r in range(R)]
        w_vectors = [builder.gep(w_data, [builder.mul(w_vector, index(v))]) for v in range(V)]
        cells = [(r, v) for r in range(R) for v in range(V)]
        places = {
            (r, v): builder.gep(out_data, [builder.add(builder.mul(out_row, index(r)), index(v * LANES))])
            for r, v in cells
        }
        sums = {cell: cgutils.alloca_once(builder, VECTOR) for cell in cells}  # registers, after LLVM's passes

        multiply = build_dot_pairs if paired else build_fmuladd

        def step(k: Any, weights: list[Any]) -> None:
            factors = [build_splat(builder, builder.load(builder.gep(x_row, [k]))) for x_row in x_rows]
            for v in range(V):
                for r in range(R):
                    place = sums[r, v]
                    builder.store(multiply(builder, factors[r], weights[v], builder.load(place)), place)

        def bits_of(k: Any, in_one: int) -> list[Any]:
            at = builder.mul(builder.udiv(k, index(in_one)), w_step)
            return [build_read(builder, builder.gep(vector, [at]), WHOLE) for vector in w_vectors]

        for cell in cells:
            builder.store(ZERO, sums[cell])
        if signature.args[5].dtype == types.uint32 and not paired:
            even = builder.and_(K, index(-2))
            with cgutils.for_range_slice(builder, index(0), even, index(2), index) as (k, _):
                both = bits_of(k, 2)
                step(k, [build_low(builder, pair) for pair in both])
                step(builder.add(k, index(1)), [build_high(builder, pair) for pair in both])
            with builder.if_then(builder.icmp_signed("<", even, K)):
                step(even, [build_low(builder, pair) for pair in bits_of(even, 2)])
        elif signature.args[5].dtype == types.int32:
            with cgutils.for_range_slice(builder, index(0), K, index(4), index) as (k, _):
                fours = bits_of(k, 4)
                for place in range(4):
                    step(builder.add(k, index(place)), [build_byte(builder, four, place) for four in fours])
        else:
            with cgutils.for_range(builder, K, intp=index) as loop:
                at = builder.mul(loop.index, w_step)
                step(loop.index, [build_read(builder, builder.gep(vector, [at])) for vector in w_vectors])
        for cell in cells:
            build_write(builder, builder.load(sums[cell]), places[cell])
        return context.get_dummy_value()

    i = types.intp
    activations = x if x.dtype == types.uint32 else checked(x)
    return types.void(*literals, activations, i, i, w, i, i, i, i, checked(out), i, i), codegen

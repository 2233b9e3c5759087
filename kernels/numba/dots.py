"""The products that Numba kernels are made of, as intrinsics: dot products, sums of lines, tiles of a matrix product.

Their arguments are plain values, up to twelve: they become operands of instructions in the innermost loops, where a
tuple of arrays would count references. An array begins where it is wanted: `vector.pointer` moves it there.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lattice_serve.kernels.numba.features import vectors
from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.lowering import (
    F32,
    VECTOR,
    WHOLE,
    ZERO,
    build_begin,
    build_byte,
    build_dot_pairs,
    build_fmuladd,
    build_high,
    build_low,
    build_read,
    build_splat,
    build_tree,
    build_write,
    checked,
)
from lattice_serve.kernels.numba.vector import vector

_AT_ONCE = 16 if vectors() == "AVX-512" else 4
"""Dots that are under way at once: half of the registers. Makes no difference to any bit."""


def _build_sums(builder: Any, pairs: list[tuple[Any, ...]], n: Any) -> list[Any]:
    """sum_i a[16 i ..] b[16 i ..], a vector, of each pair (a, b) of places of n floats; a place is loaded once."""
    index, sums = n.type, [cgutils.alloca_once(builder, VECTOR) for _ in pairs]
    for place in sums:
        builder.store(ZERO, place)
    with cgutils.for_range_slice(builder, index(0), n, index(LANES), index) as (i, _):
        lines = {line: build_read(builder, builder.gep(line, [i])) for pair in pairs for line in pair}
        for (a, b), place in zip(pairs, sums, strict=True):
            builder.store(build_fmuladd(builder, lines[a], lines[b], builder.load(place)), place)
    return [builder.load(place) for place in sums]


@intrinsic(prefer_literal=True)
def dots(typingctx: Any, rows: Any, x: Any, x_row: Any, w: Any, w_row: Any, n: Any) -> Any:
    """Returns sum_i x[r x_row + i] w[r w_row + i] for i < n, a multiple of 16, and r < rows, a literal: 1, 4 or 16.

    Row r's is in 16 / rows lanes from lane 16 / rows r on. However many rows there are, one's lanes are added up in the
    same order: those that are 8 apart, then 4, 2 and 1. x and w are float32 [..].
    """
    if not isinstance(rows, types.IntegerLiteral):
        raise TypeError("rows of dots must be a literal")
    R = rows.literal_value

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_row, w, w_row, n = values[1:]
        index = n.type
        x_data = build_begin(context, builder, signature.args[1], x)
        w_data = build_begin(context, builder, signature.args[3], w)
        parts, groups = [], max(1, R // _AT_ONCE)
        for first in range(groups):
            rows = [index(r) for r in range(first, R, groups)]
            x_rows = [builder.gep(x_data, [builder.mul(x_row, r)]) for r in rows]
            w_rows = [builder.gep(w_data, [builder.mul(w_row, r)]) for r in rows]
            sums = _build_sums(builder, list(zip(x_rows, w_rows, strict=True)), n)
            parts.append(build_tree(builder, sums, LANES // 2))
        apart = LANES * groups // (2 * R)
        return build_tree(builder, parts, apart, down_to=1)

    i = types.intp
    return vector(rows, checked(x), i, checked(w), i, i), codegen


@intrinsic(prefer_literal=True)
def cross_dots(typingctx: Any, rows: Any, x: Any, x_row: Any, w: Any, w_row: Any, n: Any, out: Any) -> Any:
    """out[r x_row + j] = sum_i x[r x_row + i] w[j w_row + i], i < n, a multiple of 16, j < 16.

    For r < rows, a literal, which changes no bit: each is added up as `dots` does. Arrays are float32 [..].
    """
    (R,) = _literals(rows)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_row, w, w_row, n, out = values[1:]
        arrays = (1, x), (3, w), (6, out)
        x_data, w_data, out_data = (build_begin(context, builder, signature.args[i], array) for i, array in arrays)
        at = [builder.mul(x_row, x_row.type(r)) for r in range(R)]
        x_rows = [builder.gep(x_data, [each]) for each in at]
        parts: list[list[Any]] = [[] for _ in x_rows]
        groups = 1 << (-(-R * LANES // _AT_ONCE) - 1).bit_length()  # a power of two, for the tree
        for first in range(groups):
            w_rows = [builder.gep(w_data, [builder.mul(w_row, w_row.type(j))]) for j in range(first, LANES, groups)]
            sums = _build_sums(builder, [(a, b) for a in x_rows for b in w_rows], n)
            for r, part in enumerate(parts):
                part.append(build_tree(builder, sums[r * len(w_rows) : (r + 1) * len(w_rows)], LANES // 2))
        for each, part in zip(at, parts, strict=True):
            build_write(builder, build_tree(builder, part, groups // 2, down_to=1), builder.gep(out_data, [each]))
        return context.get_dummy_value()

    i = types.intp
    return types.void(rows, checked(x), i, checked(w), i, i, checked(out)), codegen


def _build_combination(
    builder: Any, first: list[list[Any]], x_rows: list[Any], x_step: Any, w: Any, w_step: Any, K: Any, chains: int
) -> list[list[Any]]:
    """first[r][v] + sum_k x_rows[r][k x_step] w[k w_step + 16 v ..], vectors, in so many chains: `combine` says how."""
    index, V = K.type, len(first[0])
    sums = [[[cgutils.alloca_once(builder, VECTOR) for _ in line] for line in first] for _ in range(chains)]
    for chain in sums:
        for line, places in zip(first, chain, strict=True):
            for value, place in zip(line, places, strict=True):
                builder.store(value if chain is sums[0] else ZERO, place)

    def step(k: Any, chain: list[list[Any]]) -> None:
        row = builder.gep(w, [builder.mul(k, w_step)])
        weights = [build_read(builder, builder.gep(row, [index(v * LANES)])) for v in range(V)]
        for x_row, places in zip(x_rows, chain, strict=True):
            factor = build_splat(builder, builder.load(builder.gep(x_row, [builder.mul(k, x_step)])))
            for weight, place in zip(weights, places, strict=True):
                builder.store(build_fmuladd(builder, factor, weight, builder.load(place)), place)

    whole = K
    if chains > 1:
        whole = builder.mul(builder.udiv(K, index(chains)), index(chains))
    with cgutils.for_range_slice(builder, index(0), whole, index(chains), index) as (k, _):
        for i, chain in enumerate(sums):
            step(builder.add(k, index(i)), chain)
    if chains > 1:
        with cgutils.for_range_slice(builder, whole, K, index(1), index) as (k, _):
            step(k, sums[0])
    totals = [[builder.load(place) for place in places] for places in sums[0]]
    for chain in sums[1:]:
        totals = [
            [builder.fadd(total, builder.load(place)) for total, place in zip(line, places, strict=True)]
            for line, places in zip(totals, chain, strict=True)
        ]
    return totals


def _build_places(builder: Any, out: Any, out_row: Any, rows: int, vectors: int) -> list[list[Any]]:
    """Of [rows, 16 vectors] of out."""
    lines = [builder.gep(out, [builder.mul(out_row, out_row.type(r))]) for r in range(rows)]
    return [[builder.gep(line, [out_row.type(v * LANES)]) for v in range(vectors)] for line in lines]


def _build_writes(builder: Any, lines: list[list[Any]], places: list[list[Any]]) -> None:
    for line, line_places in zip(lines, places, strict=True):
        for value, place in zip(line, line_places, strict=True):
            build_write(builder, value, place)


def _literals(*numbers: Any) -> Any:
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        raise TypeError("rows, vectors and chains must be literals")
    return (number.literal_value for number in numbers)


@intrinsic(prefer_literal=True)
def combine(
    typingctx: Any, rows: Any, vectors: Any, chains: Any, x: Any, x_row: Any, x_step: Any, w: Any, w_step: Any, K: Any,
    out: Any, out_row: Any,
) -> Any:  # fmt: skip
    """out[r out_row + j] += sum_k x[r x_row + k x_step] w[k w_step + j].

    For r < rows and j < 16 vectors. chains: so many k that follow each other are added up apart, so that more sums are
    under way. Rows and vectors change no bit, chains do; all three are literals. Arrays are float32 [..].
    """
    R, V, P = _literals(rows, vectors, chains)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_row, x_step, w, w_step, K, out, out_row = values[3:]
        x_data = build_begin(context, builder, signature.args[3], x)
        w_data = build_begin(context, builder, signature.args[6], w)
        places = _build_places(builder, build_begin(context, builder, signature.args[9], out), out_row, R, V)
        x_rows = [builder.gep(x_data, [builder.mul(x_row, x_row.type(r))]) for r in range(R)]
        first = [[build_read(builder, place) for place in line] for line in places]
        sums = _build_combination(builder, first, x_rows, x_step, w_data, w_step, K, P)
        _build_writes(builder, sums, places)
        return context.get_dummy_value()

    i = types.intp
    return types.void(rows, vectors, chains, checked(x), i, i, checked(w), i, i, checked(out), i), codegen


@intrinsic(prefer_literal=True)
def fold(
    typingctx: Any, vectors: Any, b: Any, x: Any, y: Any, c: Any, c_step: Any, h: Any, h_step: Any, K: Any, A: Any,
    A_row: Any,
) -> Any:  # fmt: skip
    """A[r A_row + j] <- (1 - b[r]) A[r A_row + j] + x[r] y[j] + sum_k c[k c_step + r] h[k h_step + j].

    For r < 4 and j < 16 vectors, a literal, which changes no bit. Arrays are float32 [..].
    """
    (V,) = _literals(vectors)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        b, x, y, c, c_step, h, h_step, K, A, A_row = values[1:]
        arrays = zip((1, 2, 3, 4, 6, 9), (b, x, y, c, h, A), strict=True)
        b, x, y, c, h, A = (build_begin(context, builder, signature.args[i], array) for i, array in arrays)
        index, first = K.type, []
        ys = [build_read(builder, builder.gep(y, [index(v * LANES)])) for v in range(V)]
        places = _build_places(builder, A, A_row, 4, V)
        for r, line in enumerate(places):
            lost, factor = (builder.load(builder.gep(each, [index(r)])) for each in (b, x))
            kept, factor = (build_splat(builder, each) for each in (builder.fsub(F32(1), lost), factor))
            whole = [builder.fmul(kept, build_read(builder, place)) for place in line]
            first.append([build_fmuladd(builder, factor, *pair) for pair in zip(ys, whole, strict=True)])
        c_rows = [builder.gep(c, [index(r)]) for r in range(4)]
        _build_writes(builder, _build_combination(builder, first, c_rows, c_step, h, h_step, K, 1), places)
        return context.get_dummy_value()

    i = types.intp
    b, x, y, c, h, A = map(checked, (b, x, y, c, h, A))
    return types.void(vectors, b, x, y, c, i, h, i, i, A, i), codegen


@intrinsic(prefer_literal=True)
def tile(
    typingctx: Any, rows: Any, vectors: Any, x: Any, x_row: Any, w: Any, w_step: Any, w_vector: Any, K: Any, out: Any,
    out_row: Any,
) -> Any:  # fmt: skip
    """out[r out_row + j] = sum_k x[r x_row + k] w_k[j], k = 0, 1, 2, ...

    For r < rows and j < 16 vectors, literals both. One accumulator an output, and fused multiply-adds in the order of
    k: how many rows and vectors a tile has changes no bit.
    x and out are float32 [..]. Vector v of w_k begins at v w_vector + k w_step where w is float32 [..]; where it is
    uint32, it is half of what begins at v w_vector + (k // 2) w_step: the bits of two bfloat16, for even k in the lower
    half. So two steps of k lie in one element, and it takes one operation to widen either. Where it is int32, it is a
    quarter of what begins at v w_vector + (k // 4) w_step, a signed byte, the lowest for the first k; K is a multiple
    of four.
    Where x is uint32, too, k counts pairs, and VDPBF16PS multiplies and adds up both of one at once.
    """
    literals = (rows, vectors)
    if not all(isinstance(number, types.IntegerLiteral) for number in literals):
        raise TypeError("rows and vectors of a tile must be literals")
    R, V = (number.literal_value for number in literals)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_row, w, w_step, w_vector, K, out, out_row = values[2:]
        index = K.type
        x_data = build_begin(context, builder, signature.args[2], x)
        w_data = build_begin(context, builder, signature.args[4], w)
        paired = signature.args[2].dtype == types.uint32
        out_data = build_begin(context, builder, signature.args[8], out)
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
        if signature.args[4].dtype == types.uint32 and not paired:
            even = builder.and_(K, index(-2))
            with cgutils.for_range_slice(builder, index(0), even, index(2), index) as (k, _):
                both = bits_of(k, 2)
                step(k, [build_low(builder, pair) for pair in both])
                step(builder.add(k, index(1)), [build_high(builder, pair) for pair in both])
            with builder.if_then(builder.icmp_signed("<", even, K)):
                step(even, [build_low(builder, pair) for pair in bits_of(even, 2)])
        elif signature.args[4].dtype == types.int32:
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
    return types.void(*literals, activations, i, w, i, i, i, checked(out), i), codegen

"""Sixteen floats at a time in Numba kernels: a vector type, its arithmetic, and the two products everything is made of.

LLVM gives a vector of 16 the registers that there are: one of AVX-512, two of AVX2, four of NEON. Nothing is reordered
or fused unless it is written so, which makes a result the same bits wherever in a kernel, and for however many rows, it
is worked out.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from lattice_serve.kernels.lanes import LANES

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VECTOR, _WHOLE = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


class _Vector(types.Type):
    pass


_vector = _Vector(name="float32x16")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _lowered(function: Any, arguments: int, build: Any) -> None:
    """`function`, a Python operator, of so many vectors is `build(builder, *vectors)`."""

    @type_callable(function)
    def typing(context: Any) -> Any:
        return lambda *given: _vector if given == (_vector,) * arguments else None

    @lower_builtin(function, *[_Vector] * arguments)
    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build(builder, *values)


for _operators, _instruction in (
    ((operator.add, operator.iadd), ir.IRBuilder.fadd),
    ((operator.sub, operator.isub), ir.IRBuilder.fsub),
    ((operator.mul, operator.imul), ir.IRBuilder.fmul),
    ((operator.truediv, operator.itruediv), ir.IRBuilder.fdiv),
):
    for _operator in _operators:
        _lowered(_operator, 2, _instruction)
_lowered(operator.neg, 1, ir.IRBuilder.fneg)


def _elementwise(build: Any, arguments: int) -> Any:
    """What an intrinsic of vectors returns."""
    return _vector(*[_vector] * arguments), lambda context, builder, signature, values: build(builder, *values)


def _llvm(name: str, arguments: int) -> Any:
    """LLVM's own function of vectors."""

    def build(builder: Any, *values: Any) -> Any:
        full = f"llvm.{name}.v{LANES}f32"
        known = builder.module.globals.get(full)
        function = known or ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * arguments), full)
        return builder.call(function, values)

    return build


_fmuladd = _llvm("fmuladd", 3)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can."""
    return _elementwise(_fmuladd, 3)


@intrinsic
def sqrt(typingctx: Any, a: Any) -> Any:
    return _elementwise(_llvm("sqrt", 1), 1)


@intrinsic
def floor(typingctx: Any, a: Any) -> Any:
    return _elementwise(_llvm("floor", 1), 1)


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger; b where either is NaN."""
    return _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), 2)


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller; b where either is NaN."""
    return _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), 2)


@intrinsic
def unless_nan(typingctx: Any, value: Any, x: Any) -> Any:
    """value, but x where x is NaN."""
    return _elementwise(lambda builder, value, x: builder.select(builder.fcmp_unordered("uno", x, x), x, value), 2)


@intrinsic
def power_of_two(typingctx: Any, n: Any) -> Any:
    """2^n of whole n from -126 to 127."""

    def build(builder: Any, n: Any) -> Any:
        exponent = builder.add(builder.fptosi(n, _WHOLE), ir.Constant(_WHOLE, [127] * LANES))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_WHOLE, [23] * LANES)), _VECTOR)

    return _elementwise(build, 1)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A float32 in every lane."""
    return _vector(types.float32), lambda context, builder, signature, values: _splat(builder, *values)


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """Elements `offset` to `offset + 16` of a float32 array [n]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _read(builder, _pointer(context, builder, signature.args[0], *values))

    return _vector(_checked(array), types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector to elements `offset` to `offset + 16` of a float32 array [n]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, offset, value = values
        _write(builder, value, _pointer(context, builder, signature.args[0], array, offset))
        return context.get_dummy_value()

    return types.void(_checked(array), types.intp, _vector), codegen


@intrinsic
def store_bf16(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector, rounded to the nearest bfloat16 (even on a tie), from element `offset` of an array on.

    The array is uint16 [..] with the bits of one in an element, or uint32 [..] with two.
    """
    if array.dtype not in (types.uint16, types.uint32):
        raise TypeError(f"bits of bfloat16 lie in a uint16 or uint32 array, not in {array}")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, offset, value = values
        _write(builder, _rounded(builder, value), _pointer(context, builder, signature.args[0], array, offset), 2)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), codegen


@intrinsic
def pairs(typingctx: Any, even: Any, odd: Any) -> Any:
    """The bits of two vectors of whole bfloat16 in one: those of even in the lower halves."""
    return _elementwise(build_pairs, 2)


@intrinsic
def total(typingctx: Any, v: Any) -> Any:
    """Sum of the lanes: the halves, then neighbours, and neighbours again."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = _halved(builder, values[0])
        for lanes in (8, 4, 2):
            v = _neighbours(builder, v, ir.Constant(v.type, ir.Undefined), lanes // 2)
        return builder.extract_element(v, ir.Constant(_I32, 0))

    return types.float32(_vector), codegen


@intrinsic
def first(typingctx: Any, v: Any) -> Any:
    """The first lane."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(values[0], ir.Constant(_I32, 0))

    return types.float32(_vector), codegen


@intrinsic
def eight_dots(typingctx: Any, x: Any, o_x: Any, w: Any, o_w: Any, w_row: Any, n: Any, out: Any, o_out: Any) -> Any:
    """out[o_out + r] = sum_i x[o_x + i] w[o_w + r w_row + i] for r < 8 and i < n, a multiple of 16.

    Arrays are float32 [..]. Lanes are added up as `total` does.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, o_x, w, o_w, w_row, n, out, o_out = values
        x_data = _pointer(context, builder, signature.args[0], x, o_x)
        w_data = _pointer(context, builder, signature.args[2], w, o_w)
        rows = [builder.gep(w_data, [builder.mul(w_row, w_row.type(r))]) for r in range(8)]
        sums = [cgutils.alloca_once_value(builder, _ZERO) for _ in rows]
        for place in sums:
            builder.store(_ZERO, place)
        with cgutils.for_range_slice(builder, n.type(0), n, n.type(LANES), n.type) as (i, _):
            a = _read(builder, builder.gep(x_data, [i]))
            for row, place in zip(rows, sums, strict=True):
                b = _read(builder, builder.gep(row, [i]))
                builder.store(_fmuladd(builder, a, b, builder.load(place)), place)
        parts = [_halved(builder, builder.load(place)) for place in sums]
        while len(parts) > 1:
            parts = [_neighbours(builder, a, b, 8) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        _write(builder, parts[0], _pointer(context, builder, signature.args[6], out, o_out))
        return context.get_dummy_value()

    i = types.intp
    return types.void(_checked(x), i, _checked(w), i, i, i, _checked(out), i), codegen


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
        x_data = _pointer(context, builder, signature.args[1], x, o_x)
        w_data = _pointer(context, builder, signature.args[4], w, o_w)
        out_data = _pointer(context, builder, signature.args[8], out, o_out)
        lanes = [index(v * LANES) for v in range(vectors.literal_value)]
        places = [builder.gep(out_data, [lane]) for lane in lanes]
        evens, odds = ([cgutils.alloca_once(builder, _VECTOR) for _ in lanes] for _ in range(2))
        for place, even, odd in zip(places, evens, odds, strict=True):
            builder.store(_read(builder, place), even)
            builder.store(_ZERO, odd)

        def step(k: Any, sums: list[Any]) -> None:
            factor = _splat(builder, builder.load(builder.gep(x_data, [builder.mul(k, x_step)])))
            row = builder.gep(w_data, [builder.mul(k, w_step)])
            for lane, place in zip(lanes, sums, strict=True):
                weight = _read(builder, builder.gep(row, [lane]))
                builder.store(_fmuladd(builder, factor, weight, builder.load(place)), place)

        whole = builder.and_(K, index(-2))
        with cgutils.for_range_slice(builder, index(0), whole, index(2), index) as (k, _):
            step(k, evens)
            step(builder.add(k, index(1)), odds)
        with builder.if_then(builder.icmp_signed("<", whole, K)):
            step(whole, evens)
        for place, even, odd in zip(places, evens, odds, strict=True):
            _write(builder, builder.fadd(builder.load(even), builder.load(odd)), place)
        return context.get_dummy_value()

    i = types.intp
    return types.void(vectors, _checked(x), i, i, _checked(w), i, i, i, _checked(out), i), codegen


@intrinsic(prefer_literal=True)
def tile(
    typingctx: Any, rows: Any, vectors: Any, x: Any, o_x: Any, x_row: Any, w: Any, o_w: Any, w_step: Any, w_vector: Any,
    K: Any, out: Any, o_out: Any, out_row: Any,
) -> Any:  # fmt: skip
    """out[o_out + r out_row + j] = sum_k x[o_x + r x_row + k] w_k[j], k = 0, 1, 2, ...

    For r < rows and j < 16 vectors, literals both. One accumulator an output, and fused multiply-adds in the order of
    k: how many rows and vectors a tile has changes no bit.
    x and out are float32 [..]. Vector v of w_k begins at o_w + v w_vector + k w_step where w is float32 or int8 [..];
    where it is uint32, it is half of what begins at o_w + v w_vector + (k // 2) w_step: the bits of two bfloat16, for
    even k in the lower half. So two steps of k lie in one element, and it takes one operation to widen either.
    Where x is uint32, too, k counts pairs, and VDPBF16PS multiplies and adds up both of one at once.
    """
    literals = (rows, vectors)
    if not all(isinstance(number, types.IntegerLiteral) for number in literals):
        raise TypeError("rows and vectors of a tile must be literals")
    R, V = (number.literal_value for number in literals)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, o_x, x_row, w, o_w, w_step, w_vector, K, out, o_out, out_row = values[2:]
        index = K.type
        x_data = _pointer(context, builder, signature.args[2], x, o_x)
        w_data = _pointer(context, builder, signature.args[5], w, o_w)
        paired = signature.args[2].dtype == types.uint32
        out_data = _pointer(context, builder, signature.args[10], out, o_out)
        x_rows = [builder.gep(x_data, [builder.mul(x_row, index(r))]) for r in range(R)]
        w_vectors = [builder.gep(w_data, [builder.mul(w_vector, index(v))]) for v in range(V)]
        cells = [(r, v) for r in range(R) for v in range(V)]
        places = {
            (r, v): builder.gep(out_data, [builder.add(builder.mul(out_row, index(r)), index(v * LANES))])
            for r, v in cells
        }
        sums = {cell: cgutils.alloca_once(builder, _VECTOR) for cell in cells}  # registers, after LLVM's passes

        multiply = _dot_pairs if paired else _fmuladd

        def step(k: Any, weights: list[Any]) -> None:
            factors = [_splat(builder, builder.load(builder.gep(x_row, [k]))) for x_row in x_rows]
            for v in range(V):
                for r in range(R):
                    place = sums[r, v]
                    builder.store(multiply(builder, factors[r], weights[v], builder.load(place)), place)

        def both_of(k: Any) -> list[Any]:
            at = builder.mul(builder.lshr(k, index(1)), w_step)
            return [_read(builder, builder.gep(vector, [at]), _WHOLE) for vector in w_vectors]

        for cell in cells:
            builder.store(_ZERO, sums[cell])
        if signature.args[5].dtype == types.uint32 and not paired:
            even = builder.and_(K, index(-2))
            with cgutils.for_range_slice(builder, index(0), even, index(2), index) as (k, _):
                both = both_of(k)
                step(k, [_low(builder, pair) for pair in both])
                step(builder.add(k, index(1)), [_high(builder, pair) for pair in both])
            with builder.if_then(builder.icmp_signed("<", even, K)):
                step(even, [_low(builder, pair) for pair in both_of(even)])
        else:
            with cgutils.for_range(builder, K, intp=index) as loop:
                at = builder.mul(loop.index, w_step)
                weights = [builder.gep(vector, [at]) for vector in w_vectors]
                step(loop.index, [(_read if paired else build_widened)(builder, place) for place in weights])
        for cell in cells:
            _write(builder, builder.load(sums[cell]), places[cell])
        return context.get_dummy_value()

    i = types.intp
    activations = x if x.dtype == types.uint32 else _checked(x)
    return types.void(*literals, activations, i, i, w, i, i, i, i, _checked(out), i, i), codegen


@intrinsic
def widened(typingctx: Any, w: Any, offset: Any) -> Any:
    """Elements `offset` to `offset + 16` of w [..] as float32: float32, int8, or uint16 with the bits of bfloat16."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build_widened(builder, _pointer(context, builder, signature.args[0], *values))

    return _vector(w, types.intp), codegen


def build_pairs(builder: Any, even: Any, odd: Any) -> Any:
    """`pairs` in LLVM's language."""
    low = builder.lshr(builder.bitcast(even, _WHOLE), ir.Constant(_WHOLE, [16] * LANES))
    return builder.bitcast(builder.or_(builder.bitcast(odd, _WHOLE), low), _VECTOR)


def build_widened(builder: Any, pointer: Any) -> Any:
    """`widened` in LLVM's language."""
    element = pointer.type.pointee
    if element == _F32:
        return _read(builder, pointer)
    values = _read(builder, pointer, ir.VectorType(element, LANES), align=1)
    if element.width == 8:
        return builder.sitofp(builder.sext(values, _WHOLE), _VECTOR)
    return builder.bitcast(builder.shl(builder.zext(values, _WHOLE), ir.Constant(_WHOLE, [16] * LANES)), _VECTOR)


def _checked(array: Any) -> Any:
    if not (isinstance(array, types.Array) and array.ndim == 1 and array.dtype == types.float32):
        raise TypeError(f"a vector lies in a float32 array [n], not in {array}")
    return array


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _read(builder: Any, pointer: Any, typ: Any = _VECTOR, align: int = 4) -> Any:
    return builder.load(builder.bitcast(pointer, typ.as_pointer()), align=align)


def _write(builder: Any, value: Any, pointer: Any, align: int = 4) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def _rounded(builder: Any, v: Any) -> Any:
    """The bits of the nearest bfloat16, <16 x i16>; a NaN stays one."""
    one, half, high, nan = (ir.Constant(_WHOLE, [n] * LANES) for n in (1, 0x7FFF, 16, 0x7FC00000))
    bits = builder.bitcast(v, _WHOLE)
    odd = builder.and_(builder.lshr(bits, high), one)
    nearest = builder.add(bits, builder.add(odd, half))
    kept = builder.select(builder.fcmp_unordered("uno", v, v), nan, nearest)
    return builder.trunc(builder.lshr(kept, high), ir.VectorType(ir.IntType(16), LANES))


def _dot_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """c plus the products of both halves of each lane, bfloat16."""
    full = "llvm.x86.avx512bf16.dpbf16ps.512"
    kind = ir.FunctionType(_VECTOR, [_VECTOR, _WHOLE, _WHOLE])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, [c, builder.bitcast(a, _WHOLE), builder.bitcast(b, _WHOLE)])


def _low(builder: Any, pair: Any) -> Any:
    return builder.bitcast(builder.shl(pair, ir.Constant(_WHOLE, [16] * LANES)), _VECTOR)


def _high(builder: Any, pair: Any) -> Any:
    return builder.bitcast(builder.and_(pair, ir.Constant(_WHOLE, [-65536] * LANES)), _VECTOR)


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _splat(builder: Any, value: Any) -> Any:
    """A float32, or the bits of one, in every lane."""
    value = builder.bitcast(value, _F32)
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return _shuffled(builder, builder.insert_element(undefined, value, ir.Constant(_I32, 0)), undefined, [0] * LANES)


def _halved(builder: Any, v: Any) -> Any:
    """Lower and upper half added."""
    low, high = (_shuffled(builder, v, v, list(range(first, first + 8))) for first in (0, 8))
    return builder.fadd(low, high)


def _neighbours(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """Sums of neighbours in a and b, one after the other: the first so many."""
    even, odd = (_shuffled(builder, a, b, [2 * i + first for i in range(lanes)]) for first in (0, 1))
    return builder.fadd(even, odd)

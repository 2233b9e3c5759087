"""Sixteen floats at a time in Numba kernels: a vector type and its arithmetic.

LLVM gives a vector of 16 the registers that there are: one of AVX-512, two of AVX2, four of NEON. Nothing is reordered
or fused unless it is written so, which makes a result the same bits wherever in a kernel, and for however many rows, it
is worked out.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from lattice_serve.kernels.numba.lanes import LANES
from lattice_serve.kernels.numba.lowering import (
    F32,
    I32,
    VECTOR,
    WHOLE,
    build_fmuladd,
    build_halved,
    build_inverse,
    build_inverse_sqrt,
    build_neighbours,
    build_pointer,
    build_prefetch,
    build_read,
    build_rounded,
    build_splat,
    build_widened,
    build_write,
    checked,
    llvm_function,
)


class _Vector(types.Type):
    pass


vector = _Vector(name="float32x16")
"""The type of a vector."""


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


def _lowered(function: Any, arguments: int, build: Any) -> None:
    """`function`, a Python operator, of so many vectors is `build(builder, *vectors)`."""

    @type_callable(function)
    def typing(context: Any) -> Any:
        return lambda *given: vector if given == (vector,) * arguments else None

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
    return vector(*[vector] * arguments), lambda context, builder, signature, values: build(builder, *values)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can."""
    return _elementwise(build_fmuladd, 3)


@intrinsic
def inverse(typingctx: Any, x: Any) -> Any:
    """1 / x within 2 units in the last place, of x that is neither 0 nor infinite."""
    return _elementwise(build_inverse, 1)


@intrinsic
def inverse_sqrt(typingctx: Any, x: Any) -> Any:
    """1 / sqrt(x) within 2 units in the last place, of x that is neither 0 nor infinite."""
    return _elementwise(build_inverse_sqrt, 1)


@intrinsic
def sqrt(typingctx: Any, x: Any) -> Any:
    return _elementwise(llvm_function("sqrt", 1), 1)


@intrinsic
def floor(typingctx: Any, a: Any) -> Any:
    return _elementwise(llvm_function("floor", 1), 1)


@intrinsic
def nearest(typingctx: Any, a: Any) -> Any:
    """The nearest whole number, the even one on a tie."""
    return _elementwise(llvm_function("rint", 1), 1)


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger; b where either is NaN."""
    return _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), 2)


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller; b where either is NaN."""
    return _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), 2)


def _build_size(builder: Any, v: Any) -> Any:
    """The bits of |v|: whole numbers that are in the order of what they stand for, with NaN beyond all."""
    return builder.and_(builder.bitcast(v, WHOLE), ir.Constant(WHOLE, [0x7FFFFFFF] * LANES))


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of |a| and |b|; NaN where either is."""

    def build(builder: Any, a: Any, b: Any) -> Any:
        a, b = _build_size(builder, a), _build_size(builder, b)
        return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), VECTOR)

    return _elementwise(build, 2)


@intrinsic
def power_of_two(typingctx: Any, x: Any) -> Any:
    """The vector whose exponent, n + 127 of 2^n, is the lowest bits of x."""

    def build(builder: Any, x: Any) -> Any:
        return builder.bitcast(builder.shl(builder.bitcast(x, WHOLE), ir.Constant(WHOLE, [23] * LANES)), VECTOR)

    return _elementwise(build, 1)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A float32 in every lane."""
    return vector(types.float32), lambda context, builder, signature, values: build_splat(builder, *values)


@intrinsic
def pointer(typingctx: Any, array: Any, offset: Any) -> Any:
    """To an element of an array [n], which begins there for who gets it.

    A call with an array counts the array's references and hands over seven numbers; one with a pointer does not.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build_pointer(context, builder, signature.args[0], *values)

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def address(typingctx: Any, begin: Any) -> Any:
    """The address that a pointer has."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], ir.IntType(64))

    return types.intp(begin), codegen


@intrinsic
def pointer_to(typingctx: Any, begin: Any, kind: Any) -> Any:
    """The same pointer, to elements of another type, such as `np.int32`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(begin, kind), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line of an element of a float32 array [n] before it is read."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = build_pointer(context, builder, signature.args[0], *values)
        build_prefetch(builder, builder.bitcast(place, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(checked(array), types.intp), codegen


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """Elements `offset` to `offset + 16` of a float32 array [n]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build_read(builder, build_pointer(context, builder, signature.args[0], *values))

    return vector(checked(array), types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector to elements `offset` to `offset + 16` of a float32 array [n]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, offset, value = values
        build_write(builder, value, build_pointer(context, builder, signature.args[0], array, offset))
        return context.get_dummy_value()

    return types.void(checked(array), types.intp, vector), codegen


@intrinsic
def store_bf16(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector, rounded to the nearest bfloat16 (even on a tie), from element `offset` of an array on.

    The array is uint16 [..] with the bits of one in an element, or uint32 [..] with two.
    """
    if array.dtype not in (types.uint16, types.uint32):
        raise TypeError(f"bits of bfloat16 lie in a uint16 or uint32 array, not in {array}")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, offset, value = values
        build_write(
            builder, build_rounded(builder, value), build_pointer(context, builder, signature.args[0], array, offset), 2
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def store_int8(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a vector of whole numbers from -128 to 127 to elements `offset` to `offset + 16` of an int8 array [n]."""
    if array.dtype != types.int8:
        raise TypeError(f"int8 lie in an int8 array, not in {array}")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, offset, value = values
        whole = builder.trunc(builder.fptosi(value, WHOLE), ir.VectorType(ir.IntType(8), LANES))
        build_write(builder, whole, build_pointer(context, builder, signature.args[0], array, offset), 1)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def total(typingctx: Any, v: Any) -> Any:
    """Sum of the lanes: the halves, then neighbours, and neighbours again."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v = build_halved(builder, values[0])
        for lanes in (8, 4, 2):
            v = build_neighbours(builder, v, ir.Constant(v.type, ir.Undefined), lanes // 2)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return types.float32(vector), codegen


@intrinsic
def largest(typingctx: Any, v: Any) -> Any:
    """The largest of the lanes without their signs; NaN where one is."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        full = f"llvm.vector.reduce.smax.v{LANES}i32"
        known = builder.module.globals.get(full)
        function = known or ir.Function(builder.module, ir.FunctionType(I32, [WHOLE]), full)
        return builder.bitcast(builder.call(function, [_build_size(builder, values[0])]), F32)

    return types.float32(vector), codegen


@intrinsic
def first(typingctx: Any, v: Any) -> Any:
    """The first lane."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(values[0], ir.Constant(I32, 0))

    return types.float32(vector), codegen


@intrinsic
def widened(typingctx: Any, w: Any, offset: Any) -> Any:
    """Elements `offset` to `offset + 16` of w [..] as float32: float32, int32, or uint16 with the bits of bfloat16."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build_widened(builder, build_pointer(context, builder, signature.args[0], *values))

    return vector(w, types.intp), codegen

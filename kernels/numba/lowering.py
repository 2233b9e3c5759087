"""LLVM's instructions for what the intrinsics of `vector` and `products` have in common."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from lattice_serve.kernels.numba.features import has_vector_bf16, vectors
from lattice_serve.kernels.numba.lanes import LANES

F32, I32 = ir.FloatType(), ir.IntType(32)
VECTOR, WHOLE = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)


def llvm_function(name: str, arguments: int) -> Any:
    """LLVM's own function of vectors."""

    def build(builder: Any, *values: Any) -> Any:
        full = f"llvm.{name}.v{LANES}f32"
        known = builder.module.globals.get(full)
        function = known or ir.Function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * arguments), full)
        return builder.call(function, values)

    return build


build_fmuladd = llvm_function("fmuladd", 3)


def _build_estimate(builder: Any, name: str, x: Any) -> Any:
    """AVX-512's, within 2^-14 of itself."""
    full, lanes = f"llvm.x86.avx512.{name}14.ps.512", ir.IntType(LANES)
    kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, lanes])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, [x, ZERO, lanes(-1)])


def build_inverse(builder: Any, x: Any) -> Any:
    """`inverse` in LLVM's language: Newton's step after an estimate, where a division is as slow as ten of them."""
    one = ir.Constant(VECTOR, [1.0] * LANES)
    if vectors() != "AVX-512":
        return builder.fdiv(one, x)
    r = _build_estimate(builder, "rcp", x)
    lacking = build_fmuladd(builder, builder.fneg(x), r, one)
    return build_fmuladd(builder, r, lacking, r)


def build_inverse_sqrt(builder: Any, x: Any) -> Any:
    """`inverse_sqrt` in LLVM's language, in the same way."""
    one, half = (ir.Constant(VECTOR, [value] * LANES) for value in (1.0, 0.5))
    if vectors() != "AVX-512":
        return builder.fdiv(one, llvm_function("sqrt", 1)(builder, x))
    r = _build_estimate(builder, "rsqrt", x)
    lacking = build_fmuladd(builder, builder.fneg(builder.fmul(x, r)), r, one)
    return build_fmuladd(builder, builder.fmul(half, r), lacking, r)


def build_widened(builder: Any, pointer: Any) -> Any:
    """`widened` in LLVM's language."""
    element = pointer.type.pointee
    if element == F32:
        return build_read(builder, pointer)
    values = build_read(builder, pointer, ir.VectorType(element, LANES), align=1)
    if element.width == 32:
        return builder.sitofp(values, VECTOR)
    return builder.bitcast(builder.shl(builder.zext(values, WHOLE), ir.Constant(WHOLE, [16] * LANES)), VECTOR)


def checked(array: Any) -> Any:
    pointed = isinstance(array, types.CPointer) or (isinstance(array, types.Array) and array.ndim == 1)
    if not (pointed and array.dtype == types.float32):
        raise TypeError(f"a vector lies in a float32 array [n], not in {array}")
    return array


def build_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """To the element at `offset` of an array [n], or of what `vector.pointer` gives."""
    if isinstance(array_type, types.Array):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.gep(array, [offset])


def build_begin(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """To the first element of an array [n], or of what `vector.pointer` gives."""
    if isinstance(array_type, types.Array):
        return context.make_array(array_type)(context, builder, array).data
    return array


def build_read(builder: Any, pointer: Any, typ: Any = VECTOR, align: int = 4) -> Any:
    return builder.load(builder.bitcast(pointer, typ.as_pointer()), align=align)


def build_write(builder: Any, value: Any, pointer: Any, align: int = 4) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def build_x86(builder: Any, name: str, *arguments: Any) -> None:
    """Call LLVM's intrinsic of x86 of that name, which returns nothing."""
    full = f"llvm.x86.{name}"
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.module.globals.get(full) or ir.Function(builder.module, kind, full), arguments)


def build_ahead(builder: Any, at: Any, ahead: int, w_next: Any, strips: int) -> Any:
    """What to ask for `ahead` bytes before it is wanted, in each of so many strips that are w_next bytes apart.

    Behind the end of a strip lies what was read beside it: skip to the panel that comes next.
    """
    offset = builder.add(at, at.type(ahead))
    behind = builder.add(offset, builder.mul(w_next, at.type(strips - 1)))
    return builder.select(builder.icmp_signed("<", offset, w_next), offset, behind)


def build_prefetch(builder: Any, pointer: Any, level: int = 1) -> None:
    """Ask for the cache line there, into that cache; where there is no memory, nothing happens."""
    full = "llvm.prefetch.p0i8"
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    builder.call(function, [pointer, I32(0), I32(4 - level), I32(1)])  # to be read, data


class _BFloat(ir.Type):
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def build_rounded(builder: Any, v: Any) -> Any:
    """The bits of the nearest bfloat16, <16 x i16>; a NaN stays one.

    Where an instruction does it, denormal numbers become zeros, for which those that multiply bfloat16 take them.
    """
    halves = ir.VectorType(ir.IntType(16), LANES)
    if has_vector_bf16():
        return builder.bitcast(builder.fptrunc(v, ir.VectorType(_BFloat(), LANES)), halves)
    one, half, high, nan = (ir.Constant(WHOLE, [n] * LANES) for n in (1, 0x7FFF, 16, 0x7FC00000))
    bits = builder.bitcast(v, WHOLE)
    odd = builder.and_(builder.lshr(bits, high), one)
    nearest = builder.add(bits, builder.add(odd, half))
    kept = builder.select(builder.fcmp_unordered("uno", v, v), nan, nearest)
    return builder.trunc(builder.lshr(kept, high), halves)


def build_dot_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """c plus the products of both halves of each lane, bfloat16."""
    full = "llvm.x86.avx512bf16.dpbf16ps.512"
    kind = ir.FunctionType(VECTOR, [VECTOR, WHOLE, WHOLE])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, [c, builder.bitcast(a, WHOLE), builder.bitcast(b, WHOLE)])


def build_byte(builder: Any, fours: Any, place: int) -> Any:
    """Bytes of one place, 0 to 3, of <16 x i32> of four signed bytes each, as float32."""
    high = builder.shl(fours, ir.Constant(WHOLE, [24 - 8 * place] * LANES))
    return builder.sitofp(builder.ashr(high, ir.Constant(WHOLE, [24] * LANES)), VECTOR)


def build_dot_bytes(builder: Any, unsigned: Any, signed: Any, c: Any) -> Any:
    """c plus the products of the four bytes of each lane, all <16 x i32>."""
    full = "llvm.x86.avx512.vpdpbusd.512"
    kind = ir.FunctionType(WHOLE, [WHOLE] * 3)
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, [c, unsigned, signed])


def build_low(builder: Any, pair: Any) -> Any:
    return builder.bitcast(builder.shl(pair, ir.Constant(WHOLE, [16] * LANES)), VECTOR)


def build_high(builder: Any, pair: Any) -> Any:
    return builder.bitcast(builder.and_(pair, ir.Constant(WHOLE, [-65536] * LANES)), VECTOR)


def build_shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def build_splat(builder: Any, value: Any) -> Any:
    """A float32, or the bits of one, in every lane."""
    value = builder.bitcast(value, F32)
    undefined = ir.Constant(VECTOR, ir.Undefined)
    return build_shuffled(
        builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), undefined, [0] * LANES
    )


def build_halved(builder: Any, v: Any) -> Any:
    """Lower and upper half added."""
    low, high = (build_shuffled(builder, v, v, list(range(first, first + 8))) for first in (0, 8))
    return builder.fadd(low, high)


def build_neighbours(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """Sums of neighbours in a and b, one after the other: the first so many."""
    even, odd = (build_shuffled(builder, a, b, [2 * i + first for i in range(lanes)]) for first in (0, 1))
    return builder.fadd(even, odd)


def build_tree(builder: Any, parts: list[Any], apart: int, down_to: int = LANES) -> Any:
    """One vector of the lanes of 1, 2, 4, .. vectors, added up: those that are `apart`, then half as far, and so on.

    The first half of the vectors goes to lanes without the bit `apart`, the second to those with it. It goes on within
    one vector until lanes `down_to` apart are added, too: all that were added hold the sum then.
    """
    while len(parts) > 1 or apart >= down_to:
        half = -(-len(parts) // 2)
        parts = [_build_apart(builder, a, b, apart) for a, b in zip(parts[:half], parts[-half:], strict=True)]
        apart //= 2
    return parts[0]


def _build_apart(builder: Any, a: Any, b: Any, apart: int) -> Any:
    """In each lane, its own and that which is so far apart: of a in lanes without that bit, of b in those with it."""
    lanes = [lane + LANES if lane & apart else lane for lane in range(LANES)]
    return builder.fadd(build_shuffled(builder, a, b, lanes), build_shuffled(builder, a, b, [i ^ apart for i in lanes]))

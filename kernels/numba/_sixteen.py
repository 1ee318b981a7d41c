"""16-bit floats as integers hold them: int16 a half, uint16 a bfloat16, scalars or vectors.

Where the CPU has no instruction for a conversion LLVM would call a function that is not there, and
the process would end. Then integers do it.
"""

from llvmlite import ir
from llvmlite.ir.types import _BaseFloatType
from numba import types
from numba.core import cgutils

from tilewise.kernels.numba._lanes import FLOAT, HALF, X86, constant, has, wider
from tilewise.kernels.numba._parallel import INT16, INT32

KINDS = (types.int16, types.uint16)


class _BrainFloatType(_BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name: its fptrunc is 1.37 x integer rounding."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"


_BrainFloatType._create_instance()
BRAIN = _BrainFloatType()

ROUNDS_TO_BRAIN = has("avx512bf16") if X86 else has("bf16")
CONVERTS_HALVES = has("f16c") if X86 else True
# Where it has instructions for halves themselves, LLVM makes a sum of halves of one that is rounded
# to a half, and one operation of two: a number that is rounded in between would not be.
COMPUTES_HALVES = X86 and has("avx512fp16")


def widen(builder, kind, bits):
    """The fp32 that these bits stand for."""
    lanes = getattr(bits.type, "count", 1)
    if kind == types.int16 and CONVERTS_HALVES:
        return builder.fpext(builder.bitcast(bits, wider(HALF, lanes)), wider(FLOAT, lanes))
    wide = wider(INT32, lanes)
    bits = builder.zext(bits, wide)
    if kind == types.int16:
        bits = _half_widened(builder, bits)
    else:
        bits = builder.shl(bits, constant(wide, 16))
    return builder.bitcast(bits, wider(FLOAT, lanes))


def narrow(builder, kind, value):
    """The bits of an fp32 rounded to nearest, ties to even; a NaN stays one."""
    lanes = getattr(value.type, "count", 1)
    if kind == types.int16 and COMPUTES_HALVES:
        return _half_converted(builder, value, lanes)
    if kind == types.int16 and CONVERTS_HALVES:
        value = builder.fptrunc(value, wider(HALF, lanes))
    elif kind == types.uint16 and ROUNDS_TO_BRAIN:
        value = builder.fptrunc(value, wider(BRAIN, lanes))
    else:
        convert = _half_narrowed if kind == types.int16 else _brain_narrowed
        bits = convert(builder, builder.bitcast(value, wider(INT32, lanes)))
        return builder.trunc(bits, wider(INT16, lanes))
    return builder.bitcast(value, wider(INT16, lanes))


# --- By integers.


def _rounding(builder, bits, cut):
    """Half of the last bit that stays, less one where that is even."""
    one = constant(bits.type, 1)
    odd = builder.and_(builder.lshr(bits, constant(bits.type, cut)), one)
    return builder.add(odd, constant(bits.type, (1 << cut - 1) - 1))


def _brain_narrowed(builder, bits):
    t = bits.type
    rounded = builder.lshr(builder.add(bits, _rounding(builder, bits, 16)), constant(t, 16))
    magnitude = builder.and_(bits, constant(t, 0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, constant(t, 0x7F800000))
    nan = builder.or_(builder.lshr(bits, constant(t, 16)), constant(t, 0x40))
    return builder.select(is_nan, nan, rounded)


_SMALLEST, _TOO_LARGE = 0x38800000, 0x47800000  # fp32's bits of 2**-14 and 2**16
_BIAS = 112 << 23  # by which the exponents of fp32 are more


def _half_narrowed(builder, bits):
    t, real = bits.type, wider(FLOAT, getattr(bits.type, "count", 1))
    magnitude = builder.and_(bits, constant(t, 0x7FFFFFFF))
    rounded = builder.add(magnitude, _rounding(builder, magnitude, 13))
    normal = builder.lshr(builder.sub(rounded, constant(t, _BIAS)), constant(t, 13))
    # Added to 1/2, the last bit of a subnormal half is the last of fp32.
    half = builder.fadd(builder.bitcast(magnitude, real), constant(real, 0.5), flags=("nsz",))
    subnormal = builder.sub(builder.bitcast(half, t), constant(t, 0x3F000000))
    is_nan = builder.icmp_unsigned(">", magnitude, constant(t, 0x7F800000))
    beyond = builder.select(is_nan, constant(t, 0x7E00), constant(t, 0x7C00))
    is_small = builder.icmp_unsigned("<", magnitude, constant(t, _SMALLEST))
    is_large = builder.icmp_unsigned(">=", magnitude, constant(t, _TOO_LARGE))
    found = builder.select(is_large, beyond, builder.select(is_small, subnormal, normal))
    sign = builder.and_(builder.lshr(bits, constant(t, 16)), constant(t, 0x8000))
    return builder.or_(found, sign)


def _half_widened(builder, bits):
    t, real = bits.type, wider(FLOAT, getattr(bits.type, "count", 1))
    magnitude = builder.shl(builder.and_(bits, constant(t, 0x7FFF)), constant(t, 13))
    exponent = builder.and_(magnitude, constant(t, 31 << 23))
    normal = builder.add(magnitude, constant(t, _BIAS))
    beyond = builder.add(normal, constant(t, _BIAS))
    smallest = constant(t, _SMALLEST)
    above = builder.bitcast(builder.add(magnitude, smallest), real)
    subnormal = builder.fsub(above, builder.bitcast(smallest, real), flags=("nsz",))
    is_beyond = builder.icmp_unsigned("==", exponent, constant(t, 31 << 23))
    is_small = builder.icmp_unsigned("==", exponent, constant(t, 0))
    found = builder.select(is_beyond, beyond, normal)
    found = builder.select(is_small, builder.bitcast(subnormal, t), found)
    sign = builder.shl(builder.and_(bits, constant(t, 0x8000)), constant(t, 16))
    return builder.or_(found, sign)


def _half_converted(builder, value, lanes):
    """The instruction itself, which LLVM does not look through."""
    whole, width = (16, 512) if lanes > 8 else (8, 256)
    assert lanes in (1, 2, 4, 8, 16)
    vector, halves = ir.VectorType(FLOAT, whole), ir.VectorType(INT16, whole)
    if lanes == 1:
        undefined = ir.Constant(vector, ir.Undefined)
        value = builder.insert_element(undefined, value, INT32(0))
    elif lanes < whole:
        undefined = ir.Constant(value.type, ir.Undefined)
        places = ir.Constant(ir.VectorType(INT32, whole), [i % lanes for i in range(whole)])
        value = builder.shuffle_vector(value, undefined, places)
    nearest = INT32(0)
    if width == 256:
        kind = ir.FunctionType(halves, [vector, INT32])
        name, args = "llvm.x86.vcvtps2ph.256", [value, nearest]
    else:
        kind = ir.FunctionType(halves, [vector, INT32, halves, INT16])
        name = "llvm.x86.avx512.mask.vcvtps2ph.512"
        args = [value, nearest, ir.Constant(halves, [0] * whole), INT16(-1)]
    found = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
    if lanes == whole:
        return found
    if lanes == 1:
        return builder.extract_element(found, INT32(0))
    places = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes)))
    return builder.shuffle_vector(found, ir.Constant(halves, ir.Undefined), places)

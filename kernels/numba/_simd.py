"""What a tensor is to Numba: an address, and a kind that says which float lies there.

A kind is a NumPy scalar whose type Numba dispatches on: float32, float64, int16 for a half and
uint16 for a bfloat16, so that one source serves every dtype. A kernel reads with `load`, in fp32 or
fp64, and rounds with `store`. Passing addresses costs 0.06 us a tensor, arrays 0.5.
"""

import math

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.ir.types import _BaseFloatType
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

KINDS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.float16: np.int16(0),
    torch.bfloat16: np.uint16(0),
    torch.int64: np.int64(0),
    torch.int32: np.int32(0),
    torch.bool: np.uint8(0),
}

INTEGER = KINDS[torch.int64]

FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()


class _BrainFloatType(_BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name: its fptrunc is 1.37 x integer rounding."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"


_BrainFloatType._create_instance()
BRAIN = _BrainFloatType()


def kind(x: Tensor) -> np.generic:
    """The kind of `x`."""
    return KINDS[x.dtype]


def address(x: Tensor | None) -> int:
    """Where `x` begins, 0 for None."""
    return 0 if x is None else x.data_ptr()


def arithmetic_of(kind_type):
    """The type the arithmetic on this kind is done in."""
    return types.float64 if kind_type == types.float64 else types.float32


def _emit_nothing(context, builder, signature, args):
    return context.get_dummy_value()


@intrinsic
def pointer(typing_context, address, kind):
    """The elements at `address`; None for the kind None."""
    kind = types.unliteral(kind)
    if kind == types.none:
        return types.none(address, kind), _emit_nothing

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.int64, kind), emit


@intrinsic
def offset(typing_context, p, elements):
    """The pointer `elements` further on; None for None."""
    if p == types.none:
        return types.none(p, types.int64), _emit_nothing

    def emit(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.int64), emit


@intrinsic
def load(typing_context, p, i):
    """Read element `i` of `p` as fp32, as fp64 where it is fp64, integers as they are."""
    dtype = p.dtype
    floats = (types.float32, types.int16, types.uint16)
    result = types.float32 if dtype in floats else dtype

    def emit(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if dtype == types.int16:
            return builder.fpext(builder.bitcast(value, HALF), FLOAT)
        if dtype == types.uint16:
            wide = builder.zext(value, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), FLOAT)
        return value

    return result(p, types.int64), emit


@intrinsic
def store(typing_context, p, i, value):
    """Round `value` to the kind of `p` and write it to element `i`."""
    dtype = p.dtype
    floats = (types.float32, types.int16, types.uint16)
    source = types.float32 if dtype in floats else dtype

    def emit(context, builder, signature, args):
        p, i, value = args
        if dtype == types.int16:
            value = builder.bitcast(builder.fptrunc(value, HALF), ir.IntType(16))
        elif dtype == types.uint16:
            value = builder.bitcast(builder.fptrunc(value, BRAIN), ir.IntType(16))
        builder.store(value, builder.gep(p, [i]))
        return context.get_dummy_value()

    return types.void(p, types.int64, source), emit


@intrinsic
def real(typing_context, kind, value):
    """`value` in the type the arithmetic on `kind` (a kind or a pointer) is done in."""
    result = arithmetic_of(
        kind.dtype if isinstance(kind, types.CPointer) else types.unliteral(kind)
    )
    value = types.unliteral(value)

    def emit(context, builder, signature, args):
        return context.cast(builder, args[1], value, result)

    return result(types.unliteral(kind), value), emit


def _constant(t, value):
    return ir.Constant(t, float(np.float32(value)) if t == FLOAT else value)


def _call(builder, name, *args):
    suffix = "f32" if args[0].type == FLOAT else "f64"
    kind = ir.FunctionType(args[0].type, [a.type for a in args])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), args
    )


@intrinsic
def maximum(typing_context, x, y):
    """The larger of two, NaN if either is: one that LLVM reduces in vectors, unlike `max`."""
    return x(x, x), lambda _, builder, __, args: _call(builder, "maximum", *args)


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once, and left in this order: `reassoc` moves terms of a plain sum."""
    return x(x, x, x), lambda _, builder, __, args: _call(builder, "fma", *args)


# 2**f on [-1/2, 1/2] is a polynomial; its error, with e**x = 2**n e**r, is 2.1 ulp at most.
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
_EXP_TERMS = (1 / 720, 0.0083334519, 0.041667115, 0.16666645, 0.5, 1.0, 1.0)
_EXP_LOWEST, _EXP_HIGHEST = -87.33, 88.72


def emit_exp(builder, x):
    """e**x of an fp32 scalar in LLVM IR: 0 below -87.33, inf above 88.72, NaN for NaN."""
    bits = ir.IntType(32)
    lowest, highest = _constant(FLOAT, _EXP_LOWEST), _constant(FLOAT, _EXP_HIGHEST)
    clamped = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    clamped = builder.select(builder.fcmp_ordered("<", clamped, highest), clamped, highest)
    n = _call(builder, "rint", builder.fmul(clamped, _constant(FLOAT, _LOG2_E)))
    r = _call(builder, "fma", n, _constant(FLOAT, -_LN2_HIGH), clamped)
    r = _call(builder, "fma", n, _constant(FLOAT, -_LN2_LOW), r)
    p = _constant(FLOAT, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = _call(builder, "fma", p, r, _constant(FLOAT, term))
    exponent = builder.shl(builder.fptosi(n, bits), ir.Constant(bits, 23))
    y = builder.bitcast(builder.add(builder.bitcast(p, bits), exponent), FLOAT)
    y = builder.select(builder.fcmp_ordered("<", x, lowest), _constant(FLOAT, 0.0), y)
    infinity = ir.Constant(FLOAT, float("inf"))
    y = builder.select(builder.fcmp_ordered(">", x, highest), infinity, y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


@intrinsic
def _exp_float(typing_context, x):
    return types.float32(types.float32), lambda _, builder, __, args: emit_exp(builder, args[0])


def exp(x):
    """e**x: a polynomial that vectorises for fp32 (0.17 ns an element, libm 1.9), libm for fp64."""


@overload(exp, inline="always")
def _exp(x):
    return (lambda x: math.exp(x)) if x == types.float64 else (lambda x: _exp_float(x))


@intrinsic
def _exp_below_float(typing_context, x):
    """Two instructions in three of `exp`: nothing is done about an overflow, which cannot be."""

    def emit(context, builder, signature, args):
        x, bits = args[0], ir.IntType(32)
        lowest = _constant(FLOAT, _EXP_LOWEST)
        clamped = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
        n = _call(builder, "rint", builder.fmul(clamped, _constant(FLOAT, _LOG2_E)))
        r = _call(builder, "fma", n, _constant(FLOAT, -_LN2_HIGH), x)  # NaN where x is
        r = _call(builder, "fma", n, _constant(FLOAT, -_LN2_LOW), r)
        p = _constant(FLOAT, _EXP_TERMS[0])
        for term in _EXP_TERMS[1:]:
            p = _call(builder, "fma", p, r, _constant(FLOAT, term))
        biased = builder.add(builder.fptosi(n, bits), ir.Constant(bits, 127))
        power = builder.bitcast(builder.shl(biased, ir.Constant(bits, 23)), FLOAT)
        y = builder.fmul(p, power)
        return builder.select(builder.fcmp_ordered("<", x, lowest), _constant(FLOAT, 0.0), y)

    return types.float32(types.float32), emit


def exp_below(x):
    """e**x for x up to 88, in a third fewer instructions than `exp`; NaN for NaN."""


@overload(exp_below, inline="always")
def _exp_below(x):
    return (lambda x: math.exp(x)) if x == types.float64 else (lambda x: _exp_below_float(x))


# tanh(x) - x below 0.625, as x**3 times a polynomial in x**2: reweighted (Lawson) least squares on
# 2000 Chebyshev points; with the other branch at most 1.5 ulp off in fp32.
_TANH_TERMS = (-0.005717044696, 0.020650586113, -0.053743496537, 0.133314907551, -0.333332836628)
_TANH_SMALL = 0.625

_inline = numba.njit(inline="always")  # a call would keep the loop around it from vectorising


@_inline
def _tanh_float(x):
    square = x * x
    p = real(x, _TANH_TERMS[0])
    p = fma(p, square, real(x, _TANH_TERMS[1]))
    p = fma(p, square, real(x, _TANH_TERMS[2]))
    p = fma(p, square, real(x, _TANH_TERMS[3]))
    p = fma(p, square, real(x, _TANH_TERMS[4]))
    small = fma(x * square, p, x)
    a = exp(real(x, -2) * abs(x))
    large = (real(x, 1) - a) / (real(x, 1) + a)
    large = -large if x < real(x, 0) else large
    return large if abs(x) > real(x, _TANH_SMALL) else small


def tanh(x):
    """The hyperbolic tangent: one that vectorises for fp32, libm for fp64."""


@overload(tanh, inline="always")
def _tanh(x):
    return (lambda x: math.tanh(x)) if x == types.float64 else (lambda x: _tanh_float(x))


def reciprocal_root(x):
    """1 / sqrt(x) once a row. In fp64: LLVM's fp32 form is an estimate that makes inf a NaN."""


@overload(reciprocal_root, inline="always")
def _reciprocal_root(x):
    if x == types.float64:
        return lambda x: 1.0 / math.sqrt(x)
    return lambda x: np.float32(1.0 / math.sqrt(np.float64(x)))

"""What a tensor is to Numba: an address, and a kind that says which float lies there.

A kind is a NumPy scalar whose type Numba dispatches on: float32, float64, int16 for a half and
uint16 for a bfloat16, so that one source serves every dtype. A kernel reads with `load`, in fp32 or
fp64, and rounds with `store`. Passing addresses costs 0.06 us a tensor, arrays 0.5.
"""

import math

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from tilewise.kernels.numba import _lanes, _sixteen
from tilewise.kernels.numba._lanes import call, constant

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
    floats = (types.float32, *_sixteen.KINDS)
    result = types.float32 if dtype in floats else dtype

    def emit(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        return _sixteen.widen(builder, dtype, value) if dtype in _sixteen.KINDS else value

    return result(p, types.int64), emit


@intrinsic
def store(typing_context, p, i, value):
    """Round `value` to the kind of `p` and write it to element `i`."""
    dtype = p.dtype
    floats = (types.float32, *_sixteen.KINDS)
    source = types.float32 if dtype in floats else dtype

    def emit(context, builder, signature, args):
        p, i, value = args
        if dtype in _sixteen.KINDS:
            value = _sixteen.narrow(builder, dtype, value)
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


@intrinsic
def maximum(typing_context, x, y):
    """The larger of two, NaN if either is: one that LLVM reduces in vectors, unlike `max`."""
    return x(x, x), lambda _, builder, __, args: call(builder, "maximum", *args)


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once, and left in this order: `reassoc` moves terms of a plain sum."""
    return x(x, x, x), lambda _, builder, __, args: call(builder, "fma", *args)


@intrinsic
def reciprocal(typing_context, x):
    """1 / x as it is written: of `y * (1 / np.float64(x))` that is rounded to fp32 LLVM makes a
    division in fp32, and of several by one x products with its rounded reciprocal."""

    def emit(context, builder, signature, args):
        return builder.fdiv(constant(args[0].type, 1), args[0], flags=("nsz",))

    return x(x), emit


def _by_lanes(function):
    @intrinsic
    def of_float(typing_context, x):
        def emit(context, builder, signature, args):
            return function(_lanes.Lanes(builder, args[0])).value

        return types.float32(types.float32), emit

    return of_float


_exp_float, _tanh_float = _by_lanes(_lanes.exp), _by_lanes(_lanes.tanh)


def exp(x):
    """e**x: a polynomial that vectorises for fp32 (0.13 ns an element, libm 1.9), libm for fp64."""


@overload(exp, inline="always")
def _exp(x):
    return (lambda x: math.exp(x)) if x == types.float64 else (lambda x: _exp_float(x))


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

"""The interpreter's arithmetic, made that of the hardware.

As shipped (Triton 3.6 to 3.9) it computes with the bits of bfloat16 and of the 8-bit formats as if
they were integers, truncates fp32 to bfloat16, does not saturate, and knows no TF32. Here each op
on a narrow format computes in fp32 and rounds once. The operands of a TF32 product lose their low
13 bits, as those of a tensor core that is fed fp32: of the two that hardware could do, rounding
and cutting, the one with the larger error.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tilewise.verify import session
from tilewise.verify.formats import NARROW, cut_to_tf32, decode, encode, encode_towards_zero
from tilewise.verify.patching import STOCK, replace

Handle = interpreter.TensorHandle
_PRECISION = interpreter._ir.INPUT_PRECISION


def is_narrow(handle: Any) -> bool:
    """Whether it holds bits that NumPy takes for integers; a comparison of them holds booleans."""
    return handle.dtype.scalar.name in NARROW and handle.data.dtype != np.bool_


def numbers(handle: Any) -> Any:
    """The data, in fp32 if NumPy has no type for it."""
    return decode(handle.data, handle.dtype.scalar.name) if is_narrow(handle) else handle.data


def handle_of(values: Any, dtype: Any) -> Any:
    """A handle of `dtype` for numbers, rounded to it."""
    scalar = dtype.scalar
    if scalar.name in NARROW:
        return Handle(encode(values, scalar.name), scalar)
    return Handle(np.asarray(values).astype(interpreter._get_np_dtype(scalar)), scalar)


def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if not (is_narrow(left) or is_narrow(right)):
        return STOCK["binary_op"](self, left, right, operation)
    dtype = left.dtype if is_narrow(left) else right.dtype
    if operation in _BITWISE:
        return Handle(operation(left.data, right.data), dtype.scalar)
    with np.errstate(all="ignore"):
        values = operation(numbers(left), numbers(right))
    return Handle(values, tl.int1) if values.dtype == np.bool_ else handle_of(values, dtype)


_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


def unary_op(self: Any, operand: Any, operation: Any) -> Any:
    if not is_narrow(operand):
        return STOCK["unary_op"](self, operand, operation)
    with np.errstate(all="ignore"):
        return handle_of(operation(numbers(operand)), operand.dtype)


def ternary_op(self: Any, first: Any, second: Any, third: Any, operation: Any) -> Any:
    if operation is np.where or not is_narrow(third):
        return STOCK["ternary_op"](self, first, second, third, operation)
    return handle_of(operation(numbers(first), numbers(second), numbers(third)), third.dtype)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if not is_narrow(z):
        return STOCK["create_fma"](self, x, y, z)
    with np.errstate(all="ignore"):
        exact = numbers(x).astype(np.float64) * numbers(y) + numbers(z)
    return handle_of(exact, z.dtype)


def create_rsqrt(self: Any, operand: Any) -> Any:
    return unary_op(self, operand, lambda x: 1 / np.sqrt(x))


def create_erf(self: Any, operand: Any) -> Any:
    if not is_narrow(operand):
        return STOCK["create_erf"](self, operand)
    return handle_of(interpreter.np_erf_fp32(numbers(operand)), operand.dtype)


def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
    if source.dtype.scalar == dtype.scalar and source.data.dtype != np.bool_:
        return source
    if is_narrow(source) or dtype.scalar.name in NARROW:
        with np.errstate(invalid="ignore"):
            return handle_of(numbers(source), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return STOCK["cast_impl"](self, source, dtype)


def create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
    if not {source.dtype.scalar.name, dtype.scalar.name} <= _FLOATS:
        return STOCK["create_fp_to_fp"](self, source, dtype, rounding)
    narrower = dtype.scalar.primitive_bitwidth < source.dtype.scalar.primitive_bitwidth
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ and narrower:
        if dtype.scalar.name in {*NARROW, "fp16"}:
            return Handle(encode_towards_zero(numbers(source), dtype.scalar.name), dtype.scalar)
        return STOCK["create_fp_to_fp"](self, source, dtype, rounding)
    with np.errstate(over="ignore"):
        return handle_of(numbers(source), dtype)


_FLOATS = {"fp16", "fp32", "fp64", *NARROW}


def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    x, y = numbers(a), numbers(b)
    total = np.float32 if is_narrow(d) or d.data.dtype == np.float16 else d.data.dtype
    is_single = x.dtype == y.dtype == np.float32 and not (is_narrow(a) or is_narrow(b))
    with np.errstate(all="ignore"):
        if is_single and precision == _PRECISION.TF32:
            return handle_of(_fused_sums(cut_to_tf32(x), cut_to_tf32(y), numbers(d)), d.dtype)
        if is_single and precision == _PRECISION.TF32x3:
            large_x, large_y = cut_to_tf32(x), cut_to_tf32(y)
            small = np.matmul(cut_to_tf32(x - large_x), large_y)
            product = small + np.matmul(large_x, cut_to_tf32(y - large_y))
            product += np.matmul(large_x, large_y)
        elif is_single and d.data.dtype == np.float32:
            return handle_of(_fused_sums(x, y, numbers(d)), d.dtype)
        else:
            product = np.matmul(x.astype(total), y.astype(total))
        return handle_of(product + numbers(d).astype(total), d.dtype)


def _fused_sums(x: Any, y: Any, sums: Any) -> Any:
    """sums + x y, of each element a term after the other: the same bits for a product transposed,
    whose kernels a softmax and its gradient share. The order of a BLAS depends on the shape."""
    for i in range(x.shape[-1]):
        terms = x[..., :, i, None].astype(np.float64) * y[..., i, None, :]
        sums = (terms + sums).astype(np.float32)
    return sums


def create_fabs(self: Any, operand: Any) -> Any:
    """By the sign bit; the stock one fails on blocks that are views."""
    data = np.ascontiguousarray(operand.data)
    return STOCK["create_fabs"](self, Handle(data.reshape(operand.data.shape), operand.dtype))


def sanitize_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Report a signed integer of at most 32 bits that does not hold the result."""
    if not isinstance(self.builder, interpreter.InterpreterBuilder):
        STOCK["binary_op_sanitize_overflow_impl"](self, left, right, operation)
        return
    scalar = left.type.scalar
    if session.active is None or not scalar.is_int_signed() or scalar.int_bitwidth not in (16, 32):
        return
    numpy_operation = _CHECKED.get(operation.__name__)
    if numpy_operation is None:
        return
    wide = numpy_operation(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    limit = 1 << (scalar.int_bitwidth - 1)
    if wide.max() >= limit or wide.min() < -limit:
        lane = np.unravel_index(int(np.argmax((wide >= limit) | (wide < -limit))), wide.shape)
        what = f"{scalar.name} {operation.__name__}: {wide[lane]} does not fit"
        session.found("overflow", what, lane=tuple(map(int, lane)))


_CHECKED = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def get_all_ones_value(self: Any, dtype: Any) -> Any:
    """All bits set; NumPy 2 refuses -1 as an unsigned number, which is how 3.6 says it."""
    kind = interpreter._get_np_dtype(dtype)
    ones = np.ones(1, bool) if kind == np.bool_ else np.full(1, -1, np.int64).astype(kind)
    return Handle(ones, dtype.scalar)


def _wrapping(name: str) -> Any:
    """A constant of an integer type, of as many of its bits as there are."""

    def get(self: Any, value: Any) -> Any:
        return Handle(np.array([value]).astype(name), getattr(tl, name))

    return get


def install() -> None:
    """Replace what is wrong, for all of this process."""
    builder = interpreter.InterpreterBuilder
    for function in (
        binary_op, unary_op, ternary_op, create_fma, create_rsqrt, create_erf, create_fabs,
        cast_impl, create_fp_to_fp, create_dot, get_all_ones_value,
    ):  # fmt: skip
        replace(builder, function.__name__, function)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        replace(builder, f"get_{name}", _wrapping(name))
    replace(TritonSemantic, "binary_op_sanitize_overflow_impl", sanitize_overflow)

"""Triton's interpreter, repaired where it computes bfloat16 wrongly.

As shipped (3.6 to 3.9) it truncates fp32 to bf16 where hardware rounds to nearest even, and
multiplies bf16 matrices as the 16-bit integers that it stores them in. Beside NumPy 2.4 or newer,
that of 3.6 also fails on every loop to a runtime bound and every complement of an unsigned integer.
"""

from typing import Any

import numpy as np


def _widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(values: Any) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Give the interpreter of this process bf16 casts and products as hardware has them."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "tilewise_repaired", False):
        return
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    all_ones = builder.get_all_ones_value

    def cast_impl(self: Any, source: Any, dst_type: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and dst_type.scalar != tl.bfloat16:
            source = handle(_widen(source.data), tl.float32)
        if source.dtype.scalar == dst_type.scalar:
            return source
        if dst_type.scalar == tl.bfloat16:
            return handle(_round_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, dst_type)

    def create_fp_to_fp(self: Any, source: Any, dst_type: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, dst_type.scalar):
            return cast_impl(self, source, dst_type)
        return convert(self, source, dst_type, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            handle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    def get_all_ones_value(self: Any, of: Any) -> Any:
        dtype = interpreter._get_np_dtype(of)
        if dtype.kind == "u":  # as shipped this is -1 of that type, which NumPy 2 refuses
            return handle(np.full(1, np.iinfo(dtype).max, dtype), of.scalar)
        return all_ones(self, of)

    # The create_* casts of the builder look cast_impl up on self, so replacing it is enough.
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.get_all_ones_value = get_all_ones_value
    builder.tilewise_repaired = True

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor

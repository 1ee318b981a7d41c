"""The number formats of a GPU in NumPy: what their bits mean, and what rounds where.

Triton's interpreter keeps bfloat16 as uint16 and the 8-bit formats as uint8. Formats go by
Triton's own names. Rounding is to nearest even, once: from fp64 too.
"""

from typing import Any

import numpy as np
import torch

# The 8-bit formats, and the largest finite number of each: beyond it a cast saturates.
FLOAT8 = {
    "fp8e4nv": (torch.float8_e4m3fn, 448.0),
    "fp8e5": (torch.float8_e5m2, 57344.0),
    "fp8e4b8": (torch.float8_e4m3fnuz, 240.0),
    "fp8e5b16": (torch.float8_e5m2fnuz, 57344.0),
}
NARROW = frozenset({"bf16", *FLOAT8})  # what NumPy has no type for
_BITS = {"bf16": np.uint16, "fp16": np.uint16} | dict.fromkeys(FLOAT8, np.uint8)


def decode(bits: Any, name: str) -> Any:
    """The numbers, in fp32 if NumPy has no type for the format."""
    if name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if name in FLOAT8:
        plain = torch.from_numpy(np.ascontiguousarray(bits))
        return plain.view(FLOAT8[name][0]).float().numpy()
    return bits


def encode(values: Any, name: str) -> Any:
    """The bits of a narrow format: bfloat16 as hardware rounds, 8 bits with saturation."""
    values = _to_float32(np.asarray(values))
    if name == "bf16":
        return _round_to_bfloat16(values)
    dtype, largest = FLOAT8[name]
    clamped = np.clip(np.ascontiguousarray(values), -largest, largest)  # NaN stays NaN
    return torch.from_numpy(clamped).to(dtype).view(torch.uint8).numpy().reshape(values.shape)


def encode_towards_zero(values: Any, name: str) -> Any:
    """As `encode`, or to fp16, cutting off what does not fit."""
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        bits = values.astype(np.float16) if name == "fp16" else encode(values, name)
    back = bits if name == "fp16" else decode(bits, name)
    bits = bits.view(_BITS[name])
    too_far = np.abs(back.astype(np.float64)) > np.abs(values.astype(np.float64))
    too_far &= np.isfinite(values)  # one step of the magnitude, which the low bits are
    bits = bits - too_far.astype(bits.dtype)
    return bits.view(np.float16) if name == "fp16" else bits


def cut_to_tf32(values: Any) -> Any:
    """What a tensor core reads of an fp32 operand: the low 13 bits are not there."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _round_to_bfloat16(values: Any) -> Any:
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    upper = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper.astype(np.uint16))


def _to_float32(values: Any) -> Any:
    """In fp32, rounded to odd, so that rounding again gives what rounding once would have."""
    if values.dtype == np.float32:
        return values
    wide = values.astype(np.float64)
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    back = near.astype(np.float64)
    inexact = (back != wide) & np.isfinite(near)
    bits = np.ascontiguousarray(near).view(np.uint32).reshape(near.shape)
    bits = bits - (inexact & (np.abs(back) > np.abs(wide))).astype(np.uint32)
    return (bits | inexact.astype(np.uint32)).view(np.float32)

"""The formula of the norms, in plain PyTorch, and what is refused of its arguments.

A norm turns each row into `xhat`, and that into

    y = xhat * (weight_offset + weight) + bias

where `casting` says what is rounded on the way, and the ops that add normalise

    sum = dropout(x) + residual
"""

from typing import Any

import torch
from torch import Tensor

from tilewise.op import Inputs, wide_dtype
from tilewise.rng import counter_rows, keep_mask

CASTINGS = ("torch", "llama")


# --- The formula.


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dtype: torch.dtype,
    centred: bool,
) -> Tensor:
    """The reference of every norm: `x` in any dtype to `dtype`."""
    wide = x.to(wide_dtype(dtype))
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        y = y.to(dtype)  # from here on PyTorch's own promotion says what is rounded
    elif weight is not None:
        weight = weight.to(y.dtype)
    if weight is not None:
        y = y * (weight + weight_offset if weight_offset else weight)
    return (y if bias is None else y + bias).to(dtype)


def added(
    x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | int, offset: Tensor | int
) -> Tensor:
    """The reference of the sum: dropout(x) + residual, rounded once, to the residual's dtype."""
    branch = dropped(x.to(wide_dtype(x.dtype)), dropout_p, seed, offset)
    return (branch + residual).to(residual.dtype)


def dropped(x: Tensor, p: float, seed: Tensor | int, offset: Tensor | int) -> Tensor:
    """`x` where dropout keeps it, times 1 / (1 - p); 0 elsewhere, whatever `x` is there."""
    if p == 0:
        return x
    rows = x.numel() // max(x.shape[-1], 1)
    kept = keep_mask(p, seed, offset, counter_rows(seed, rows, x.device), x.shape[-1])
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return torch.where(kept.expand(rows, -1).view(x.shape), x * scale, 0)


# --- What is refused.


def check_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    casting: str,
) -> None:
    """Refuse what is wrong with the arguments of the norm named `op`."""
    dtype, shape, device = x.dtype, x.shape[-1:], x.device
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: x must be floating point, got {dtype}")
    if x.ndim == 0:
        raise ValueError(f"{op}: x must be [..., cols], got a scalar")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{op}: {name} must be {dtype} or torch.float32, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: x must be [..., cols] and {name} [cols], "
                f"got {list(x.shape)} and {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if weight is not None and bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"{op}: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}"
        )
    if weight is None and weight_offset != 0:
        raise ValueError(f"{op}: weight_offset must come with a weight, got {weight_offset}")
    if casting not in CASTINGS:
        raise ValueError(f"{op}: casting must be one of {', '.join(CASTINGS)}, got {casting!r}")


def check_residual(op: str, x: Tensor, residual: Tensor, dropout_p: float) -> None:
    """Refuse what is wrong with what the op named `op` adds."""
    wide = wide_dtype(x.dtype)
    if residual.dtype not in (x.dtype, wide):
        raise TypeError(f"{op}: residual must be {x.dtype} or {wide}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}"
        )
    if residual.device != x.device:
        raise RuntimeError(f"{op}: residual must be on {x.device}, got {residual.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, got {dropout_p}")


# --- What the ops declare.

# Everything at once: a size that says so differs from the others in all that a kernel is told.
MIXED = {"residual": "wide", "weight": "float32", "bias": True, "dropout_p": 0.3}


def norm_inputs(
    rows: int,
    cols: int,
    weight: str | None = "like x",
    bias: bool = False,
    residual: str | None = None,
    mean: float = 0.0,
    dropout_p: float = 0.0,
    *,
    device: str,
    dtype: torch.dtype,
    **options: float | str,
) -> Inputs:
    """x, then weight and bias, between them the residual where it is said of which dtype.

    A bias has the dtype of the weight; eps is one that the tests can see.
    """
    x = torch.randn(rows, cols, device=device, dtype=dtype) + mean
    kind = torch.float32 if weight == "float32" else dtype
    parameters = (
        None if weight is None else torch.randn(cols, device=device, dtype=kind),
        torch.randn(cols, device=device, dtype=kind) if bias else None,
    )
    given: dict[str, Any] = {"eps": 0.1, **options}
    if residual is None:
        return (x, *parameters), given
    if dropout_p:
        given |= {"dropout_p": dropout_p, "seed": 2**40 + 7, "offset": 3}
    beside = wide_dtype(dtype) if residual == "wide" else dtype
    return (x, torch.randn(rows, cols, device=device, dtype=beside), *parameters), given

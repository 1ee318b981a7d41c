"""Softmax and its logarithm over the last dimension.

The running maximum and sum of rows that no block can hold are those of Milakov and Gimelshein,
2018, https://arxiv.org/abs/1805.02867.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    Size,
    as_rows,
    autocast_dtype,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)


def softmax(x: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """Divide the exponentials of each row of `scale * x` by their sum.

        y_j = exp(scale * x_j) / sum_k exp(scale * x_k)

    Computed in fp32 (fp64 for fp64 `x`), free of overflow, and rounded once. As in PyTorch, a row
    is NaN throughout where it holds NaN or where `scale * x` is -inf throughout or +inf somewhere.
    The gradient comes from `y` as rounded.

    Args:
        x: `[..., cols]`, floating point. Under autocast fp16 and bf16 are cast to fp32.
        scale: Multiplies `x`; an inverse temperature.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`; fp32 for fp16 and bf16 under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If `x` is a scalar or `backend` is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    return _run(SOFTMAX, x, scale, False, backend)


def softmax_reference(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The formula of `softmax`, in plain PyTorch."""
    return torch.softmax(scale * x.to(wide_dtype(x.dtype)), -1).to(x.dtype)


def log_softmax(x: Tensor, *, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """Take the logarithm of `softmax`, with the digits that the softmax itself would lose.

        y_j = scale * x_j - log(sum_k exp(scale * x_k))

    Computed in fp32 (fp64 for fp64 `x`), free of overflow, and rounded once. Rows with NaN or
    infinities are those of PyTorch, as in `softmax`. The gradient comes from `y` as rounded.

    Args:
        x: `[..., cols]`, floating point. Under autocast fp16 and bf16 are cast to fp32.
        scale: Multiplies `x`; an inverse temperature.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`; fp32 for fp16 and bf16 under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If `x` is a scalar or `backend` is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    return _run(LOG_SOFTMAX, x, scale, True, backend)


def log_softmax_reference(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The formula of `log_softmax`, in plain PyTorch."""
    return torch.log_softmax(scale * x.to(wide_dtype(x.dtype)), -1).to(x.dtype)


def _run(op: Op, x: Tensor, scale: float, log: bool, backend: str | None) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"{op.name}: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{op.name}: x must be [..., cols], got a scalar")
    if autocast_dtype(x) is not None:
        x = x.to(wide_dtype(x.dtype))
    chosen = choose(op, backend, x, scale=scale)
    if chosen == "reference" or x.numel() == 0 or transforming():
        reference = log_softmax_reference if log else softmax_reference
        return reference(x, scale=scale)

    rows = as_rows(x)
    y: Tensor
    if needs_gradient(x):
        y = _Softmax.apply(rows, scale, log, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _forward(rows, scale, log, chosen)
    return y.view(x.shape)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, log: bool, chosen: str) -> Tensor:
        y: Tensor = _forward(x, scale, log, chosen)
        ctx.save_for_backward(x, y)
        ctx.scale, ctx.log, ctx.chosen = scale, log, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = log_softmax_reference if ctx.log else softmax_reference
            (dx,) = differentiable_gradients(partial(reference, scale=ctx.scale), dy, (x,))
            return dx, None, None, None
        return _backward(as_rows(dy), y, ctx.scale, ctx.log, ctx.chosen), None, None, None


BACKENDS = backends_of("softmax", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "softmax_forward(Tensor x, float scale, bool log, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, scale, log, backend: x.new_empty(x.shape),
)
_backward = register(
    "softmax_backward(Tensor dy, Tensor y, float scale, bool log, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dy, y, scale, log, backend: y.new_empty(y.shape),
)


def _inputs(rows: int, cols: int, scale: float = 1.0, *, device: str, dtype: torch.dtype) -> Inputs:
    return (torch.randn(rows, cols, device=device, dtype=dtype),), {"scale": scale}


SIZES: list[Size] = [
    {"rows": 3, "cols": 8, "scale": 0.7},
    {"rows": 0, "cols": 64},  # empty batch
    {"rows": 3, "cols": 0},  # empty rows
    {"rows": 1, "cols": 1},
    {"rows": 3, "cols": 127, "scale": -1.3},  # one short of a block; the least is the peak
    {"rows": 5, "cols": 64, "scale": 0.0},  # all the same
    {"rows": 65, "cols": 1024, "scale": 2.5},  # several parts in parallel
    {"rows": 300, "cols": 16},  # several rows in a part
    {"rows": 3, "cols": 8200, "scale": 0.5},  # wider than one block of registers
]
WORKLOADS: list[Size] = [{"rows": 4096, "cols": cols} for cols in (1024, 4096)]

SOFTMAX = declare(
    Op(
        name="softmax",
        call=softmax,
        reference=softmax_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=SIZES,
        workloads=WORKLOADS,
        bytes_moved=lambda x, scale: 2 * x.nbytes,
        native=lambda x, scale: torch.softmax(x if scale == 1 else scale * x, -1),
    )
)

LOG_SOFTMAX = declare(
    Op(
        name="log_softmax",
        call=log_softmax,
        reference=log_softmax_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=SIZES,
        workloads=WORKLOADS,
        bytes_moved=lambda x, scale: 2 * x.nbytes,
        native=lambda x, scale: torch.log_softmax(x if scale == 1 else scale * x, -1),
    )
)

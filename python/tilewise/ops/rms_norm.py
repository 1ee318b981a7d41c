"""Root-mean-square normalisation (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    as_rows,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Scale each row of `x` to unit root-mean-square, then by `weight`.

        y = x * rsqrt(mean(x^2) + eps) * weight

    Computed in fp32 (fp64 for fp64 `x`) and rounded once.

    Args:
        x: `[..., cols]`, floating point.
        weight: `[cols]`, on the device of `x`; fp32, or the dtype of `x`. None is all ones.
        eps: Added to the mean square.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("rms_norm: x must be [..., cols], got a scalar")
    if weight is not None:
        if weight.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"rms_norm: weight must be {x.dtype} or torch.float32, got {weight.dtype}"
            )
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"rms_norm: x must be [..., cols] and weight [cols], "
                f"got {list(x.shape)} and {list(weight.shape)}"
            )
        if weight.device != x.device:
            raise RuntimeError(f"rms_norm: weight must be on {x.device}, got {weight.device}")
    chosen = choose(RMS_NORM, backend, x, weight, eps=eps)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return rms_norm_reference(x, weight, eps)

    rows = as_rows(x)
    weight = weight if weight is None else weight.contiguous()
    y: Tensor
    if needs_gradient(x, weight):
        y = _RMSNorm.apply(rows, weight, eps, chosen)  # type: ignore[no-untyped-call]
    else:
        y, _ = _forward(rows, weight, eps, chosen)
    return y.view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The formula of `rms_norm`, in plain PyTorch."""
    wide = x.to(wide_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, chosen: str) -> Tensor:
        y: Tensor
        y, rstd = _forward(x, weight, eps, chosen)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.chosen = eps, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiable_gradients(rms_norm_reference, dy, (x, weight), ctx.eps)
            return *grads, None, None
        dx, dweight = _backward(as_rows(dy), x, weight, rstd, ctx.chosen)
        return dx, None if weight is None else dweight, None, None


BACKENDS = backends_of(
    "rms_norm",
    cuda=takes_all,
    numba=takes_all,
    triton=takes_all,
)

_forward = register(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, str backend) -> (Tensor y, Tensor rstd)",
    BACKENDS,
    fake=lambda x, weight, eps, backend: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype)),
    ),
)
_backward = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, str backend)"
    " -> (Tensor dx, Tensor dweight)",
    BACKENDS,
    fake=lambda dy, x, weight, rstd, backend: (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    ),
)


def _inputs(
    rows: int,
    cols: int,
    weight: str | None = "like x",
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    x = torch.randn(rows, cols, device=device, dtype=dtype)
    if weight is None:
        return (x, None), {"eps": 0.1}
    weight_dtype = dtype if weight == "like x" else getattr(torch, weight)
    return (x, torch.randn(cols, device=device, dtype=weight_dtype)), {"eps": 0.1}


RMS_NORM = declare(
    Op(
        name="rms_norm",
        call=rms_norm,
        reference=rms_norm_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0},  # empty rows
            {"rows": 1, "cols": 1},
            {"rows": 3, "cols": 127},  # one short of a block, rows misaligned
            {"rows": 5, "cols": 64, "weight": "float32"},
            {"rows": 5, "cols": 65, "weight": None},
            {"rows": 65, "cols": 1024},  # several parts in parallel
            {"rows": 300, "cols": 16},  # several rows in a part
            {"rows": 3, "cols": 8195},  # wider than one block of registers
        ],
        workloads=[{"rows": 4096, "cols": cols} for cols in (1024, 4096)],
        bytes_moved=lambda x, weight, **options: 2 * x.nbytes,
        native=lambda x, weight, eps: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps),
    )
)

"""Gaussian error linear unit (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415)."""

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


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Multiply `x` by the normal distribution function of `x`, exact or by the tanh formula.

        "none":  y = x * (1 + erf(x / sqrt(2))) / 2
        "tanh":  y = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2

    Computed in fp32 (fp64 for fp64 `x`) and rounded once.

    Args:
        x: `[...]`, floating point.
        approximate: "none" or "tanh".
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape and dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If `approximate` or `backend` is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    if not x.is_floating_point():
        raise TypeError(f"gelu: x must be floating point, got {x.dtype}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be one of none, tanh, got {approximate!r}")
    chosen = choose(GELU, backend, x, approximate=approximate)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return gelu_reference(x, approximate)

    rows = as_rows(x if x.ndim else x.unsqueeze(0))
    y: Tensor
    if needs_gradient(x):
        y = _GELU.apply(rows, approximate, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _forward(rows, approximate, chosen)
    return y.view(x.shape)


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The formula of `gelu`, in plain PyTorch."""
    wide = x.to(wide_dtype(x.dtype))
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, chosen: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate, ctx.chosen = approximate, chosen
        y: Tensor = _forward(x, approximate, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            (dx,) = differentiable_gradients(gelu_reference, dy, (x,), ctx.approximate)
            return dx, None, None
        return _backward(as_rows(dy), x, ctx.approximate, ctx.chosen), None, None


BACKENDS = backends_of("gelu", numba=takes_all, triton=takes_all)

_forward = register(
    "gelu_forward(Tensor x, str approximate, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, approximate, backend: x.new_empty(x.shape),
)
_backward = register(
    "gelu_backward(Tensor dy, Tensor x, str approximate, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dy, x, approximate, backend: x.new_empty(x.shape),
)


def _inputs(
    rows: int,
    cols: int,
    approximate: str = "none",
    spread: float = 1.0,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    x = torch.randn(rows, cols, device=device, dtype=dtype) * spread
    return (x,), {"approximate": approximate}


GELU = declare(
    Op(
        name="gelu",
        call=gelu,
        reference=gelu_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 1, "cols": 1},
            {"rows": 3, "cols": 127, "approximate": "tanh"},
            {"rows": 64, "cols": 100, "spread": 4.0},  # where the tails have run out
            {"rows": 64, "cols": 100, "spread": 2.0, "approximate": "tanh"},
            {"rows": 65, "cols": 1024},  # several tasks in parallel
            {"rows": 65, "cols": 1024, "approximate": "tanh"},
        ],
        workloads=[
            {"rows": 4096, "cols": cols, "approximate": approximate}
            for cols in (1024, 4096)
            for approximate in ("none", "tanh")
        ],
        bytes_moved=lambda x, approximate: 2 * x.nbytes,
        native=lambda x, approximate: torch.nn.functional.gelu(x, approximate=approximate),
    )
)

"""Layer normalisation (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

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


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Bring each row of `x` to mean 0 and variance 1, then scale and shift it.

        y = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias,  var(x) = mean((x - mean(x))^2)

    Computed in fp32 (fp64 for fp64 `x`) and rounded once.

    Args:
        x: `[..., cols]`, floating point.
        weight: `[cols]`, on the device of `x`; fp32, or the dtype of `x`. None is all ones.
        bias: As `weight`, and of its dtype; only with a `weight`. None is all zeros.
        eps: Added to the variance.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong, there is a bias without a weight, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check(x, weight, bias)
    chosen = choose(LAYER_NORM, backend, x, weight, bias, eps=eps)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return layer_norm_reference(x, weight, bias, eps)

    rows = as_rows(x)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y: Tensor
    if needs_gradient(x, weight, bias):
        y = _LayerNorm.apply(rows, weight, bias, eps, chosen)  # type: ignore[no-untyped-call]
    else:
        y, _, _ = _forward(rows, weight, bias, eps, chosen)
    return y.view(x.shape)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The formula of `layer_norm`, in plain PyTorch."""
    wide = x.to(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"layer_norm: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("layer_norm: x must be [..., cols], got a scalar")
    if bias is not None and weight is None:
        raise ValueError("layer_norm: bias must come with a weight, got weight None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"layer_norm: {name} must be {x.dtype} or torch.float32, got {tensor.dtype}"
            )
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: x must be [..., cols] and {name} [cols], "
                f"got {list(x.shape)} and {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise RuntimeError(f"layer_norm: {name} must be on {x.device}, got {tensor.device}")
    if weight is not None and bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"layer_norm: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}"
        )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, chosen: str
    ) -> Tensor:
        y: Tensor
        y, mean, rstd = _forward(x, weight, bias, eps, chosen)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.chosen = eps, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiable_gradients(layer_norm_reference, dy, (x, weight, bias), ctx.eps)
            return *grads, None, None
        dx, dweight, dbias = _backward(as_rows(dy), x, weight, mean, rstd, ctx.chosen)
        dweight = None if weight is None else dweight
        return dx, dweight, None if bias is None else dbias, None, None


BACKENDS = backends_of("layer_norm", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    BACKENDS,
    fake=lambda x, weight, bias, eps, backend: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype)),
        x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype)),
    ),
)
_backward = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    BACKENDS,
    fake=lambda dy, x, weight, mean, rstd, backend: (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    ),
)


def _inputs(
    rows: int,
    cols: int,
    weight: str | None = "like x",
    bias: bool = True,
    mean: float = 0.0,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    x = torch.randn(rows, cols, device=device, dtype=dtype) + mean
    if weight is None:
        return (x, None, None), {"eps": 0.1}
    like = {"device": device, "dtype": dtype if weight == "like x" else getattr(torch, weight)}
    shift = torch.randn(cols, **like) if bias else None  # type: ignore[arg-type]
    return (x, torch.randn(cols, **like), shift), {"eps": 0.1}  # type: ignore[arg-type]


LAYER_NORM = declare(
    Op(
        name="layer_norm",
        call=layer_norm,
        reference=layer_norm_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0},  # empty rows
            {"rows": 1, "cols": 1, "weight": None},  # nothing is left: dx is 0
            {"rows": 3, "cols": 127},  # one short of a block, rows misaligned
            {"rows": 5, "cols": 64, "weight": "float32"},
            {"rows": 5, "cols": 64, "bias": False},
            {"rows": 5, "cols": 65, "weight": None},
            {"rows": 64, "cols": 100, "mean": 30.0},  # x^2 dwarfs the variance
            {"rows": 65, "cols": 1024},  # several parts in parallel
            {"rows": 300, "cols": 16},  # several rows in a part
            {"rows": 7, "cols": 8193},  # wider than one block of registers
        ],
        workloads=[{"rows": 4096, "cols": cols} for cols in (1024, 4096)],
        bytes_moved=lambda x, weight, bias, **options: 2 * x.nbytes,
        native=lambda x, weight, bias, eps: torch.nn.functional.layer_norm(
            x, x.shape[-1:], weight, bias, eps
        ),
    )
)

"""Gated linear units (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from collections.abc import Callable
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

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def glu(
    gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str | None = None
) -> Tensor:
    """Multiply the activation of `gate` by `up`: SwiGLU with "silu".

        y = activation(gate) * up

    Computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        gate: `[...]`, floating point. Halves of a packed tensor are read where they lie.
        up: The shape, dtype and device of `gate`.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "sigmoid".
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape and dtype of `gate`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If the shapes differ, or `activation` or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    if not gate.is_floating_point():
        raise TypeError(f"glu: gate must be floating point, got {gate.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"glu: up must have the dtype of gate, {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(
            f"glu: gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}"
        )
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"glu: activation must be one of {known}, got {activation!r}")
    if up.device != gate.device:
        raise RuntimeError(f"glu: up must be on {gate.device}, got {up.device}")
    chosen = choose(GLU, backend, gate, up, activation=activation)
    if chosen == "reference" or gate.numel() == 0 or transforming():
        return glu_reference(gate, up, activation)

    rows = [as_rows(t if t.ndim else t.unsqueeze(0)) for t in (gate, up)]
    y: Tensor
    if needs_gradient(gate, up):
        y = _GLU.apply(*rows, activation, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _forward(*rows, activation, chosen)
    return y.view(gate.shape)


def glu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The formula of `glu`, in plain PyTorch."""
    wide = wide_dtype(gate.dtype)
    return (_ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, chosen: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.chosen = activation, chosen
        y: Tensor = _forward(gate, up, activation, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiable_gradients(glu_reference, dy, (gate, up), ctx.activation)
            return *grads, None, None
        dgate, dup = _backward(as_rows(dy), gate, up, ctx.activation, ctx.chosen)
        return dgate, dup, None, None


BACKENDS = backends_of("glu", numba=takes_all, triton=takes_all)

_forward = register(
    "glu_forward(Tensor gate, Tensor up, str activation, str backend) -> Tensor",
    BACKENDS,
    fake=lambda gate, up, activation, backend: gate.new_empty(gate.shape),
)
_backward = register(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, str backend)"
    " -> (Tensor dgate, Tensor dup)",
    BACKENDS,
    fake=lambda dy, gate, up, activation, backend: (
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape),
    ),
)


def _inputs(
    rows: int,
    cols: int,
    activation: str = "silu",
    packed: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    if packed:
        gate, up = torch.randn(rows, 2 * cols, device=device, dtype=dtype).chunk(2, -1)
    else:
        gate, up = torch.randn(2, rows, cols, device=device, dtype=dtype).unbind()
    return (gate, up), {"activation": activation}


GLU = declare(
    Op(
        name="glu",
        call=glu,
        reference=glu_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 1, "cols": 1, "activation": "relu"},
            {"rows": 3, "cols": 127, "activation": "gelu"},
            {"rows": 70, "cols": 127, "packed": True, "activation": "gelu_tanh"},  # rows in a task
            {"rows": 2, "cols": 8200, "packed": True, "activation": "sigmoid"},  # tasks in a row
            {"rows": 65, "cols": 1024},  # several tasks in parallel
            {"rows": 33, "cols": 300, "activation": "relu"},
        ],
        workloads=[{"rows": 4096, "cols": cols} for cols in (1024, 4096)],
        bytes_moved=lambda gate, up, activation: 3 * gate.nbytes,
        native=lambda gate, up, activation: _ACTIVATIONS[activation](gate) * up,
    )
)

"""Gated linear units (Shazeer, 2020, https://arxiv.org/abs/2002.05202), clamped as in gpt-oss
(https://arxiv.org/abs/2508.10925) where asked.
"""

import math
from collections.abc import Callable
from functools import partial
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
    shaped,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.plan import planned

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}

Unit = tuple[str, float, float, float]  # activation, limit, alpha, up_offset


@planned
def glu(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Multiply the activation of `gate` by `up`: SwiGLU with "silu".

        y = activation(gate) * (up + up_offset)

    With a `limit`, gate is at most that, and up at most that in size; with an `alpha`, silu is
    gate * sigmoid(alpha * gate). gpt-oss has limit 7, alpha 1.702 and up_offset 1. Computed in
    fp32 (fp64 for fp64) and rounded once.

    Args:
        gate: `[...]`, floating point. Halves of a packed tensor are read where they lie.
        up: The shape, dtype and device of `gate`.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "sigmoid".
        limit: Positive. What is beyond it has no gradient. None is no limit.
        alpha: Positive, and 1 unless the activation is "silu".
        up_offset: Added to `up` once it is clamped.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape and dtype of `gate`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If the shapes differ, an option is out of range, or a name is unknown.
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
    unit = _checked("glu", activation, limit, alpha, up_offset)
    if up.device != gate.device:
        raise RuntimeError(f"glu: up must be on {gate.device}, got {up.device}")
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "up_offset": up_offset}
    chosen = choose(GLU, backend, gate, up, activation=activation, **options)
    if chosen == "reference" or gate.numel() == 0 or transforming():
        return glu_reference(gate, up, activation, **options)

    rows = [as_rows(t if t.ndim else t.unsqueeze(0)) for t in (gate, up)]
    y: Tensor
    if needs_gradient(gate, up):
        y = _GLU.apply(*rows, unit, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _forward(*rows, *unit, chosen)
    return shaped(y, gate)


@planned
def glu_packed(
    x: Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Multiply the activation of the first half of each row by the second half.

        y = activation(x[..., :cols]) * (x[..., cols:] + up_offset)

    That is `glu` of the two halves, as one linear map leaves them; the gradient is one tensor too.
    `torch.nn.functional.glu` has the halves the other way round.

    Args:
        x: `[..., 2 * cols]`, floating point: the gate, then up.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "sigmoid".
        limit: As in `glu`.
        alpha: As in `glu`.
        up_offset: As in `glu`.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If the width is odd, an option is out of range, or a name is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    if not x.is_floating_point():
        raise TypeError(f"glu_packed: x must be floating point, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"glu_packed: x must be [..., 2 * cols], got {list(x.shape)}")
    unit = _checked("glu_packed", activation, limit, alpha, up_offset)
    options: dict[str, Any] = {"limit": limit, "alpha": alpha, "up_offset": up_offset}
    chosen = choose(GLU_PACKED, backend, x, activation=activation, **options)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return glu_packed_reference(x, activation, **options)

    rows = as_rows(x)
    y: Tensor
    if needs_gradient(x):
        y = _GLUPacked.apply(rows, unit, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _packed_forward(rows, *unit, chosen)
    return y.view(*x.shape[:-1], x.shape[-1] // 2)


def _checked(op: str, activation: str, limit: float | None, alpha: float, up_offset: float) -> Unit:
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive, got {limit}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"{op}: alpha must be positive and finite, got {alpha}")
    if alpha != 1 and activation != "silu":
        raise ValueError(f"{op}: alpha must be 1 unless activation is 'silu', got {alpha}")
    if not -math.inf < up_offset < math.inf:
        raise ValueError(f"{op}: up_offset must be finite, got {up_offset}")
    return activation, math.inf if limit is None else float(limit), float(alpha), float(up_offset)


def glu_reference(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> Tensor:
    """The formula of `glu`, in plain PyTorch."""
    dtype, wide = gate.dtype, wide_dtype(gate.dtype)
    gate, up = gate.to(wide), up.to(wide)
    if limit is not None:  # unlike clamp, NaN keeps its gradient
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    value = gate * torch.sigmoid(alpha * gate) if alpha != 1 else _ACTIVATIONS[activation](gate)
    return (value * (up + up_offset if up_offset else up)).to(dtype)


def glu_packed_reference(
    x: Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> Tensor:
    """The formula of `glu_packed`, in plain PyTorch."""
    gate, up = x.chunk(2, -1) if x.shape[-1] else (x, x)
    return glu_reference(gate, up, activation, limit=limit, alpha=alpha, up_offset=up_offset)


def _with_unit(reference: Callable[..., Tensor], unit: Unit) -> Callable[..., Tensor]:
    activation, limit, alpha, up_offset = unit
    bound = None if limit == math.inf else limit
    return partial(reference, activation=activation, limit=bound, alpha=alpha, up_offset=up_offset)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, unit: Unit, chosen: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.unit, ctx.chosen = unit, chosen
        y: Tensor = _forward(gate, up, *unit, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = _with_unit(glu_reference, ctx.unit)
            return *differentiable_gradients(reference, dy, (gate, up)), None, None
        wanted = ctx.needs_input_grad[:2]
        grads = _backward(as_rows(dy), gate, up, *ctx.unit, *wanted, ctx.chosen)
        dgate, dup = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return dgate, dup, None, None


class _GLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Unit, chosen: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit, ctx.chosen = unit, chosen
        y: Tensor = _packed_forward(x, *unit, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = _with_unit(glu_packed_reference, ctx.unit)
            return *differentiable_gradients(reference, dy, (x,)), None, None
        return _packed_backward(as_rows(dy), x, *ctx.unit, ctx.chosen), None, None


BACKENDS = backends_of("glu", cuda=takes_all, numba=takes_all, triton=takes_all)

_UNIT = "str activation, float limit, float alpha, float up_offset"
_forward = register(
    f"glu_forward(Tensor gate, Tensor up, {_UNIT}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda gate, up, *rest: gate.new_empty(gate.shape),
)
_backward = register(
    f"glu_backward(Tensor dy, Tensor gate, Tensor up, {_UNIT}, bool want_dgate, bool want_dup,"
    " str backend) -> (Tensor dgate, Tensor dup)",
    BACKENDS,
    fake=lambda dy, gate, up, activation, limit, alpha, up_offset, want_dgate, want_dup, backend: (
        gate.new_empty(gate.shape if want_dgate else 0),
        gate.new_empty(gate.shape if want_dup else 0),
    ),
)
_packed_forward = register(
    f"glu_packed_forward(Tensor x, {_UNIT}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, *rest: x.new_empty(x.shape[0], x.shape[1] // 2),
)
_packed_backward = register(
    f"glu_packed_backward(Tensor dy, Tensor x, {_UNIT}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dy, x, *rest: x.new_empty(x.shape),
)

_GPT_OSS = {"limit": 1.5, "alpha": 1.702, "up_offset": 1.0}  # a limit that random numbers meet


def _inputs(
    rows: int,
    cols: int,
    activation: str = "silu",
    packed: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    if packed:
        gate, up = torch.randn(rows, 2 * cols, device=device, dtype=dtype).chunk(2, -1)
    else:
        gate, up = torch.randn(2, rows, cols, device=device, dtype=dtype).unbind()
    return (gate, up), {"activation": activation} | options


def _packed_inputs(
    rows: int,
    cols: int,
    activation: str = "silu",
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    x = torch.randn(rows, 2 * cols, device=device, dtype=dtype)
    return (x,), {"activation": activation} | options


def _torch_glu(gate: Tensor, up: Tensor, activation: str, **options: Any) -> Tensor:
    return _ACTIVATIONS[activation](gate) * up


def _torch_glu_packed(x: Tensor, activation: str, **options: Any) -> Tensor:
    gate, up = x.chunk(2, -1)
    return _ACTIVATIONS[activation](gate) * up


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
            {"rows": 3, "cols": 127, "activation": "gelu"},  # one access short of a block
            {"rows": 70, "cols": 127, "packed": True, "activation": "gelu_tanh"},  # rows in a task
            {"rows": 2, "cols": 8200, "packed": True, "activation": "sigmoid"},  # tasks in a row
            {"rows": 65, "cols": 1024},  # several tasks in parallel
            {"rows": 33, "cols": 300, "activation": "relu"},
            {"rows": 40, "cols": 136, "packed": True, **_GPT_OSS},
        ],
        workloads=[{"rows": 4096, "cols": cols} for cols in (1024, 4096)],
        bytes_moved=lambda gate, up, **options: 3 * gate.nbytes,
        native=_torch_glu,
    )
)

GLU_PACKED = declare(
    Op(
        name="glu_packed",
        call=glu_packed,
        reference=glu_packed_reference,
        backends=BACKENDS,
        inputs=_packed_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0},  # empty rows
            {"rows": 5, "cols": 1, "activation": "sigmoid"},
            {"rows": 70, "cols": 127, "activation": "gelu"},  # up is misaligned
            {"rows": 33, "cols": 1000, "activation": "gelu_tanh", **_GPT_OSS | {"alpha": 1.0}},
            {"rows": 65, "cols": 512},
        ],
        workloads=[{"rows": 4096, "cols": cols} for cols in (1024, 4096)],
        bytes_moved=lambda x, **options: x.nbytes * 3 // 2,
        native=_torch_glu_packed,
    )
)

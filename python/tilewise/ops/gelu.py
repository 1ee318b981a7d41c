"""Gaussian error linear unit (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415), where
asked after a bias and before dropout (https://jmlr.org/papers/v15/srivastava14a.html).
"""

from typing import Any

import torch
from torch import Generator, Tensor

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
from tilewise.rng import as_arguments, dropped, seed_and_offset


@planned
def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Multiply `x` by the normal distribution function of `x`, exact or by the tanh formula.

        "none":  y = x * (1 + erf(x / sqrt(2))) / 2
        "tanh":  y = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2

    Computed in fp32 (fp64 for fp64 `x`) and rounded once.

    Args:
        x: `[...]`, floating point.
        approximate: "none" or "tanh".
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape and dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If `approximate` or `backend` is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    _check("gelu", x, approximate)
    chosen = choose(GELU, backend, x, approximate=approximate)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return gelu_reference(x, approximate)

    rows = as_rows(x if x.ndim else x.unsqueeze(0))
    y: Tensor
    if needs_gradient(x):
        y = _GELU.apply(rows, approximate, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _forward(rows, approximate, chosen)
    return shaped(y, x)


@planned
def bias_gelu(
    x: Tensor,
    bias: Tensor,
    approximate: str = "none",
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add `bias` to each row of `x`, apply the unit of `gelu`, then dropout.

        y = dropout(gelu(x + bias))

    Computed in fp32 (fp64 for fp64 `x`) and rounded once. Dropout zeroes an element with
    probability `dropout_p` and divides the others by 1 - `dropout_p`; which, the seed says
    (`tilewise.rng.keep_mask` at the row and column of `[rows, cols]`), the same on every backend.
    Nothing but `x` and `bias` is kept for the gradients: the mask is drawn again.

    Args:
        x: `[..., cols]`, floating point.
        bias: `[cols]`, on the device of `x`; fp32, or the dtype of `x`.
        approximate: "none" or "tanh".
        dropout_p: Probability of dropping an element, from 0 to 1.
        seed: int64; or a tensor `[]` or, one a row, `[rows]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape and dtype of `x`, also under autocast.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or a name is
            unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check("bias_gelu", x, approximate)
    _check_bias(x, bias, dropout_p)
    seed, offset = (
        seed_and_offset(
            "bias_gelu", x.numel() // max(x.shape[-1], 1), x.device, seed, offset, generator
        )
        if dropout_p
        else (0, 0)
    )
    options: dict[str, Any] = {
        "approximate": approximate, "dropout_p": dropout_p, "seed": seed, "offset": offset,
    }  # fmt: skip
    chosen = choose(BIAS_GELU, backend, x, bias, **options)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return bias_gelu_reference(x, bias, **options)

    arguments = (as_rows(x), bias.contiguous(), approximate, dropout_p, *as_arguments(seed, offset))
    y: Tensor
    if needs_gradient(x, bias):
        y = _BiasGELU.apply(*arguments, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _bias_forward(*arguments, chosen)
    return shaped(y, x)


def _check(op: str, x: Tensor, approximate: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be one of none, tanh, got {approximate!r}")


def _check_bias(x: Tensor, bias: Tensor, dropout_p: float) -> None:
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias_gelu: bias must be {x.dtype} or torch.float32, got {bias.dtype}")
    if x.ndim == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: x must be [..., cols] and bias [cols], "
            f"got {list(x.shape)} and {list(bias.shape)}"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"bias_gelu: dropout_p must be from 0 to 1, got {dropout_p}")
    if bias.device != x.device:
        raise RuntimeError(f"bias_gelu: bias must be on {x.device}, got {bias.device}")


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The formula of `gelu`, in plain PyTorch."""
    wide = x.to(wide_dtype(x.dtype))
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


def bias_gelu_reference(
    x: Tensor,
    bias: Tensor,
    approximate: str = "none",
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    offset: Tensor | int = 0,
) -> Tensor:
    """The formula of `bias_gelu`, in plain PyTorch."""
    y = torch.nn.functional.gelu(x.to(wide_dtype(x.dtype)) + bias, approximate=approximate)
    return dropped(y, dropout_p, seed, offset).to(x.dtype)


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


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        approximate: str,
        dropout_p: float,
        seeds: Tensor | None,
        offsets: Tensor | None,
        seed: int,
        offset: int,
        chosen: str,
    ) -> Tensor:
        ctx.save_for_backward(x, bias, seeds, offsets)
        ctx.options, ctx.numbers, ctx.chosen = (approximate, dropout_p), (seed, offset), chosen
        y: Tensor = _bias_forward(
            x, bias, approximate, dropout_p, seeds, offsets, seed, offset, chosen
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, seeds, offsets = ctx.saved_tensors
        approximate, dropout_p = ctx.options
        seed, offset = ctx.numbers
        unused = (None,) * 7
        if torch.is_grad_enabled():  # create_graph=True

            def reference(x: Tensor, bias: Tensor) -> Tensor:
                return bias_gelu_reference(
                    x, bias, approximate, dropout_p=dropout_p,
                    seed=seed if seeds is None else seeds,
                    offset=offset if offsets is None else offsets,
                )  # fmt: skip

            return *differentiable_gradients(reference, dy, (x, bias)), *unused
        wanted = ctx.needs_input_grad[:2]
        dx, dbias = _bias_backward(
            as_rows(dy), x, bias, approximate, dropout_p, seeds, offsets, seed, offset,
            *wanted, ctx.chosen,
        )  # fmt: skip
        return dx if wanted[0] else None, dbias if wanted[1] else None, *unused


BACKENDS = backends_of("gelu", cuda=takes_all, numba=takes_all, triton=takes_all)

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

_OPTIONS = (
    "str approximate, float dropout_p, Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset"
)
_bias_forward = register(
    f"bias_gelu_forward(Tensor x, Tensor bias, {_OPTIONS}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, *rest: x.new_empty(x.shape),
)
_bias_backward = register(
    f"bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, {_OPTIONS}, bool want_dx,"
    " bool want_dbias, str backend) -> (Tensor dx, Tensor dbias)",
    BACKENDS,
    fake=lambda dy, x, bias, *rest: (
        x.new_empty(x.shape if rest[-3] else 0),
        bias.new_empty(bias.shape if rest[-2] else 0),
    ),
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


def _bias_inputs(
    rows: int,
    cols: int,
    bias: str = "like x",
    approximate: str = "none",
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    x = torch.randn(rows, cols, device=device, dtype=dtype)
    kind = dtype if bias == "like x" else torch.float32
    return (x, torch.randn(cols, device=device, dtype=kind)), {"approximate": approximate} | options


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

_DROPOUT = {"dropout_p": 0.3, "seed": 2**40 + 7, "offset": 3}

BIAS_GELU = declare(
    Op(
        name="bias_gelu",
        call=bias_gelu,
        reference=bias_gelu_reference,
        backends=BACKENDS,
        inputs=_bias_inputs,
        sizes=[
            {"rows": 3, "cols": 8, **_DROPOUT},
            {"rows": 0, "cols": 64},  # no row, but a gradient of the bias
            {"rows": 3, "cols": 0, **_DROPOUT},  # empty rows
            {"rows": 1, "cols": 1, "approximate": "tanh"},
            {"rows": 67, "cols": 127, **_DROPOUT},  # misaligned, part of a group of four
            {"rows": 70, "cols": 136, "bias": "float32", "approximate": "tanh"},
            {"rows": 70, "cols": 16, "bias": "float32", **_DROPOUT},  # several rows in a part
            {"rows": 3, "cols": 4104},  # several tasks in a row
        ],
        workloads=[
            {"rows": 4096, "cols": cols, **options}
            for cols in (1024, 4096)
            for options in ({}, {"dropout_p": 0.1, "seed": 1})
        ],
        bytes_moved=lambda x, bias, **options: 2 * x.nbytes,
    )
)

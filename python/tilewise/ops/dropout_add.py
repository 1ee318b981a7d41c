"""Dropout (https://jmlr.org/papers/v15/srivastava14a.html) and the addition to a residual."""

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
def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add to `residual` what dropout leaves of `x`.

        y = residual + dropout(x)

    Dropout zeroes an element with probability `p` and divides the others by 1 - `p`; which, the
    seed says (`tilewise.rng.keep_mask` at the row and column of `[rows, cols]`), the same on every
    backend. Nothing is kept for the gradients but the seed: the mask is drawn again. Computed in
    fp32 (fp64 for fp64 `x`) and rounded once.

    Args:
        x: `[..., cols]`, floating point.
        residual: The shape and device of `x`; its dtype, or that of the arithmetic.
        p: Probability of dropping an element, from 0 to 1.
        training: Without it nothing is dropped.
        seed: int64; or a tensor `[]` or, one a row, `[rows]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The shape of `x`, the dtype of `residual`, also under autocast.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check(x, residual, p)
    p = float(p) if training else 0.0
    if p:
        rows = x.numel() // max(x.shape[-1], 1)
        seed, offset = seed_and_offset("dropout_add", rows, x.device, seed, offset, generator)
    else:
        seed, offset = 0, 0
    options: dict[str, Any] = {"p": p, "seed": seed, "offset": offset}
    chosen = choose(DROPOUT_ADD, backend, x, residual, **options)
    if chosen == "reference" or x.numel() == 0 or transforming():
        return dropout_add_reference(x, residual, **options)

    arguments = (as_rows(x), as_rows(residual), p, *as_arguments(seed, offset), chosen)
    run = _DropoutAdd.apply if needs_gradient(x, residual) else _forward
    y: Tensor = run(*arguments)  # type: ignore[no-untyped-call]
    return shaped(y, x)


def _check(x: Tensor, residual: Tensor, p: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"dropout_add: x must be floating point, got {x.dtype}")
    wide = wide_dtype(x.dtype)
    if residual.dtype not in (x.dtype, wide):
        raise TypeError(f"dropout_add: residual must be {x.dtype} or {wide}, got {residual.dtype}")
    if x.ndim == 0 or residual.shape != x.shape:
        raise ValueError(
            f"dropout_add: x and residual must be [..., cols] of one shape, "
            f"got {list(x.shape)} and {list(residual.shape)}"
        )
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_add: p must be from 0 to 1, got {p}")
    if residual.device != x.device:
        raise RuntimeError(f"dropout_add: residual must be on {x.device}, got {residual.device}")


def dropout_add_reference(
    x: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: Tensor | int = 0,
    offset: Tensor | int = 0,
) -> Tensor:
    """The formula of `dropout_add`, in plain PyTorch."""
    branch = dropped(x.to(wide_dtype(x.dtype)), p if training else 0.0, seed, offset)
    return (branch + residual).to(residual.dtype)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        p: float,
        seeds: Tensor | None,
        offsets: Tensor | None,
        seed: int,
        offset: int,
        chosen: str,
    ) -> Tensor:
        ctx.save_for_backward(seeds, offsets)
        ctx.numbers, ctx.chosen, ctx.dtype = (p, seed, offset), chosen, x.dtype
        y: Tensor = _forward(x, residual, p, seeds, offsets, seed, offset, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seeds, offsets = ctx.saved_tensors
        p, seed, offset = ctx.numbers
        dx = None
        if torch.is_grad_enabled():  # create_graph=True
            numbers = (seed if seeds is None else seeds, offset if offsets is None else offsets)
            dx = dropped(dy.to(wide_dtype(dy.dtype)), p, *numbers).to(ctx.dtype)
        elif ctx.needs_input_grad[0]:
            dx = dy.to(ctx.dtype)
            if p:
                dx = _backward(as_rows(dy), p, seeds, offsets, seed, offset, ctx.dtype, ctx.chosen)
        return dx, dy if ctx.needs_input_grad[1] else None, *((None,) * 6)


BACKENDS = backends_of("dropout_add", cuda=takes_all, numba=takes_all, triton=takes_all)

_OPTIONS = "float p, Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset"
_forward = register(
    f"dropout_add_forward(Tensor x, Tensor residual, {_OPTIONS}, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, residual, *rest: residual.new_empty(x.shape),
)
_backward = register(
    f"dropout_add_backward(Tensor dy, {_OPTIONS}, ScalarType dtype, str backend) -> Tensor",
    BACKENDS,
    fake=lambda dy, *rest: dy.new_empty(dy.shape, dtype=rest[-2]),
)


def _inputs(
    rows: int,
    cols: int,
    residual: str = "like x",
    each: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    x = torch.randn(rows, cols, device=device, dtype=dtype)
    kind = dtype if residual == "like x" else wide_dtype(dtype)
    options = {"p": 0.3, "seed": 2**40 + 7, "offset": 3} | options
    if each:
        numbers = torch.arange(rows, device=device)
        options |= {"seed": numbers * 2**40, "offset": numbers - 1}
    return (x, torch.randn(rows, cols, device=device, dtype=kind)), options


DROPOUT_ADD = declare(
    Op(
        name="dropout_add",
        call=dropout_add,
        reference=dropout_add_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"rows": 3, "cols": 8},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0},  # empty rows
            {"rows": 1, "cols": 1, "p": 1.0},
            {"rows": 7, "cols": 127},  # misaligned, part of a group of four
            {"rows": 70, "cols": 136, "residual": "wide"},  # two dtypes
            {"rows": 33, "cols": 100, "each": True},  # a seed and an offset a row
            {"rows": 3, "cols": 4104, "p": 0.0},  # several tasks in a row
        ],
        workloads=[{"rows": 4096, "cols": cols, "p": 0.1} for cols in (1024, 4096)],
        bytes_moved=lambda x, residual, **options: x.nbytes + 2 * residual.nbytes,
    )
)

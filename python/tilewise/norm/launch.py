"""The norms as torch ops, differentiated, and behind one front door."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.norm.formula import check_norm, check_residual, dropped, normalised
from tilewise.op import (
    Backend,
    Op,
    as_rows,
    differentiable_gradients,
    needs_gradient,
    register,
    shaped,
    transforming,
    wide_dtype,
)
from tilewise.rng import seed_and_offset

# --- What PyTorch sees.


@dataclass(frozen=True)
class Norm:
    """The torch ops of one norm, and whether it takes the mean off."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    centred: bool


_NORMS: dict[str, Norm] = {}

_DROPOUT = "float dropout_p, Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset"


def _statistics(x: Tensor, count: int) -> list[Tensor]:
    rows = x.numel() // max(x.shape[-1], 1)
    return [x.new_empty(rows, dtype=wide_dtype(x.dtype)) for _ in range(count)]


def _like(x: Tensor | None, wanted: bool = True) -> Tensor:
    assert x is not None
    return x.new_empty(x.shape if wanted else 0)


def register_norm(name: str, backends: Mapping[str, Backend], *, centred: bool) -> None:
    """Make `torch.ops.tilewise.<name>_forward` and `_backward`, for `normalise`.

    Statistics are `[rows]`, fp32, or fp64 for fp64 `x`. A gradient that is not wanted is empty.
    """
    names = ("mean", "rstd") if centred else ("rstd",)
    statistics = ", ".join(f"Tensor {n}" for n in names)
    count = len(names)
    forward = register(
        f"{name}_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
        f" str casting, str backend) -> (Tensor y, {statistics})",
        backends,
        fake=lambda x, *rest: (_like(x), *_statistics(x, count)),
    )
    backward = register(
        f"{name}_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, {statistics},"
        " float weight_offset, bool want_dx, bool want_dweight, bool want_dbias, str backend)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        backends,
        fake=lambda dy, x, weight, bias, *rest: (
            _like(x, rest[-4]),
            _like(weight, True) if rest[-3] else x.new_empty(0),
            _like(bias, True) if rest[-2] else x.new_empty(0),
        ),
    )
    _NORMS[name] = Norm(forward, backward, centred)


def register_add_norm(name: str, backends: Mapping[str, Backend], *, centred: bool) -> None:
    """Make `torch.ops.tilewise.<name>_forward` and `_backward`, for `add_and_normalise`.

    `sum` has the dtype of the residual, and the statistics are those of the sum as it is returned.
    """
    names = ("mean", "rstd") if centred else ("rstd",)
    statistics = ", ".join(f"Tensor {n}" for n in names)
    count = len(names)
    forward = register(
        f"{name}_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
        f" float weight_offset, str casting, {_DROPOUT}, str backend)"
        f" -> (Tensor y, Tensor sum, {statistics})",
        backends,
        fake=lambda x, residual, *rest: (_like(x), _like(residual), *_statistics(x, count)),
    )
    backward = register(
        f"{name}_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias,"
        f" {statistics}, float weight_offset, {_DROPOUT}, bool want_dx, bool want_dresidual,"
        " bool want_dweight, bool want_dbias, str backend)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
        backends,
        fake=lambda dy, dsum, total, weight, bias, *rest: (
            _like(dy, rest[-5]),
            _like(total, rest[-4]),
            _like(weight, True) if rest[-3] else dy.new_empty(0),
            _like(bias, True) if rest[-2] else dy.new_empty(0),
        ),
    )
    _NORMS[name] = Norm(forward, backward, centred)


# --- What the front doors do.


def walkable(x: Tensor) -> Tensor:
    """`x` itself if at most three strides lead from row to row, so heads need no copy; else rows.

    `[rows, cols]` or contiguous `[..., cols]` is the rule, `[batch, heads, seq, dim]` of a packed
    projection the exception.
    """
    if 2 < x.ndim <= 4 and x.stride(-1) == 1 and not x.is_contiguous():
        return x
    return as_rows(x)


def normalise(
    op: Op,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    backend: str | None,
) -> Tensor:
    """Check the arguments of the norm `op` and run it; a contiguous tensor of the shape of `x`."""
    check_norm(op.name, x, weight, bias, weight_offset, casting)
    options = {"eps": eps, "weight_offset": weight_offset, "casting": casting}
    chosen = choose(op, backend, x, weight, bias, **options)
    y: Tensor
    if chosen == "reference" or x.numel() == 0 or transforming():
        y = op.reference(x, weight, bias, **options)
        return y
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    arguments = (walkable(x), weight, bias, eps, weight_offset, casting)
    if needs_gradient(x, weight, bias):
        y = _Norm.apply(*arguments, op.name, chosen)  # type: ignore[no-untyped-call]
    else:
        y = _NORMS[op.name].forward(*arguments, chosen)[0]
    return shaped(y, x)


def add_and_normalise(
    op: Op,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    casting: str,
    dropout_p: float,
    seed: Tensor | int | None,
    offset: Tensor | int | None,
    generator: Generator | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """As `normalise`, for an op that adds: what is normalised, and the sum."""
    check_norm(op.name, x, weight, bias, weight_offset, casting)
    check_residual(op.name, x, residual, dropout_p)
    if dropout_p:
        rows = x.numel() // max(x.shape[-1], 1)
        seed, offset = seed_and_offset(op.name, rows, x.device, seed, offset, generator)
    else:
        seed, offset = 0, 0
    options = {
        "eps": eps, "weight_offset": weight_offset, "casting": casting,
        "dropout_p": dropout_p, "seed": seed, "offset": offset,
    }  # fmt: skip
    chosen = choose(op, backend, x, residual, weight, bias, **options)
    y: Tensor
    total: Tensor
    if chosen == "reference" or x.numel() == 0 or transforming():
        y, total = op.reference(x, residual, weight, bias, **options)
        return y, total
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    arguments = (
        as_rows(x), as_rows(residual), weight, bias, eps, weight_offset, casting,
        dropout_p, *_apart(seed, offset),
    )  # fmt: skip
    if needs_gradient(x, residual, weight, bias):
        y, total = _AddNorm.apply(*arguments, op.name, chosen)  # type: ignore[no-untyped-call]
    else:
        y, total, *_ = _NORMS[op.name].forward(*arguments, chosen)
    return shaped(y, x), shaped(total, x)


def _apart(*numbers: Tensor | int) -> tuple[Tensor | int | None, ...]:
    """What an op takes for some of them: tensors or None, then ints."""
    tensors = [n.contiguous() if isinstance(n, Tensor) else None for n in numbers]
    return *tensors, *(0 if isinstance(n, Tensor) else n for n in numbers)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        casting: str,
        name: str,
        chosen: str,
    ) -> Tensor:
        y: Tensor
        y, *statistics = _NORMS[name].forward(x, weight, bias, eps, weight_offset, casting, chosen)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.options = (eps, weight_offset, casting)
        ctx.name, ctx.chosen = name, chosen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        norm, unused = _NORMS[ctx.name], (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True
            options = (*ctx.options, x.dtype, norm.centred)
            grads = differentiable_gradients(normalised, dy, (x, weight, bias), *options)
            return *grads, *unused
        wanted = ctx.needs_input_grad[:3]
        grads = norm.backward(
            as_rows(dy), x, weight, bias, *statistics, ctx.options[1], *wanted, ctx.chosen
        )
        return *_only(wanted, grads), *unused


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        casting: str,
        dropout_p: float,
        seeds: Tensor | None,
        offsets: Tensor | None,
        seed: int,
        offset: int,
        name: str,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        options, dropout = (eps, weight_offset, casting), (dropout_p, seeds, offsets, seed, offset)
        y, total, *statistics = _NORMS[name].forward(
            x, residual, weight, bias, *options, *dropout, chosen
        )
        ctx.save_for_backward(weight, bias, seeds, offsets, total, *statistics)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.dropout = options, (dropout_p, seed, offset)
        ctx.name, ctx.chosen, ctx.dtype = name, chosen, x.dtype
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, bias, seeds, offsets, total, *statistics = ctx.saved_tensors
        norm, unused = _NORMS[ctx.name], (None,) * 10
        dropout_p, seed, offset = ctx.dropout
        if dy is None:  # only the sum was used
            dy = torch.zeros_like(total, dtype=ctx.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            tensors = (total, weight, bias)
            options = (*ctx.options, ctx.dtype, norm.centred)
            dtotal, *rest = differentiable_gradients(normalised, dy, tensors, *options)
            assert dtotal is not None
            dtotal = dtotal if dsum is None else dtotal + dsum
            numbers = (seed if seeds is None else seeds, offset if offsets is None else offsets)
            return dropped(dtotal, dropout_p, *numbers).to(ctx.dtype), dtotal, *rest, *unused
        wanted = ctx.needs_input_grad[:4]
        # Without dropout the two gradients are one, unless they are rounded differently.
        same = dropout_p == 0 and total.dtype == ctx.dtype
        written = (False, wanted[0] or wanted[1], *wanted[2:]) if same else wanted
        dx, dresidual, *rest = norm.backward(
            as_rows(dy), None if dsum is None else as_rows(dsum), total, weight, bias, *statistics,
            ctx.options[1], dropout_p, seeds, offsets, seed, offset, *written, ctx.chosen,
        )  # fmt: skip
        return *_only(wanted, (dresidual if same else dx, dresidual, *rest)), *unused


def _only(wanted: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted, None for the others."""
    return tuple(g if w else None for w, g in zip(wanted, grads, strict=True))

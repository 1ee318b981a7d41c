"""Attention as torch ops, differentiated, and behind one front door."""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.heads.checks import check_heads, check_options, up_to
from tilewise.heads.formula import Window, attended, limits, scale_of
from tilewise.heads.layout import in_rows, lowered, lse_of, same_layout
from tilewise.op import (
    HALVES,
    Op,
    autocast_dtype,
    backends_of,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.rng import as_arguments, seed_and_offset

# --- What PyTorch sees.

BACKENDS = backends_of(
    "attention",
    cuda=up_to(256, 2**29),  # sums in registers; places are ints
    cuda_dtypes=HALVES,  # what tensor cores take
    numba=takes_all,
    triton=up_to(256),  # a tile in registers
)


# Mask and bias are [batch, heads, seq_q, seq_k] or have 1 in the place of any of these; the columns
# of a bias are neighbours. Slopes are fp32, [batch, heads], which may be one and the same for each
# batch; sinks are [heads], contiguous. Bias and sinks have the dtype of q, or are fp32.
# Left and right are those of the window, -1 without limit: causal is a right of 0. A softcap of 0
# is none.
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks"
)
_NUMBERS = (
    "SymInt left, SymInt right, float softcap, float scale, float dropout_p, Tensor? seeds,"
    " Tensor? offsets, SymInt seed, SymInt offset"
)

# What a row keeps of its softmax is the highest of its scores and its sink, in units of log 2, and
# the sum of the powers of two above it, the sink's own among them: lse = ln 2 highest + ln total.
# Lse alone, rounded to fp32, would make every probability of the backward pass wrong by 2 eps or
# more. Where there is nothing to sum they are -inf and 0; where there is only the sink, out is 0.
_forward = register(
    f"attention_forward({_TENSORS}, {_NUMBERS}, str backend)"
    " -> (Tensor out, Tensor highest, Tensor total)",
    BACKENDS,
    fake=lambda q, k, v, *options: (
        same_layout(q, v.shape[-1]),
        q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype)),
        q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype)),
    ),
)


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, *options: Any,
) -> list[Tensor]:  # fmt: skip
    wanted = options[-6:-1]
    laid_out = [
        same_layout(t, t.shape[-1]) if w else q.new_empty(0)
        for w, t in zip(wanted, (q, k, v), strict=False)
    ]
    plain = [
        t.new_empty(t.shape) if w and t is not None else q.new_empty(0)
        for w, t in zip(wanted[3:], (bias, sinks), strict=True)
    ]
    return laid_out + plain


# With delta = sum(dout out) - dlse of a row, ds = p (dp - delta), of which the sum over what was
# broadcast is dbias, and dsink = -sum(exp(sink - lse) delta) over batch and queries. A gradient
# that is not wanted is empty; that of a bias which is one for all keys is never asked for.
_backward = register(
    f"attention_backward(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor highest,"
    f" Tensor total, {_NUMBERS}, bool want_dq, bool want_dk, bool want_dv, bool want_dbias,"
    " bool want_dsinks, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    BACKENDS,
    fake=_gradients,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        *tensors, left, right, softcap, scale, dropout_p, seeds, offsets, seed, offset = arguments[
            :-2
        ]
        with_lse, chosen = arguments[-2:]
        out: Tensor
        out, highest, total = _forward(*arguments[:-2], chosen)
        ctx.save_for_backward(*tensors, seeds, offsets, out, highest, total)
        ctx.numbers = (left, right, softcap, scale, dropout_p)
        ctx.draw, ctx.chosen = (seed, offset), chosen
        ctx.set_materialize_grads(False)
        return (out, lse_of(highest, total)) if with_lse else out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, slopes, sinks, seeds, offsets, *results = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(results[0])
        seed, offset = ctx.draw
        rest = (None,) * 11
        if torch.is_grad_enabled():  # create_graph=True
            draw = (seed if seeds is None else seeds, offset if offsets is None else offsets)

            def reference(
                q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None
            ) -> tuple[Tensor, ...]:
                both = attended(q, k, v, mask, bias, slopes, sinks, *ctx.numbers, *draw)
                return both[:1] if dlse is None else both

            douts = (dout,) if dlse is None else (dout, dlse)
            differentiable = (q, k, v, bias, sinks)
            dq, dk, dv, dbias, dsinks = differentiable_gradients(reference, douts, differentiable)
            return dq, dk, dv, None, dbias, None, dsinks, *rest
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 6)]
        flat = wanted[3] and bias.shape[3] == 1
        asked = [*wanted[:3], wanted[3] and not flat, wanted[4]]
        grads = _backward(
            in_rows(dout), None if dlse is None else dlse.contiguous(),
            q, k, v, mask, bias, slopes, sinks, *results,
            *ctx.numbers, seeds, offsets, seed, offset, *asked, ctx.chosen,
        )  # fmt: skip
        dq, dk, dv, dbias, dsinks = (g if w else None for g, w in zip(grads, wanted, strict=True))
        if flat:
            dbias = _flat_gradient(dout, dlse, bias, sinks, *results)
        return dq, dk, dv, None, dbias, None, dsinks, *rest


def _flat_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    bias: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    highest: Tensor,
    total: Tensor,
) -> Tensor:
    """The gradient of a bias that is the same for all keys of a query: without a sink it moves
    nothing but lse. With p the part of the sink, it is p sum(dout out) + (1 - p) dlse."""
    lse = lse_of(highest, total)
    rows = torch.zeros_like(lse) if dlse is None else dlse
    if sinks is not None:
        part = torch.exp(sinks.to(lse.dtype)[:, None] - lse).nan_to_num(0.0)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        rows = part * delta + (1 - part) * rows
    rows = rows.masked_fill(total == 0, 0.0)
    return rows[..., None].sum_to_size(bias.shape).to(bias.dtype)


# --- What the front doors do.


def attend(
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    generator: Generator | None,
    backend: str | None,
    with_lse: bool,
    **options: Any,
) -> Any:
    """Check the arguments of `op` and run it: out, or out and lse."""
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = (lowered(t, dtype) for t in (q, k, v))
        bias, sinks = (
            t if t is None or t.dtype == torch.float32 else lowered(t, dtype) for t in (bias, sinks)
        )
        with torch.autocast(q.device.type, enabled=False):  # for the products of the reference
            return attend(
                op, q, k, v, bias, sinks, generator=generator, backend=backend, with_lse=with_lse,
                **options,
            )  # fmt: skip
    check_heads(op.name, q, k, v)
    check_options(op.name, q, k, bias, sinks, **options)
    options["scale"] = scale_of(q, options["scale"])
    seed: Tensor | int = 0
    offset: Tensor | int = 0
    if options["dropout_p"]:
        seed, offset = seed_and_offset(
            op.name, 1, q.device, options["seed"], options["offset"], generator
        )
    options |= {"seed": seed, "offset": offset}
    chosen = choose(op, backend, q, k, v, bias, sinks, **options)
    if chosen == "reference" or transforming() or 0 in (q.numel(), k.numel(), v.numel()):
        return op.reference(q, k, v, bias, sinks, **options)

    arguments = (*_as_kernels_take(q, k, v, bias, sinks, **options), *as_arguments(seed, offset))
    if needs_gradient(q, k, v, bias, sinks):
        return _Attention.apply(*arguments, with_lse, chosen)  # type: ignore[no-untyped-call]
    out, highest, total = _forward(*arguments, chosen)
    return (out, lse_of(highest, total)) if with_lse else out


def _as_kernels_take(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    mask: Tensor | None,
    causal: bool,
    window: Window | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    dropout_p: float,
    scale: float,
    **drawn: Any,
) -> tuple[Any, ...]:
    """The arguments of the torch ops up to `dropout_p`."""
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        bias = bias if bias.shape[-1] == 1 else in_rows(bias)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(q.shape[:2])
    if sinks is not None:
        sinks = sinks.contiguous()
    left, right = limits(causal, window)
    return (
        in_rows(q), in_rows(k), in_rows(v), mask, bias, alibi_slopes, sinks,
        left, right, float(softcap or 0.0), scale, float(dropout_p),
    )  # fmt: skip


def reference_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int = 0,
    offset: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """out and lse by the formula, with the options as callers give them."""
    return attended(
        q, k, v, mask, bias, alibi_slopes, sinks, *limits(causal, window), softcap or 0.0,
        scale_of(q, scale), dropout_p, seed, offset,
    )  # fmt: skip

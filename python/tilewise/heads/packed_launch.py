"""Attention of packed sequences as torch ops, differentiated, and behind one front door."""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.heads.checks import up_to
from tilewise.heads.formula import Window, limits, scale_of
from tilewise.heads.layout import in_rows, lowered, lse_of, same_layout
from tilewise.heads.packed import check_packed, check_packed_options, packed_attended
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

PACKED_BACKENDS = backends_of(
    "attention", cuda=up_to(256, 2**29), cuda_dtypes=HALVES, numba=takes_all, triton=up_to(256)
)

# As `attention_forward` and `attention_backward`, of q [total_q, heads, dim], k and v [total_k,
# kv_heads, dim or v_dim]. Where sequences begin and end is int32, contiguous; the longest may be
# longer than the longest there is, and of a longer one the rest of the rows count for nothing, as
# those past the last. Statistics are [heads, total_q]. The bias is [batch or 1, heads or 1,
# max_seqlen_q, max_seqlen_k], its columns neighbours.
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks"
)
_NUMBERS = (
    "SymInt left, SymInt right, float softcap, float scale, float dropout_p, Tensor? seeds,"
    " Tensor? offsets, SymInt seed, SymInt offset"
)


def _results(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    highest = q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q.dtype))
    return same_layout(q, v.shape[-1]), highest, torch.empty_like(highest)


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, *options: Any,
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


_forward = register(
    f"attention_varlen_forward({_TENSORS}, {_NUMBERS}, str backend)"
    " -> (Tensor out, Tensor highest, Tensor total)",
    PACKED_BACKENDS,
    fake=_results,
)
_backward = register(
    f"attention_varlen_backward(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor highest,"
    f" Tensor total, {_NUMBERS}, bool want_dq, bool want_dk, bool want_dv, bool want_dbias,"
    " bool want_dsinks, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    PACKED_BACKENDS,
    fake=_gradients,
)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        *given, with_lse, chosen = arguments
        q, k, v, ends_q, ends_k, longest_q, longest_k, bias, slopes, sinks, *numbers = given
        *ctx.numbers, seeds, offsets, seed, offset = numbers
        out: Tensor
        out, highest, total = _forward(*given, chosen)
        tensors = (q, k, v, ends_q, ends_k, bias, slopes, sinks)
        ctx.save_for_backward(*tensors, seeds, offsets, out, highest, total)
        ctx.longest, ctx.draw, ctx.chosen = (longest_q, longest_k), (seed, offset), chosen
        ctx.set_materialize_grads(False)
        return (out, lse_of(highest, total)) if with_lse else out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *ends, bias, slopes, sinks, seeds, offsets, out, highest, total = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        seed, offset = ctx.draw
        places = (*ends, *ctx.longest)
        if torch.is_grad_enabled():  # create_graph=True
            draw = (seed if seeds is None else seeds, offset if offsets is None else offsets)

            def reference(
                q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None
            ) -> tuple[Tensor, ...]:
                both = packed_attended(q, k, v, *places, bias, slopes, sinks, *ctx.numbers, *draw)
                return both[:1] if dlse is None else both

            douts = (dout,) if dlse is None else (dout, dlse)
            grads = differentiable_gradients(reference, douts, (q, k, v, bias, sinks))
        else:
            wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7, 9)]
            found = _backward(
                in_rows(dout), None if dlse is None else dlse.contiguous(),
                q, k, v, *places, bias, slopes, sinks, out, highest, total,
                *ctx.numbers, seeds, offsets, seed, offset, *wanted, ctx.chosen,
            )  # fmt: skip
            grads = tuple(g if w else None for g, w in zip(found, wanted, strict=True))
        return *grads[:3], *(None,) * 4, grads[3], None, grads[4], *(None,) * 11


# --- What the front doors do.


def attend_packed(
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    generator: Generator | None,
    check_inputs: bool,
    backend: str | None,
    with_lse: bool,
    **options: Any,
) -> Any:
    """Check the arguments of `op` and run it: out, or out and lse."""
    ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = (lowered(t, dtype) for t in (q, k, v))
        bias, sinks = (
            t if t is None or t.dtype == torch.float32 else lowered(t, dtype) for t in (bias, sinks)
        )
        with torch.autocast(q.device.type, enabled=False):  # for the products of the reference
            return attend_packed(
                op, q, k, v, *ends, *longest, bias, sinks, generator=generator,
                check_inputs=check_inputs, backend=backend, with_lse=with_lse, **options,
            )  # fmt: skip
    check_packed(op.name, q, k, v, *ends, *longest, check_inputs)
    check_packed_options(op.name, q, cu_seqlens_q, *longest, bias, sinks, **options)
    options["scale"] = scale_of(q, options["scale"])
    seed: Tensor | int = 0
    offset: Tensor | int = 0
    if options["dropout_p"]:
        seed, offset = seed_and_offset(
            op.name, 1, q.device, options["seed"], options["offset"], generator
        )
    options |= {
        "seed": seed, "offset": offset, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    chosen = choose(op, backend, q, k, v, *ends, bias, sinks, **options)
    empty = 0 in (q.numel(), k.numel(), v.numel(), len(cu_seqlens_q) - 1, *longest)
    if chosen == "reference" or transforming() or empty:
        return op.reference(q, k, v, *ends, bias, sinks, **options)

    arguments = (
        *_as_kernels_take(q, k, v, *ends, bias, sinks, **options), *as_arguments(seed, offset)
    )  # fmt: skip
    if needs_gradient(q, k, v, bias, sinks):
        return _AttentionVarlen.apply(*arguments, with_lse, chosen)  # type: ignore[no-untyped-call]
    out, highest, total = _forward(*arguments, chosen)
    return (out, lse_of(highest, total)) if with_lse else out


def _as_kernels_take(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: Window | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    dropout_p: float,
    scale: float,
    **drawn: Any,
) -> tuple[Any, ...]:
    """The arguments of the torch ops up to `dropout_p`."""
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(len(cu_seqlens_q) - 1, q.shape[1])
    left, right = limits(causal, window)
    return (
        in_rows(q), in_rows(k), in_rows(v), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        max_seqlen_q, max_seqlen_k, None if bias is None else in_rows(bias), alibi_slopes,
        None if sinks is None else sinks.contiguous(),
        left, right, float(softcap or 0.0), scale, float(dropout_p),
    )  # fmt: skip

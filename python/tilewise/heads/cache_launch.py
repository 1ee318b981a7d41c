"""Decoding and appending as torch ops, and behind their front doors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.heads.cache import (
    append_reference_,
    capacity_of,
    check_append,
    check_decode,
    decoded,
)
from tilewise.heads.formula import Window, limits, scale_of
from tilewise.heads.layout import in_rows, lowered, same_layout
from tilewise.op import (
    HALVES,
    Op,
    autocast_dtype,
    backends_of,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.rotation import side_by_side


def _within(widest: int, longest: int) -> Callable[..., str | None]:
    """The `refuses` of a backend whose heads are at most so wide, and whose caches so long."""

    def refuses(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *rest: Any,
        block_table: Tensor | None = None,
        **options: Any,
    ) -> str | None:
        wide, room = max(q.shape[-1], v_cache.shape[-1]), capacity_of(k_cache, block_table)
        if wide > widest:
            return f"takes heads up to {widest} wide, got {wide}"
        if room > longest:
            return f"takes caches of up to {longest} tokens, got {room}"
        return None

    return refuses


CACHE_BACKENDS = backends_of(
    "attention",
    cuda=_within(256, 2**29),  # a row of sums in registers; positions are ints
    cuda_dtypes=HALVES,  # what tensor cores take
    numba=takes_all,
    triton=_within(256, 2**30),
)

# The rows of caches lie in one piece; lengths and the table are int32, contiguous. Without a table
# caches are [batch, kv_heads, capacity, dim], with one [pages, page_size, kv_heads, dim]. Slopes
# are [batch, heads]; left is that of the window, -1 without limit; a softcap of 0 is none.
_forward = register(
    "attention_decode_forward(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,"
    " Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, SymInt left, float softcap,"
    " float scale, str backend) -> (Tensor out, Tensor lse)",
    CACHE_BACKENDS,
    fake=lambda q, k_cache, v_cache, *options: (
        same_layout(q, v_cache.shape[-1]),
        q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype)),
    ),
)
# Positions without room, or of no page, are not written; a position that the tables do not have
# makes the rotated dims NaN.
_append = register(
    "append_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v,"
    " Tensor seq_lens_before, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved,"
    " str backend) -> ()",
    CACHE_BACKENDS,
    fake=lambda *arguments: None,
)


def decode(
    op: Op,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    *,
    check_inputs: bool,
    backend: str | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `op` and run it: out and lse."""
    if (dtype := autocast_dtype(q)) is not None:
        q = lowered(q, dtype)
        if sinks is not None and sinks.dtype != torch.float32:
            sinks = lowered(sinks, dtype)
        with torch.autocast(q.device.type, enabled=False):  # for the products of the reference
            return decode(
                op, q, k_cache, v_cache, seq_lens, sinks, check_inputs=check_inputs,
                backend=backend, **options,
            )  # fmt: skip
    check_decode(
        op.name, q, k_cache, v_cache, seq_lens, sinks, check_inputs=check_inputs, **options
    )
    options["scale"] = scale_of(q, options["scale"])
    chosen = choose(op, backend, q, k_cache, v_cache, seq_lens, sinks, **options)
    if (
        chosen == "reference"
        or transforming()
        or 0 in (q.numel(), k_cache.numel(), v_cache.numel())
    ):
        return decoded(q, k_cache, v_cache, seq_lens, sinks, **options)
    out: Tensor
    out, lse = _forward(*_as_kernels_take(q, k_cache, v_cache, seq_lens, sinks, **options), chosen)
    return out, lse


def _as_kernels_take(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    *,
    block_table: Tensor | None,
    window: Window | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Any, ...]:
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(q.shape[:2])
    return (
        in_rows(q), in_rows(k_cache), in_rows(v_cache), seq_lens.contiguous(),
        None if block_table is None else block_table.contiguous(), alibi_slopes,
        None if sinks is None else sinks.contiguous(), limits(True, window)[0],
        float(softcap or 0.0), scale,
    )  # fmt: skip


def append_(
    op: Op,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens_before: Tensor,
    *,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    check_inputs: bool,
    backend: str | None,
) -> None:
    """Check the arguments of `append_kv_` and run it, by a backend of `op`."""
    check_append(
        "append_kv_", k_cache, v_cache, k, v, seq_lens_before, block_table, cos, sin, check_inputs
    )
    chosen = choose(op, backend, k, k_cache, v_cache, seq_lens_before)
    if 0 in (k.numel(), k_cache.numel()):  # nothing to write, or nowhere
        return
    if chosen == "reference" or transforming() or v.numel() == 0:
        append_reference_(
            k_cache, v_cache, k, v, seq_lens_before, block_table=block_table, cos=cos, sin=sin,
            interleaved=interleaved,
        )  # fmt: skip
        return
    tables = (None if t is None else side_by_side(t) for t in (cos, sin))
    _append(
        k_cache, v_cache, in_rows(k), in_rows(v), seq_lens_before.contiguous(),
        None if block_table is None else block_table.contiguous(), *tables, interleaved, chosen,
    )  # fmt: skip

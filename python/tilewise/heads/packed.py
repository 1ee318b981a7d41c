"""Sequences packed one after the other, as attention takes them: formula and refusals."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tilewise.heads.checks import check_options
from tilewise.heads.formula import Window, attended, limits, scale_of
from tilewise.scores import check_dtype

# --- The formula.


def _rows_of(ends: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """Which row is position i of each sequence, `[batch, longest]`, and the lengths, `[batch]`.

    Where a sequence has no such position the row is `total`. Of one longer than `longest` only the
    first positions count.
    """
    begin = ends[:-1].long()
    lengths = (ends[1:].long() - begin).clamp(0, longest)
    positions = torch.arange(longest, device=ends.device)
    rows = begin[:, None] + positions
    inside = (positions < lengths[:, None]) & (rows >= 0) & (rows < total)
    return torch.where(inside, rows, total), lengths


def _padded(x: Tensor, rows: Tensor) -> Tensor:
    """Packed `[total, heads, dim]` as `[batch, heads, longest, dim]`, zeros where there is none."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[rows].transpose(1, 2)


def _packed(x: Tensor, ends: Tensor, total: int, empty: float) -> Tensor:
    """`[batch, heads, longest, ...]` as packed `[total, heads, ...]`, `empty` past the last."""
    longest, batch = x.shape[2], x.shape[0]
    rows = torch.arange(total, device=ends.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, rows, right=True) - 1
    known = (sequence >= 0) & (sequence < batch)
    sequence = sequence.where(known, 0)
    position = rows - ends[sequence]
    known = known & (position >= 0) & (position < longest)
    place = torch.where(known, sequence * longest + position, batch * longest)
    flat = x.transpose(1, 2).flatten(0, 1)
    return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), empty)])[place]


def packed_attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse, `[heads, total_q]`: each sequence by the formula, padded to the longest.

    `options` are those of `weights` from the slopes on.
    """
    rows_q, lengths_q = _rows_of(cu_seqlens_q, max_seqlen_q, len(q))
    rows_k, lengths_k = _rows_of(cu_seqlens_k, max_seqlen_k, len(k))
    mask = (rows_q < len(q))[:, None, :, None] & (rows_k < len(k))[:, None, None, :]
    own = torch.arange(max_seqlen_q, device=q.device) + (lengths_k - lengths_q)[:, None, None]
    out, lse = attended(
        _padded(q, rows_q), _padded(k, rows_k), _padded(v, rows_k), mask, bias, *options, own
    )
    lse = _packed(lse, cu_seqlens_q, len(q), float("-inf"))
    return _packed(out, cu_seqlens_q, len(q), 0.0), lse.mT


def packed_reference_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    return packed_attended(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, alibi_slopes, sinks,
        *limits(causal, window), softcap or 0.0, scale_of(q, scale), dropout_p, seed, offset,
    )  # fmt: skip


# --- What is refused.


def check_packed(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    check_inputs: bool,
) -> None:
    """Refuse what are no packed queries, keys and values."""
    _check_heads(op, q, k, v)
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be torch.int32, got {ends.dtype}")
        if ends.ndim != 1 or ends.numel() == 0:
            raise ValueError(f"{op}: {name} must be [batch + 1], got {list(ends.shape)}")
        if ends.device != q.device:
            raise RuntimeError(f"{op}: {name} must be on {q.device}, got {ends.device}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must be [{len(cu_seqlens_q)}] like cu_seqlens_q, "
            f"got {list(cu_seqlens_k.shape)}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
            raise TypeError(f"{op}: {name} must be an int, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {longest}")
    if check_inputs:
        _check_ends(op, "cu_seqlens_q", cu_seqlens_q, len(q), "max_seqlen_q", max_seqlen_q)
        _check_ends(op, "cu_seqlens_k", cu_seqlens_k, len(k), "max_seqlen_k", max_seqlen_k)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must be floating point, got {q.dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype} like q, got {t.dtype}")
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            f"{op}: q, k and v must be [total, heads, dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{op}: k must be [total_k, kv_heads, {q.shape[2]}] for this q, got {list(k.shape)}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{op}: v must be [{k.shape[0]}, {k.shape[1]}, v_dim] for this k, got {list(v.shape)}"
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: heads of q must be a multiple of those of k, got {heads} and {kv_heads}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.device != q.device:
            raise RuntimeError(f"{op}: {name} must be on {q.device}, got {t.device}")


def _check_ends(op: str, name: str, ends: Tensor, total: int, limit: str, longest: int) -> None:
    """Refuse by the numbers themselves, which waits for the device."""
    known = ends.tolist()
    if known[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {known[0]}")
    for i, (begin, end) in enumerate(pairwise(known)):
        if end < begin:
            raise ValueError(f"{op}: {name} must not decrease, got {begin} and {end} at {i}")
        if end - begin > longest:
            raise ValueError(
                f"{op}: {limit} must be at least the longest sequence, "
                f"got {longest} and {end - begin} at {i}"
            )
    if known[-1] > total:
        raise ValueError(f"{op}: {name} must end at most at {total}, got {known[-1]}")


def check_packed_options(
    op: str,
    q: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    sinks: Tensor | None,
    **options: Any,
) -> None:
    """Refuse what is wrong with the options of attention of these packed queries."""
    batch, heads = len(cu_seqlens_q) - 1, q.shape[1]
    if bias is not None:
        check_dtype(op, "bias", bias, q)
        pairs = zip(bias.shape[:2], (batch, heads), strict=False)
        ends = (max_seqlen_q, max_seqlen_k)
        if bias.ndim != 4 or bias.shape[2:] != ends or any(n not in (1, m) for n, m in pairs):
            raise ValueError(
                f"{op}: bias must be [1 or {batch}, 1 or {heads}, {ends[0]}, {ends[1]}], "
                f"got {list(bias.shape)}"
            )
        if bias.device != q.device:
            raise RuntimeError(f"{op}: bias must be on {q.device}, got {bias.device}")
    each = q.transpose(0, 1).expand(batch, -1, -1, -1)
    check_options(op, each, each, None, sinks, mask=None, **options)

"""Attention on the CPU: launches of what `_attend` and `_attend_back` compute."""

import math

import numpy as np
import torch
from torch import Tensor

from tilewise.kernels.numba import _append, _attend, _attend_back, _decode, _deltas
from tilewise.kernels.numba._amx import multiplies_tiles
from tilewise.kernels.numba._lanes import LANES
from tilewise.kernels.numba._online_softmax import scaling
from tilewise.kernels.numba._operands import MULTIPLIES_PAIRS, PAIR, TILED_PAIR
from tilewise.kernels.numba._rules import KEYS, SCORED, rules_of
from tilewise.kernels.numba._shared import (
    broadcast_strides,
    parts_for,
    same_layout,
    thread_scratch,
    wide_dtype,
)
from tilewise.kernels.numba._simd import KINDS, address, kind
from tilewise.kernels.numba._tiles import ROUND, rounded

# Dq is summed in parts while there are fewer tasks, and memory, than this. By the sizes alone, so
# that the bits do not depend on the number of threads.
TASKS = 8
PART_ELEMENTS = 1 << 26

FEW_QUERIES = 64  # of a head: below, the heads that share a key are on the lanes together


def _scaling(q: Tensor, rules: tuple, scale: float) -> tuple[float, tuple[float, float]]:
    """The sign of the scale, and what takes a score to units of log 2: with natural scores their
    scale is among the rules."""
    double = q.dtype == torch.float64
    sign, _, factors = scaling(scale, double)
    return sign, scaling(1.0, double)[2] if rules[SCORED] else factors


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, right: int, softcap: float,
    scale: float, *dropout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask and bias
    broadcastable, slopes [batch, heads], sinks [heads]
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    batch, heads, seq_q, _ = q.shape
    out = same_layout(q, v.shape[3])
    highest = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    total = torch.empty_like(highest)
    sizes = (batch, heads, k.shape[1], seq_q, k.shape[2])
    strides = (*(t.stride()[:3] for t in (out, q, k, v)), total.stride())
    given = (mask, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    _attend_all(out, highest, total, q, k, v, sizes, strides, WHOLE, given, scale)
    return out, highest, total


def attention_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, left: int, right: int, softcap: float, scale: float, *dropout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [total_q, heads, dim], k, v [total_k, kv_heads, dim or v_dim], ends of sequences
    [batch + 1], bias [batch or 1, heads or 1, max_seqlen_q, max_seqlen_k], slopes [batch, heads],
    sinks [heads] -> out [total_q, heads, v_dim] laid out as q; highest, total [heads, total_q]."""
    out = same_layout(q, v.shape[2]).zero_()  # past the last sequence nobody writes
    highest = q.new_full((q.shape[1], len(q)), -math.inf, dtype=wide_dtype(q.dtype))
    total = torch.zeros_like(highest)
    sizes = (len(cu_seqlens_q) - 1, q.shape[1], k.shape[1], max_seqlen_q, max_seqlen_k)
    strides = (*map(_of_packed, (out, q, k, v)), (0, *total.stride()))
    ends = _ends(cu_seqlens_q, q), _ends(cu_seqlens_k, k)
    given = (None, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    _attend_all(out, highest, total, q, k, v, sizes, strides, ends, given, scale)
    return out, highest, total


WHOLE = (0, 0), (0, 0)  # the ends of sequences, where none are packed


def _ends(cu_seqlens: Tensor, rows: Tensor) -> tuple[int, int]:
    return address(cu_seqlens), len(rows)


def _of_packed(x: Tensor) -> tuple[int, int, int]:
    """Strides of [batch, heads, rows] of packed [total, heads, dim], where no batch is a step."""
    return 0, x.stride(1), x.stride(0)


def _attend_all(
    out: Tensor, highest: Tensor, total: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sizes: tuple[int, ...], strides: tuple, ends: tuple, given: tuple, scale: float,
) -> None:  # fmt: skip
    batch, heads, kv_heads, seq_q, seq_k = sizes
    dim, v_dim, mask, sinks = q.shape[-1], v.shape[-1], given[0], given[3]
    group = heads // kv_heads
    own_padding = mask is not None and mask.shape[2] == 1 and mask.shape[1] > 1
    shared = group if seq_q < FEW_QUERIES and not own_padding else 1
    items = batch * heads // shared * -(-seq_q * shared // int(_attend.BLOCK))
    counter, scratch, size = thread_scratch(highest, _attend.scratch_of(dim, v_dim))
    rules = rules_of(q, *given)
    _attend.attend(
        torch.get_num_threads(), total.numel() * seq_k, address(counter), items,
        address(scratch), size, (address(out), address(highest), address(total)),
        (address(q), address(k), address(v), address(sinks)),
        (kind(q), kind(total), kind(q if sinks is None else sinks), total.itemsize,
         *_tiles_of(q, v)),
        (heads, kv_heads, seq_q, seq_k, dim, v_dim, shared), strides, ends, rules,
        *_scaling(q, rules, scale),
    )  # fmt: skip


def _tiles_of(q: Tensor, v: Tensor) -> tuple:
    """The kinds of a tile and of its rows: words of two bf16 where the CPU multiplies those, if a
    block of them fits in the scratch for scores."""
    widest = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.bfloat16 and MULTIPLIES_PAIRS and widest <= 8 * int(KEYS):
        return TILED_PAIR if multiplies_tiles() else PAIR, kind(q)
    wide = KINDS[wide_dtype(q.dtype)]
    return wide, wide


def _width(q: Tensor, v: Tensor) -> int:
    """Numbers in a row of a tile of queries."""
    per = 2 if isinstance(_tiles_of(q, v)[0], np.integer) else 1
    return rounded(-(-q.shape[-1] // per)) * per


def _size(scale: float) -> float:
    return abs(scale) if scale else 1.0  # the sign, 0 among them, goes to the queries


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor,
    highest: Tensor, total: Tensor, left: int, right: int, softcap: float, scale: float,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    want_dq: bool, want_dk: bool, want_dv: bool, want_dbias: bool, want_dsinks: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_forward`, dlse [batch, heads, seq_q] -> dq, dk, dv laid out as q, k
    and v, dbias and dsinks of the shapes of bias and sinks; what is not wanted is empty."""
    dropout = (dropout_p, seeds, offsets, seed, offset)
    given = (mask, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    batch, heads, seq_q, dim = q.shape
    sizes = (batch, heads, k.shape[1], seq_q, k.shape[2])
    dk = same_layout(k, dim) if want_dk else q.new_empty(0)
    dv = same_layout(v, v.shape[3]) if want_dv else q.new_empty(0)
    lines, width = rounded(seq_q), _width(q, v)
    place = (batch * heads * lines * width, (heads * lines * width, lines * width, width))
    strides = [t.stride()[:3] if t.numel() else (0, 0, 0) for t in (dk, dv, dout, q, k, v, out)]
    strides.append(total.stride())
    sums, dbias, dsinks = _differentiate(
        (dout, dlse, q, k, v, out, highest, total), (dk, dv), sizes, strides, place, WHOLE, given,
        scale, (want_dq, want_dk, want_dv, want_dbias, want_dsinks),
    )  # fmt: skip
    dq = q.new_empty(0)
    if want_dq:
        whole = sums.view(batch, heads, lines, width)[:, :, :seq_q, :dim]
        dq = same_layout(q, dim).copy_(whole)
    return dq, dk, dv, dbias, dsinks


def attention_varlen_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor, highest: Tensor, total: Tensor,
    left: int, right: int, softcap: float, scale: float, dropout_p: float, seeds: Tensor | None,
    offsets: Tensor | None, seed: int, offset: int, want_dq: bool, want_dk: bool, want_dv: bool,
    want_dbias: bool, want_dsinks: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_varlen_forward`, dlse [heads, total_q] -> dq, dk, dv laid out as q,
    k and v, dbias and dsinks of the shapes of bias and sinks; what is not wanted is empty."""
    dropout = (dropout_p, seeds, offsets, seed, offset)
    given = (None, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    (rows, heads, dim), batch = q.shape, len(cu_seqlens_q) - 1
    sizes = (batch, heads, k.shape[1], max_seqlen_q, max_seqlen_k)
    dk = same_layout(k, dim).zero_() if want_dk else q.new_empty(0)
    dv = same_layout(v, v.shape[2]).zero_() if want_dv else q.new_empty(0)
    # Before each sequence is room to pad the one before, and behind the last a row of zeros.
    lines, width = rows + batch * ROUND + 1, _width(q, v)
    place = (heads * lines * width, (ROUND * width, lines * width, width))
    strides = [_of_packed(t) if t.numel() else (0, 0, 0) for t in (dk, dv, dout, q, k, v, out)]
    strides.append((0, *total.stride()))
    ends = _ends(cu_seqlens_q, q), _ends(cu_seqlens_k, k)
    sums, dbias, dsinks = _differentiate(
        (dout, dlse, q, k, v, out, highest, total), (dk, dv), sizes, strides, place, ends, given,
        scale, (want_dq, want_dk, want_dv, want_dbias, want_dsinks),
    )  # fmt: skip
    dq = q.new_empty(0)
    if want_dq:
        lying = _places_in(cu_seqlens_q, max_seqlen_q, rows, lines - 1)
        whole = sums.view(heads, lines, width)[:, lying, :dim]
        dq = same_layout(q, dim).copy_(whole.transpose(0, 1))
    return dq, dk, dv, dbias, dsinks


def _places_in(cu_seqlens: Tensor, longest: int, rows: int, none: int) -> Tensor:
    """In which line of the padded sums of dq each row is, `none` for those of no sequence."""
    row = torch.arange(rows)
    sequence = torch.searchsorted(cu_seqlens, row.int(), right=True) - 1
    known = (sequence >= 0) & (sequence < len(cu_seqlens) - 1)
    sequence = sequence.where(known, 0)
    known &= row - cu_seqlens[sequence] < longest
    return torch.where(known, row + ROUND * sequence, none)


def _differentiate(
    ins: tuple[Tensor | None, ...], grads: tuple[Tensor, Tensor], sizes: tuple[int, ...],
    strides: list, place: tuple, ends: tuple, given: tuple, scale: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq as padded sums, dbias and dsinks, empty if not wanted; dk and dv go to `grads`.

    `place` is how large a part of dq is, and the strides of its batches, heads and rows.
    """
    dout, dlse, q, k, v, out, highest, total = ins
    (batch, heads, kv_heads, seq_q, seq_k), (bias, sinks) = sizes, (given[1], given[3])
    dim, v_dim = q.shape[-1], v.shape[-1]
    *want, want_dsinks = wanted
    rules = rules_of(q, *given)
    sign, factors = _scaling(q, rules, scale)
    # Batches and heads that have one bias are in one item, which adds to its gradient alone.
    shared = want[3] and bias is not None
    at_once = batch if shared and bias.shape[0] == 1 else 1
    heads_at_once = kv_heads if shared and bias.shape[1] == 1 else 1
    units, tiles = batch // at_once * (kv_heads // heads_at_once), -(-seq_k // int(KEYS))
    parts = min(tiles, max(TASKS // units, 1), max(PART_ELEMENTS // q.numel(), 1))
    sums = total.new_zeros(parts if want[0] else 0, place[0])
    dbias = total.new_zeros(bias.shape) if want[3] else None
    delta = torch.empty_like(total)
    parts_of_rows = parts_for(batch * heads)
    _deltas.sum_products(
        parts_of_rows, 2 * dout.numel(), parts_of_rows,
        *map(address, (delta, dout, dlse, out)), (kind(q), kind(total)),
        (batch, heads, seq_q, v_dim), (strides[2], strides[6]), strides[7], ends[0],
    )  # fmt: skip
    if any(want):
        counter, scratch, size = thread_scratch(total, _attend_back.scratch_of(dim, v_dim))
        _attend_back.differentiate(
            torch.get_num_threads(), 2 * total.numel() * seq_k, address(counter), units * parts,
            address(scratch), size, tuple(map(address, (sums, *grads, dbias))),
            tuple(map(address, (dout, dlse, q, k, v, highest, total, delta))),
            (kind(q), kind(total), total.itemsize, *_tiles_of(q, v)),
            (batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, parts, at_once, heads_at_once),
            (*strides[:6], strides[7], broadcast_strides(dbias), (place[0], *place[1])), ends,
            rules, tuple(map(int, want)), sign, _size(scale), factors,
        )  # fmt: skip
    for part in sums[1:]:
        sums[0] += part
    dsinks = q.new_empty(0)
    if want_dsinks:
        dsinks = sinks.new_empty(heads)
        _deltas.differentiate_sinks(
            heads, total.numel(), address(dsinks), address(sinks),
            tuple(map(address, (highest, total, delta))), (kind(total), kind(sinks)),
            (batch, seq_q), strides[7], ends[0], factors,
        )  # fmt: skip
    dq = sums[0].mul_(scale) if want[0] else q.new_empty(0)
    return dq, q.new_empty(0) if dbias is None else dbias.to(bias.dtype), dsinks


def _cache_of(cache: Tensor, block_table: Tensor | None) -> tuple[tuple[int, ...], int, int]:
    """A cache as a kernel takes it: the address and stride of its table, the size and number of its
    pages, and its capacity; then how many heads it has, and which of its dims is the position."""
    if block_table is None:
        return (0, 0, cache.shape[2], len(cache), cache.shape[2]), cache.shape[1], 2
    capacity = block_table.shape[1] * cache.shape[1]
    pages = (address(block_table), block_table.stride(0), cache.shape[1], len(cache), capacity)
    return pages, cache.shape[2], 1


def _by_position(cache: Tensor, place: int) -> tuple[int, int, int]:
    """Strides of [batch or page, head, position]."""
    return cache.stride(0), cache.stride(3 - place), cache.stride(place)


def attention_decode_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, q_len, dim], caches [batch, kv_heads, capacity, dim or v_dim] or, of pages,
    [pages, page_size, kv_heads, dim or v_dim], seq_lens [batch], block_table [batch, max_pages],
    slopes [batch, heads], sinks [heads] -> out [batch, heads, q_len, v_dim] laid out as q, lse
    [batch, heads, q_len]."""
    batch, heads, seq_q, dim = q.shape
    v_dim, lanes = v_cache.shape[3], LANES // (1 + (q.dtype == torch.float64))
    out = same_layout(q, v_dim)
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    cache, kv_heads, place = _cache_of(k_cache, block_table)
    capacity, shared = cache[-1], heads // kv_heads * seq_q
    step = _decode.step_of(shared, lanes)
    rows = -(-shared // step) * step
    width, v_width = (-(-n // lanes) * lanes for n in (dim, v_dim))
    splits = -(-capacity // int(_decode.SPLIT))
    items = batch * kv_heads * splits
    sizes = (heads, kv_heads, seq_q, dim, v_dim, splits, rows, step, width, v_width, capacity)
    work = lse.new_empty(items * _decode.work_of(rows, width, v_width))
    slope_strides = (0, 0) if alibi_slopes is None else alibi_slopes.stride()
    strides = (_by_position(k_cache, place), _by_position(v_cache, place), slope_strides)
    _decode.attend_split(
        items, lse.numel() * capacity * dim, address(work),
        (address(q), address(k_cache), address(v_cache), address(seq_lens), address(alibi_slopes)),
        (kind(q), kind(lse), q.itemsize, lse.itemsize), sizes, (q.stride()[:3], *strides), cache,
        (scale, softcap, left),
    )  # fmt: skip
    _decode.merge_splits(
        lse.numel(), lse.numel() * v_dim * splits, address(work),
        (address(out), address(lse)), (address(seq_lens), address(sinks)),
        (kind(q), kind(lse), kind(q if sinks is None else sinks), lse.itemsize), sizes,
        out.stride()[:3], left,
    )  # fmt: skip
    return out, lse


def append_kv_(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seq_lens_before: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """Caches as in `attention_decode_forward`, k, v [batch, kv_heads, new, dim or v_dim],
    seq_lens_before [batch], tables [positions, half], written to the caches."""
    cache, _, place = _cache_of(k_cache, block_table)
    tables = (0, 0, 0, 0, cache[-1], 0)  # all positions are turned, in no dims
    if cos is not None:
        tables = (address(cos), address(sin), cos.stride(0), sin.stride(0), *cos.shape)
    parts = parts_for(k.shape[0] * k.shape[1] * k.shape[2])
    _append.append(
        parts, k.numel() + v.numel(), parts, (address(k_cache), address(v_cache)),
        (address(k), address(v), address(seq_lens_before)), tables,
        (kind(k), kind(k if cos is None else cos)), (*k.shape, v.shape[3]),
        (*(_by_position(t, place) for t in (k_cache, v_cache)), k.stride()[:3], v.stride()[:3]),
        cache, interleaved,
    )  # fmt: skip

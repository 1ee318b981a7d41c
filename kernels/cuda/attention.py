"""Attention in CUDA C++ by the tensor cores of every GPU since Ampere, in fp16 and bf16."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import (
    DTYPES,
    MAX_PARTS,
    address,
    broadcast_strides,
    draw,
    stream,
)

LOG2_E = math.log2(math.e)
_MANY = 32  # keys; delta is then off by less than the scores' gradients are


def _laid_out(x: Tensor, cols: int) -> Tensor:
    """An empty [..., cols] whose other dims lie in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def _rows(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of each its first three strides, 0 along a dim of 1, where any will do."""
    return tuple(stride for t in tensors for stride in broadcast_strides(t)[:3])


def _packed_rows(*tensors: Tensor | None) -> tuple[int, ...]:
    """The same of packed [total, heads, dim], where a step of the batch is a row."""
    strides = ((0, 0) if t is None else broadcast_strides(t)[:2] for t in tensors)
    return tuple(stride for row, head in strides for stride in (row, head, row))


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """At the end how many rows are packed: none."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    return batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, 0, 0


def _packed_sizes(
    q: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[int, ...]:
    (rows_q, heads, dim), (rows_k, kv_heads, v_dim) = q.shape, v.shape
    batch = len(cu_seqlens) - 1
    return batch, heads, kv_heads, max_seqlen_q, max_seqlen_k, dim, v_dim, rows_q, rows_k


def _options(
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, left: int, right: int,
    softcap: float, scale: float, *dropout: Any,
) -> tuple[int | float, ...]:  # fmt: skip
    """What follows the strides of q, k and v, up to the dtypes."""
    slopes = (0, 0) if alibi_slopes is None else alibi_slopes.stride()
    return (
        *broadcast_strides(mask), *broadcast_strides(bias), *slopes, left, right, softcap, scale,
        *draw(*dropout),
    )  # fmt: skip


def _dtypes(q: Tensor, bias: Tensor | None, sinks: Tensor | None) -> tuple[int, ...]:
    """Of all three, and the stream; what is missing is like q."""
    return *(DTYPES[(q if t is None else t).dtype] for t in (q, bias, sinks)), stream(q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, right: int, softcap: float,
    scale: float, dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask and bias
    broadcastable, alibi_slopes [batch, heads], sinks [heads]
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    out = _laid_out(q, v.shape[-1])
    highest = q.new_empty(q.shape[:3], dtype=torch.float32)
    total = torch.empty_like(highest)
    tensors = out, highest, total, q, k, v, mask, bias, alibi_slopes, sinks, None, None
    _cuda.attention_forward(
        *map(address, tensors), *_sizes(q, v), *_rows(out, q, k, v),
        *_options(
            mask, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
            offset,
        ),
        *_dtypes(q, bias, sinks),
    )  # fmt: skip
    return out, highest, total


def attention_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, left: int, right: int, softcap: float, scale: float, dropout_p: float,
    seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [total_q, heads, dim], k, v [total_k, kv_heads, dim or v_dim], ends of sequences
    [batch + 1], bias [batch or 1, heads or 1, max_seqlen_q, max_seqlen_k], slopes [batch, heads],
    sinks [heads] -> out [total_q, heads, v_dim] laid out as q; highest, total [heads, total_q]."""
    out = _laid_out(q, v.shape[-1]).zero_()  # past the last sequence nobody writes
    highest = q.new_full((q.shape[1], len(q)), -math.inf, dtype=torch.float32)
    total = torch.zeros_like(highest)
    tensors = (
        out, highest, total, q, k, v, None, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k
    )  # fmt: skip
    _cuda.attention_forward(
        *map(address, tensors), *_packed_sizes(q, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k),
        *_packed_rows(out, q, k, v),
        *_options(
            None, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
            offset,
        ),
        *_dtypes(q, bias, sinks),
    )  # fmt: skip
    return out, highest, total


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor,
    highest: Tensor, total: Tensor, left: int, right: int, softcap: float, scale: float,
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
    *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_forward`, dlse [batch, heads, seq_q] -> dq, dk, dv, laid out as q, k
    and v, dbias and dsinks; what is not wanted is empty."""
    given = (q, k, v, mask, bias, alibi_slopes, sinks, None, None)
    options = _options(
        mask, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
        offset,
    )  # fmt: skip
    results = (out, highest, total)
    return _differentiate(dout, dlse, results, given, _sizes(q, v), _rows, options, wanted)


def attention_varlen_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor, highest: Tensor, total: Tensor,
    left: int, right: int, softcap: float, scale: float, dropout_p: float, seeds: Tensor | None,
    offsets: Tensor | None, seed: int, offset: int, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_varlen_forward`, dlse [heads, total_q] -> dq, dk, dv laid out as q,
    k and v, dbias and dsinks; what is not wanted is empty."""
    given = (q, k, v, None, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    options = _options(
        None, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
        offset,
    )  # fmt: skip
    sizes = _packed_sizes(q, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    results = (out, highest, total)
    return _differentiate(dout, dlse, results, given, sizes, _packed_rows, options, wanted)


def _differentiate(
    dout: Tensor, dlse: Tensor | None, results: tuple[Tensor, ...],
    given: tuple[Tensor | None, ...], sizes: tuple[int, ...],
    rows_of: Callable[..., tuple[int, ...]], options: tuple[int | float, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dbias and dsinks, from what the forward pass returned and was given."""
    q, k, v, _, bias, _, sinks, ends, _ = given
    out, highest, total = results
    want_dq, want_dk, want_dv, want_dbias, want_dsinks = wanted

    def unwritten(x: Tensor) -> Tensor:
        dx = _laid_out(x, x.shape[-1])
        return dx if ends is None else dx.zero_()  # of rows of no sequence

    dq = unwritten(q) if want_dq else None
    statistics = q.new_empty(3, *highest.shape, dtype=torch.float32)
    dbias = _written_with_dq(given, sizes, options) if want_dbias else None
    exact = (want_dbias and dbias is None) or (
        want_dsinks and sinks is not None and sinks.dtype == torch.float32
    )
    dtypes = _dtypes(q, bias, sinks)
    _cuda.attention_queries_backward(
        *map(address, (dq, dbias, statistics, dout, dlse, out, highest, total, *given)),
        *sizes, *rows_of(dq, dout, out, q, k, v), *options, exact, *dtypes,
    )  # fmt: skip
    dk = dv = dsinks = None
    if want_dk or want_dv:
        dk, dv = unwritten(k), unwritten(v)
        _cuda.attention_keys_backward(
            *map(address, (dk, dv, dout, statistics, *given)),
            *sizes, *rows_of(dk, dv, dout, q, k, v), *options, *dtypes,
        )  # fmt: skip
    if want_dbias and dbias is None and bias is not None:
        sums = _parts_of(bias, sizes)
        _cuda.attention_bias_backward(
            *map(address, (sums, dout, statistics, *given)), *sizes, *rows_of(dout, q, k, v),
            *options, *bias.shape[:3], len(sums), *dtypes,
        )  # fmt: skip
        dbias = sums[0] if len(sums) == 1 else sums.sum(0).to(bias.dtype)
    if want_dsinks and sinks is not None:
        dsinks = _of_sinks(sinks, statistics, total)
    grads = zip((dq, dk, dv), (want_dq, want_dk, want_dv), strict=True)
    grads = (t if wanted else None for t, wanted in grads)
    return tuple(q.new_empty(0) if t is None else t for t in (*grads, dbias, dsinks))


def _written_with_dq(
    given: tuple[Tensor | None, ...], sizes: tuple[int, ...], options: tuple[int | float, ...]
) -> Tensor | None:
    """Room for dbias where it is one element a score, zero where no tile is seen. Then the error of
    delta is one of 16 bits too (at most 0.66 of what is allowed in 72 cases), but where a query may
    see next to nothing, or dropout leave it that (1.55)."""
    q, _, _, mask, bias, _, _, ends, _ = given
    batch, heads, _, seq_q, seq_k, *_ = sizes
    left, right, softcap, _, dropped = options[10:15]
    assert q is not None and bias is not None
    few = mask is not None or (min(left, right) >= 0 and left + right < _MANY)
    alike = bias.dtype == q.dtype and bias.shape == (batch, heads, seq_q, seq_k)
    if few or dropped or softcap or ends is not None or not alike:
        return None
    make = torch.empty if left < 0 and right < 0 else torch.zeros
    return make(bias.shape, dtype=q.dtype, device=q.device)


def _parts_of(bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """An empty [parts, *bias.shape], for sums over parts of what a tile of the bias was added to:
    as many as there must be to have work for all, of two or more each."""
    batch, heads, _, seq_q, *_ = sizes
    batches, own_heads, queries, keys = bias.shape
    down, across = (-(-n // _cuda.bias_tile) for n in (queries, keys))
    added_to = batch // batches * (heads // own_heads)
    if queries == 1:
        added_to *= -(-seq_q // _cuda.bias_tile)
    parts = min(-(-added_to // 2), -(-MAX_PARTS // (batches * own_heads * down * across)))
    dtype = bias.dtype if parts == 1 else torch.float32
    return torch.empty((parts, *bias.shape), dtype=dtype, device=bias.device)


def _of_sinks(sinks: Tensor, statistics: Tensor, total: Tensor) -> Tensor:
    """The gradient of sinks [heads]; statistics [3, ...] and total are [heads, rows], before which
    there may be batches."""
    highest, part, delta = statistics
    p = torch.exp2(LOG2_E * sinks.float()[:, None] - highest) * part
    of_rows = (p * delta).where(total != 0, 0.0)  # those of no sequence are unwritten
    return -of_rows.sum_to_size(len(sinks), 1)[:, 0].to(sinks.dtype)


# --- Decoding, from a cache.


def _cache_of(cache: Tensor, block_table: Tensor | None) -> tuple[int, int, int]:
    """Of a sequence how much room it has; size and number of pages, or without any of sequences."""
    if block_table is None:
        return cache.shape[2], cache.shape[2], cache.shape[0]
    return block_table.shape[1] * cache.shape[1], cache.shape[1], cache.shape[0]


def _by_position(cache: Tensor, block_table: Tensor | None) -> tuple[int, int, int]:
    """Strides of [batch or page, head, position], where any will do 0."""
    batch, head, position, _ = broadcast_strides(cache)
    return (batch, head, position) if block_table is None else (batch, position, head)


def attention_decode_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, q_len, dim], caches [batch, kv_heads, capacity, dim or v_dim] or, of pages,
    [pages, page_size, kv_heads, dim or v_dim], seq_lens [batch], block_table [batch, max_pages],
    slopes [batch, heads], sinks [heads] -> out [batch, heads, q_len, v_dim] laid out as q, lse
    [batch, heads, q_len]."""
    (batch, heads, seq_q, dim), v_dim = q.shape, v_cache.shape[3]
    cache = _cache_of(k_cache, block_table)
    out = _laid_out(q, v_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    work = lse.new_empty(lse.numel() * -(-cache[0] // _cuda.decode_split) * (2 + v_dim))
    tensors = out, lse, work, q, k_cache, v_cache, seq_lens, block_table, alibi_slopes, sinks
    _cuda.attention_decode_forward(
        *map(address, tensors),
        batch, heads, k_cache.shape[1 if block_table is None else 2], seq_q, dim, v_dim, *cache,
        *_rows(out, q), *(n for t in (k_cache, v_cache) for n in _by_position(t, block_table)),
        0 if block_table is None else block_table.stride(0),
        *((0, 0) if alibi_slopes is None else alibi_slopes.stride()), left, softcap, scale,
        *(DTYPES[(q if t is None else t).dtype] for t in (q, sinks)), stream(q),
    )  # fmt: skip
    return out, lse


def append_kv_(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seq_lens_before: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """Caches as in `attention_decode_forward`, k, v [batch, kv_heads, new, dim or v_dim],
    seq_lens_before [batch], tables [positions, half], written to the caches."""
    positions, half = (0, 0) if cos is None else cos.shape
    tensors = k_cache, v_cache, k, v, seq_lens_before, block_table, cos, sin
    _cuda.attention_append(
        *map(address, tensors), *k.shape, v.shape[3], half, positions,
        *_cache_of(k_cache, block_table),
        *(n for t in (k_cache, v_cache) for n in _by_position(t, block_table)), *_rows(k, v),
        0 if block_table is None else block_table.stride(0),
        *(0 if t is None else t.stride(0) for t in (cos, sin)), interleaved,
        *(DTYPES[(k if t is None else t).dtype] for t in (k, cos)), stream(k),
    )  # fmt: skip

"""Attention in CUDA C++ by the tensor cores of every GPU since Ampere, in fp16 and bf16."""

import math
from typing import Any

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, broadcast_strides, draw, stream

LOG2_E = math.log2(math.e)


def _laid_out(x: Tensor, cols: int) -> Tensor:
    """An empty [..., cols] whose other dims lie in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def _rows(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of each its first three strides, 0 along a dim of 1, where any will do."""
    return tuple(stride for t in tensors for stride in broadcast_strides(t)[:3])


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    return batch, heads, kv_heads, seq_q, seq_k, dim, v_dim


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
    tensors = out, highest, total, q, k, v, mask, bias, alibi_slopes, sinks
    _cuda.attention_forward(
        *map(address, tensors), *_sizes(q, v), *_rows(out, q, k, v),
        *_options(
            mask, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
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
    want_dq: bool, want_dk: bool, want_dv: bool, want_dbias: bool, want_dsinks: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_forward`, dlse [batch, heads, seq_q] -> dq, dk, dv, laid out as q, k
    and v, dbias and dsinks; what is not wanted is empty."""
    dq = _laid_out(q, q.shape[-1]) if want_dq else None
    statistics = q.new_empty(3, *q.shape[:3], dtype=torch.float32)
    ds = None
    if want_dbias:  # zero where no tile is seen
        ds = q.new_zeros(*q.shape[:3], k.shape[2], dtype=torch.float32)
    exact = want_dbias or (want_dsinks and sinks is not None and sinks.dtype == torch.float32)
    given, dtypes = (q, k, v, mask, bias, alibi_slopes, sinks), _dtypes(q, bias, sinks)
    options = _options(
        mask, bias, alibi_slopes, left, right, softcap, scale, dropout_p, seeds, offsets, seed,
        offset,
    )  # fmt: skip
    _cuda.attention_queries_backward(
        *map(address, (dq, statistics, ds, dout, dlse, out, highest, total, *given)),
        *_sizes(q, v), *_rows(dq, dout, out, q, k, v), *options, exact, *dtypes,
    )  # fmt: skip
    dk = dv = dbias = dsinks = None
    if want_dk or want_dv:
        dk, dv = _laid_out(k, k.shape[-1]), _laid_out(v, v.shape[-1])
        _cuda.attention_keys_backward(
            *map(address, (dk, dv, dout, statistics, *given)),
            *_sizes(q, v), *_rows(dk, dv, dout, q, k, v), *options, *dtypes,
        )  # fmt: skip
    if ds is not None and bias is not None:
        dbias = ds.sum_to_size(bias.shape).to(bias.dtype)
    if want_dsinks and sinks is not None:
        highest, part, delta = statistics
        p = torch.exp2(LOG2_E * sinks.float()[:, None] - highest) * part
        dsinks = -(p * delta).sum((0, 2)).to(sinks.dtype)
    grads = zip((dq, dk, dv), (want_dq, want_dk, want_dv), strict=True)
    grads = (t if wanted else None for t, wanted in grads)
    return tuple(q.new_empty(0) if t is None else t for t in (*grads, dbias, dsinks))


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

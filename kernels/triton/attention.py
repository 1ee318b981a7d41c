"""Attention on the GPU: a block of queries a program, keys and values streamed past it.

The backward pass is a kernel for dq, one for dk and dv, one for the gradient of a bias and one for
that of the sinks, each the only writer of its elements: no atomics, the same bits every time.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from tilewise.kernels.triton._append import TILE, _append_kernel
from tilewise.kernels.triton._attention_backward import (
    _keys_backward_kernel,
    _queries_backward_kernel,
)
from tilewise.kernels.triton._attention_forward import _forward_kernel
from tilewise.kernels.triton._attention_scores import Drawn, Rules, drawn_by, hides_keys, rules_of
from tilewise.kernels.triton._attention_scores_gradient import (
    _bias_backward_kernel,
    _sinks_backward_kernel,
)
from tilewise.kernels.triton._attention_tiles import (
    BIAS_BACK,
    FORWARD,
    KEYS_BACK,
    LONG_BIAS,
    LONG_FORWARD,
    LONG_KEYS,
    LONG_QUERIES,
    PACKED_FORWARD,
    PACKED_KEYS,
    PACKED_QUERIES,
    QUERIES_BACK,
    are_described,
    dims_of,
    kept_beside,
    long_options,
    options_of,
    streamed,
    strides_of,
    width_of,
)
from tilewise.kernels.triton._decode import SPLIT, _merge_kernel, _split_kernel
from tilewise.kernels.triton._packed import Packed, packed_in
from tilewise.kernels.triton._pages import cache_of
from tilewise.kernels.triton._shared import MAX_PARTS, launch_options, same_layout

_MANY = 32  # keys; delta is then off by less than the scores' gradients are
_ROWS = {"BLOCK": 1024, **launch_options(4)}
# Keys, warps and stages of a program that decodes, and at most how many queries.
_DECODE = {
    4: {64: (16, 4, 2, 16), 128: (16, 4, 2, 16), 256: (16, 8, 1, 16)},
    2: {64: (64, 4, 3, 64), 128: (64, 4, 3, 32), 256: (32, 4, 2, 32)},
}

# What `tilewise kernels --prune attention` compiles, to choose from for the tables above.
SEARCH_SPACE = {
    name: {
        "QUERIES": (32, 64, 128), "KEYS": (32, 64, 128), "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    }
    for name in (
        "_forward_kernel", "_queries_backward_kernel", "_keys_backward_kernel",
        "_bias_backward_kernel",
    )
}  # fmt: skip


def _bounded(packed: Packed, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Batch, seq_q and seq_k; the longest that is said may be longer than there are rows."""
    if packed.ends_q is None:
        return sizes
    batch, *longest = sizes
    return batch, *map(min, longest, (packed.total_q, packed.total_k))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, right: int, softcap: float,
    scale: float, *dropout: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask and bias
    broadcastable, alibi_slopes [batch, heads], sinks [heads]
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    sizes = len(q), q.shape[2], k.shape[2]
    given = mask, bias, alibi_slopes, left, right, softcap, scale
    return _attend(q, k, v, sinks, Packed(), sizes, given, dropout)


def attention_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, left: int, right: int, softcap: float, scale: float, *dropout: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [total_q, heads, dim], k, v [total_k, kv_heads, dim or v_dim], ends of sequences
    [batch + 1], bias [batch or 1, heads or 1, max_seqlen_q, max_seqlen_k], slopes [batch, heads],
    sinks [heads] -> out [total_q, heads, v_dim] laid out as q; highest, total [heads, total_q]."""
    sizes = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k
    given = None, bias, alibi_slopes, left, right, softcap, scale
    packed = packed_in(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q)
    return _attend(q, k, v, sinks, packed, sizes, given, dropout)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packed: Packed, sizes: tuple[int, ...],
    given: tuple, dropout: tuple,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, seq_q, seq_k), heads = _bounded(packed, sizes), q.shape[1]
    out = same_layout(q, v.shape[-1])
    rows = q.shape[:-1] if q.ndim == 4 else (heads, len(q))
    highest = q.new_empty(rows, dtype=torch.float32)
    total = torch.empty_like(highest)
    rules, sign = rules_of(*given, seq_q, seq_k)
    drawn = drawn_by(*dropout)
    described = not hides_keys(rules) and are_described(q, k, v, packed, k, v)
    level = kept_beside(q, k, v, packed, rules, drawn)
    long = long_options(described, LONG_FORWARD, level, rules)
    table = FORWARD if packed.ends_q is None else PACKED_FORWARD
    options = options_of(table, level, q, v, long)
    options["QUERIES"] = min(options["QUERIES"], max(triton.next_power_of_2(seq_q), 16))
    tiles = (k, options["DIM"]), (v, options["V_DIM"])
    keys, values, *strides = streamed(described, options["KEYS"], *tiles)
    _forward_kernel[(triton.cdiv(seq_q, options["QUERIES"]) * batch * heads,)](
        out, highest, total, q, keys, values, sinks, packed, rules, drawn, heads,
        heads // k.shape[1], seq_q, seq_k, *dims_of(q, v, options), *strides_of(out, q), *strides,
        sign, **options,
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
    and v, dbias and dsinks; what is not `wanted`, in this order, is empty."""
    sizes = len(q), q.shape[2], k.shape[2]
    given = mask, bias, alibi_slopes, left, right, softcap, scale
    dropout = dropout_p, seeds, offsets, seed, offset
    found = dout, dlse, q, k, v, sinks, out, highest, total
    return _differentiate(*found, Packed(), sizes, given, dropout, *wanted)


def attention_varlen_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, out: Tensor, highest: Tensor, total: Tensor,
    left: int, right: int, softcap: float, scale: float, dropout_p: float, seeds: Tensor | None,
    offsets: Tensor | None, seed: int, offset: int, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_varlen_forward`, dlse [heads, total_q] -> dq, dk, dv laid out as q,
    k and v, dbias and dsinks; what is not `wanted`, in this order, is empty."""
    sizes = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k
    given = None, bias, alibi_slopes, left, right, softcap, scale
    dropout = dropout_p, seeds, offsets, seed, offset
    found = dout, dlse, q, k, v, sinks, out, highest, total
    packed = packed_in(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q)
    return _differentiate(*found, packed, sizes, given, dropout, *wanted)


def _differentiate(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    out: Tensor, highest: Tensor, total: Tensor, packed: Packed, sizes: tuple[int, ...],
    given: tuple, dropout: tuple, want_dq: bool, want_dk: bool, want_dv: bool, want_dbias: bool,
    want_dsinks: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, seq_q, seq_k), heads, kv_heads = _bounded(packed, sizes), q.shape[1], k.shape[1]
    rules, sign = rules_of(*given, seq_q, seq_k)
    added, scale = (packed, rules, drawn_by(*dropout)), given[-1]
    statistics = torch.empty_like(total), highest, total
    dq = same_layout(q, q.shape[-1]) if want_dq else q
    level = kept_beside(q, k, v, *added)
    whole = packed.ends_q is None
    described = not hides_keys(rules) and are_described(q, k, v, packed, k, v)
    table = QUERIES_BACK if whole else PACKED_QUERIES
    long = long_options(described, LONG_QUERIES, level, rules)
    options = options_of(table, level, q, v, long)
    options["QUERIES"] = min(options["QUERIES"], max(triton.next_power_of_2(seq_q), 16))
    tiles = (k, options["DIM"]), (v, options["V_DIM"])
    keys, values, *strides = streamed(described, options["KEYS"], *tiles)
    dbias = _written_with_dq(given[1], q, sizes, *added) if want_dbias else None
    exact = q.itemsize == 4 or (want_dbias and dbias is None)
    _queries_backward_kernel[(triton.cdiv(seq_q, options["QUERIES"]) * batch * heads,)](
        dq, dbias, statistics[0], dout, dlse, q, keys, values, out, highest, total, *added, heads,
        heads // kv_heads, seq_q, seq_k, *dims_of(q, v, options), *strides_of(dq, dout, out, q),
        *strides, sign, scale, DQ=want_dq, EXACT=exact, **options,
    )  # fmt: skip
    dk = dv = dsinks = None
    if want_dk or want_dv:
        dk, dv = same_layout(k, k.shape[-1]), same_layout(v, v.shape[-1])
        described = are_described(q, k, v, packed, dout, q)
        table = KEYS_BACK if whole else PACKED_KEYS
        long = long_options(described, LONG_KEYS, level, rules)
        options = options_of(table, level, q, v, long)
        tiles = (dout, options["V_DIM"]), (q, options["DIM"])
        douts, queries, *strides = streamed(described, options["QUERIES"], *tiles)
        _keys_backward_kernel[(triton.cdiv(seq_k, options["KEYS"]) * batch * kv_heads,)](
            dk, dv, douts, queries, k, v, *statistics, *added, kv_heads, heads // kv_heads, seq_q,
            seq_k, *dims_of(q, v, options), *strides_of(dk, dv), *strides, *strides_of(k, v), sign,
            scale, **options,
        )  # fmt: skip
    if want_dbias and dbias is None:
        dbias = _bias_backward(given[1], dout, q, k, v, statistics, sizes, added, sign)
    if want_dsinks:
        dsinks = _sinks_backward(sinks, *statistics)
    found = (dq, want_dq), (dk, want_dk), (dv, want_dv), (dbias, want_dbias), (dsinks, want_dsinks)
    return tuple(t if wanted else q.new_empty(0) for t, wanted in found)


def _written_with_dq(
    bias: Tensor, q: Tensor, sizes: tuple[int, ...], packed: Packed, rules: Rules, drawn: Drawn
) -> Tensor | None:
    """Room for dbias where it is one element a score, in 16 bits, zero where no tile is seen. Then
    the error of delta is one of 16 bits too, but where a query may see next to nothing, or dropout
    leave it that."""
    batch, seq_q, seq_k = sizes
    bounded = rules.left is not None and rules.right is not None
    few = rules.mask is not None or (bounded and rules.left + rules.right < _MANY)
    whole = packed.ends_q is None and drawn.scale is None
    if few or not whole or q.itemsize != 2 or bias.shape != (batch, q.shape[1], seq_q, seq_k):
        return None
    limited = rules.left is not None or rules.right is not None
    make = torch.zeros if limited else torch.empty
    return make(bias.shape, dtype=bias.dtype, device=bias.device)


def _parts(bias: Tensor, tiles: int, added_to: int) -> tuple[int, Tensor]:
    """In how many parts a tile is added up so that there is work for all, and where they go."""
    parts = min(added_to, triton.cdiv(MAX_PARTS, tiles))
    dtype = bias.dtype if parts == 1 else torch.float32
    return parts, torch.empty((parts, *bias.shape), dtype=dtype, device=bias.device)


def _summed(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums[0] if len(sums) == 1 and sums.dtype == dtype else sums.sum(0).to(dtype)


def _bias_backward(
    bias: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: tuple[Tensor, ...],
    sizes: tuple[int, ...], added: tuple[Packed, Rules, Drawn], sign: float | None,
) -> Tensor:  # fmt: skip
    """dbias, laid out in one piece."""
    (batch, seq_q, seq_k), heads = sizes, q.shape[1]
    described = not hides_keys(added[1]) and are_described(q, k, v, added[0], dout, q, k, v)
    level = kept_beside(q, k, v, *added) - 1
    long = long_options(described, LONG_BIAS, level, added[1])
    options: dict[str, Any] = options_of(BIAS_BACK, level, q, v, long)
    queries = (dout, options["V_DIM"]), (q, options["DIM"])
    keys = (k, options["DIM"]), (v, options["V_DIM"])
    douts, qs, *q_strides = streamed(described, options["QUERIES"], *queries)
    ks, vs, *k_strides = streamed(described, options["KEYS"], *keys)
    lines, by_query = bias.shape[:2].numel(), bias.shape[2] > 1
    copies = batch // bias.shape[0], heads // bias.shape[1]
    tiles, added_to = lines * triton.cdiv(seq_k, options["KEYS"]), copies[0] * copies[1]
    blocks = triton.cdiv(seq_q, options["QUERIES"])
    tiles, added_to = (tiles * blocks, added_to) if by_query else (tiles, added_to * blocks)
    parts, sums = _parts(bias, tiles, added_to)
    _bias_backward_kernel[(tiles * parts,)](
        sums, douts, qs, ks, vs, *statistics, *added, heads, heads // k.shape[1], seq_q, seq_k,
        *dims_of(q, v, options), *q_strides, *k_strides, sign, lines, bias.shape[1], *copies, parts,
        BY_QUERY=by_query, **options,
    )  # fmt: skip
    return _summed(sums, bias.dtype)


def _sinks_backward(sinks: Tensor, delta: Tensor, highest: Tensor, total: Tensor) -> Tensor:
    batch, heads, seq_q = delta.shape if delta.ndim == 3 else (1, *delta.shape)
    blocks = triton.cdiv(batch * seq_q, _ROWS["BLOCK"])
    parts = min(blocks, triton.cdiv(MAX_PARTS, heads))
    sums = sinks.new_empty(parts, heads, dtype=torch.float32)
    _sinks_backward_kernel[(parts * heads,)](
        sums, sinks, delta, highest, total, batch, heads, seq_q, parts, **_ROWS
    )
    return _summed(sums, sinks.dtype)


def attention_decode_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, q_len, dim], caches [batch, kv_heads, capacity, dim or v_dim] or, of pages,
    [pages, page_size, kv_heads, dim or v_dim], seq_lens [batch], block_table [batch, max_pages],
    slopes [batch, heads], sinks [heads] -> out [batch, heads, q_len, v_dim] laid out as q, lse
    [batch, heads, q_len]."""
    batch, heads, seq_q, dim = q.shape
    v_dim = v_cache.shape[3]
    out = same_layout(q, v_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    (kv_heads, capacity, pages, table_stride, page_size), strides = cache_of(
        k_cache, v_cache, block_table
    )
    rules, sign = rules_of(None, None, alibi_slopes, left, 0, softcap, scale, seq_q, capacity)
    width, v_width = width_of(dim), width_of(v_dim)
    keys, warps, stages, most = _DECODE[q.itemsize][max(width, v_width, 64)]
    group, splits = heads // kv_heads, triton.cdiv(capacity, SPLIT)
    queries = group * seq_q
    rows = min(max(triton.next_power_of_2(queries), 16), most)
    statistics = lse.new_empty(2, batch * kv_heads * splits * queries)
    sums = lse.new_empty(statistics.shape[1], v_width)
    dims = None if dim == width else dim, None if v_dim == v_width else v_dim
    _split_kernel[(triton.cdiv(queries, rows) * splits * batch * kv_heads,)](
        sums, *statistics, q, k_cache, v_cache, seq_lens, block_table, rules, kv_heads, group,
        seq_q, capacity, splits, *dims, pages, table_stride, q.stride()[:3], *strides, sign,
        DIM=width, V_DIM=v_width, ROWS=rows, KEYS=keys, SPLIT=SPLIT, PAGE=page_size,
        num_stages=stages, **launch_options(warps),
    )  # fmt: skip
    _merge_kernel[(batch * heads * seq_q,)](
        out, lse, sums, *statistics, seq_lens, sinks, heads, group, seq_q, capacity, splits,
        dims[1], rules.left, out.stride()[:3],
        V_DIM=v_width, PARTS=max(2048 // v_width, 16), SPLIT=SPLIT, **launch_options(4),
    )  # fmt: skip
    return out, lse


def append_kv_(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seq_lens_before: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """Caches as in `attention_decode_forward`, k, v [batch, kv_heads, new, dim or v_dim],
    seq_lens_before [batch], tables [positions, half], written to the caches."""
    batch, heads, new, dim = k.shape
    v_dim = v.shape[3]
    (_, capacity, pages, table_stride, page_size), strides = cache_of(k_cache, v_cache, block_table)
    positions, half = (0, 0) if cos is None else cos.shape
    table_strides = (0, 0) if cos is None else (cos.stride(0), sin.stride(0))
    rest = dim - 2 * half
    block, rest_block, v_block = (triton.next_power_of_2(max(n, 1)) for n in (half, rest, v_dim))
    rows = max(TILE // max(2 * block, rest_block, v_block), 1)
    _append_kernel[(triton.cdiv(batch * heads * new, rows), 2)](
        k_cache, v_cache, k, v, seq_lens_before, block_table, cos, sin, batch * heads * new, heads,
        new, capacity, pages, table_stride, positions, *table_strides,
        *strides, k.stride()[:3], v.stride()[:3], PAGE=page_size, INTERLEAVED=interleaved,
        HALF=half, REST=rest, V_COLS=v_dim, ROWS=rows, BLOCK=block, REST_BLOCK=rest_block,
        V_BLOCK=v_block, **launch_options(4),
    )  # fmt: skip

"""Attention on the GPU: a block of queries a program, keys and values streamed past it.

The backward pass is two kernels, one for dq and one for dk and dv, each the only writer of its
elements: no atomics, the same bits every time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._shared import broadcast_strides, launch_options, same_layout

LOG2_E = math.log2(math.e)


@triton.jit
def _load_rows(ptr, row, row_stride, col, cols, seen):
    """A tile [row, col], zeros past `cols` and where `seen` is False."""
    place = tl.cast(row, tl.int64)[:, None] * row_stride + col[None, :]
    return tl.load(ptr + place, mask=seen[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit
def _seen(key, seq_k, mask_ptr, mask_key, MASK: tl.constexpr):
    """The keys a padding mask leaves: the others are never read, for they may be NaN."""
    seen = key < seq_k
    if MASK == "padding":
        seen = tl.load(mask_ptr + tl.cast(key, tl.int64) * mask_key, mask=seen, other=0) != 0
    return seen


@triton.jit
def _hide(
    score, query, key, seen, seq_q, seq_k, mask_ptr, mask_query, mask_key,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The score [query, key], -inf where the two may not meet."""
    query, key = query[:, None], key[None, :]
    allowed = seen[None, :] & (query < seq_q)
    if CAUSAL:
        allowed &= key <= query + (seq_k - seq_q)
    if MASK == "full":
        place = tl.cast(query, tl.int64) * mask_query + tl.cast(key, tl.int64) * mask_key
        allowed &= tl.load(mask_ptr + place, mask=allowed, other=0) != 0
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def _attend(
    highest, total, sums, q, k_ptr, v_ptr, mask_ptr, query, first,
    seq_q, seq_k, dim, v_dim, k_row, v_row, mask_query, mask_key, factor,
    CHECK: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = first + tl.arange(0, KEYS)
    seen = key >= 0
    if CHECK:
        seen = _seen(key, seq_k, mask_ptr, mask_key, MASK)
    k = _load_rows(k_ptr, key, k_row, tl.arange(0, DIM), dim, seen)
    v = _load_rows(v_ptr, key, v_row, tl.arange(0, V_DIM), v_dim, seen)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CHECK:
        score = _hide(
            score, query, key, seen, seq_q, seq_k, mask_ptr, mask_query, mask_key, CAUSAL, MASK
        )

    above = tl.maximum(highest, tl.max(score, 1) * factor)
    base = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(score * factor - base[:, None])
    rescale = tl.exp2(highest - base)
    total = total * rescale + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
    return above, total, sums


@triton.jit
def _forward_kernel(
    out_ptr, highest_ptr, total_ptr, q_ptr, k_ptr, v_ptr, mask_ptr,
    heads, group, seq_q, seq_k, dim, v_dim, out_batch, out_head, out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_query, mask_key, sign, factor,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest first
    index = tl.cast(tl.program_id(1), tl.int64)
    batch, head = index // heads, index % heads
    query = block * QUERIES + tl.arange(0, QUERIES)
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    mask_ptr += batch * mask_batch + head * mask_head
    q = _load_rows(q_ptr + batch * q_batch + head * q_head, query, q_row, col, dim, query < seq_q)
    q = (q.to(tl.float32) * sign).to(q.dtype)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, V_DIM], tl.float32)
    last = seq_k
    whole = seq_k // KEYS * KEYS  # before it, every query of the block sees every key
    if CAUSAL:
        last = tl.minimum(seq_k, tl.maximum(0, (block + 1) * QUERIES + seq_k - seq_q))
        visible = tl.maximum(0, block * QUERIES + seq_k - seq_q + 1)
        whole = tl.minimum(whole, visible // KEYS * KEYS)
    if MASK != "none":
        whole = 0
    for first in range(0, whole, KEYS):
        highest, total, sums = _attend(
            highest, total, sums, q, k_ptr, v_ptr, mask_ptr, query, first,
            seq_q, seq_k, dim, v_dim, k_row, v_row, mask_query, mask_key, factor,
            False, CAUSAL, MASK, DIM, V_DIM, KEYS,
        )  # fmt: skip
    for first in range(whole, last, KEYS):
        highest, total, sums = _attend(
            highest, total, sums, q, k_ptr, v_ptr, mask_ptr, query, first,
            seq_q, seq_k, dim, v_dim, k_row, v_row, mask_query, mask_key, factor,
            True, CAUSAL, MASK, DIM, V_DIM, KEYS,
        )  # fmt: skip

    nothing = total == 0
    out = tl.where(nothing[:, None], 0.0, sums / tl.where(nothing, 1.0, total)[:, None])
    inside = query < seq_q
    tl.store(highest_ptr + index * seq_q + query, highest, mask=inside)
    tl.store(total_ptr + index * seq_q + query, total, mask=inside)
    out_ptr += batch * out_batch + head * out_head
    place = tl.cast(query, tl.int64)[:, None] * out_row + v_col[None, :]
    inside = inside[:, None] & (v_col < v_dim)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_gradient(
    score, dp, highest, part, delta, query, key, seen, seq_q, seq_k, mask_ptr, mask_query, mask_key,
    factor, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """p and ds [query, key]."""
    score = _hide(
        score, query, key, seen, seq_q, seq_k, mask_ptr, mask_query, mask_key, CAUSAL, MASK
    )
    p = tl.exp2(score * factor - highest[:, None]) * part[:, None]
    return p, p * (dp - delta[:, None])


@triton.jit
def _statistics(highest_ptr, total_ptr, query, seq_q):
    """The highest score of each query, and 1 / the sum; 0 and 0 where there is nothing to see."""
    total = tl.load(total_ptr + query, mask=query < seq_q, other=0.0)
    highest = tl.load(highest_ptr + query, mask=query < seq_q, other=0.0)
    nothing = total == 0
    return tl.where(nothing, 0.0, highest), tl.where(
        nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total)
    )


@triton.jit
def _queries_backward_kernel(
    dq_ptr, delta_ptr, dout_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, highest_ptr,
    total_ptr, heads, group, seq_q, seq_k, dim, v_dim, dq_batch, dq_head, dq_row,
    dout_batch, dout_head, dout_row, out_batch, out_head, out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_query, mask_key, sign, factor, scale,
    DLSE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.cast(tl.program_id(1), tl.int64)
    batch, head = index // heads, index % heads
    query = block * QUERIES + tl.arange(0, QUERIES)
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    inside = query < seq_q
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    mask_ptr += batch * mask_batch + head * mask_head
    dout_ptr += batch * dout_batch + head * dout_head
    q = _load_rows(q_ptr + batch * q_batch + head * q_head, query, q_row, col, dim, inside)
    q = (q.to(tl.float32) * sign).to(q.dtype)
    dout = _load_rows(dout_ptr, query, dout_row, v_col, v_dim, inside)
    out = _load_rows(
        out_ptr + batch * out_batch + head * out_head, query, out_row, v_col, v_dim, inside
    )
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + index * seq_q + query, mask=inside, other=0.0)
    tl.store(delta_ptr + index * seq_q + query, delta, mask=inside)
    highest, part = _statistics(
        highest_ptr + index * seq_q, total_ptr + index * seq_q, query, seq_q
    )

    dq = tl.zeros([QUERIES, DIM], tl.float32)
    last = seq_k
    if CAUSAL:
        last = tl.minimum(seq_k, tl.maximum(0, (block + 1) * QUERIES + seq_k - seq_q))
    for first in range(0, last, KEYS):
        key = first + tl.arange(0, KEYS)
        seen = _seen(key, seq_k, mask_ptr, mask_key, MASK)
        k = _load_rows(k_ptr, key, k_row, col, dim, seen)
        v = _load_rows(v_ptr, key, v_row, v_col, v_dim, seen)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        _, ds = _softmax_gradient(
            score, dp, highest, part, delta, query, key, seen, seq_q, seq_k,
            mask_ptr, mask_query, mask_key, factor, CAUSAL, MASK,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += batch * dq_batch + head * dq_head
    place = tl.cast(query, tl.int64)[:, None] * dq_row + col[None, :]
    inside = inside[:, None] & (col < dim)[None, :]
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keys_backward_kernel(
    dk_ptr, dv_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, delta_ptr, highest_ptr, total_ptr,
    kv_heads, group, seq_q, seq_k, dim, v_dim, dk_batch, dk_head, dk_row,
    dv_batch, dv_head, dv_row, dout_batch, dout_head, dout_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_query, mask_key, sign, factor, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    first_key = tl.program_id(0) * KEYS
    index = tl.cast(tl.program_id(1), tl.int64)
    batch, kv_head = index // kv_heads, index % kv_heads
    key = first_key + tl.arange(0, KEYS)
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head

    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, V_DIM], tl.float32)
    start = 0
    if CAUSAL:
        start = tl.maximum(0, first_key - (seq_k - seq_q)) // QUERIES * QUERIES
    for member in range(0, group):
        head = kv_head * group + member
        head_mask = mask_ptr + batch * mask_batch + head * mask_head
        seen = _seen(key, seq_k, head_mask, mask_key, MASK)
        k = _load_rows(k_ptr, key, k_row, col, dim, seen)
        v = _load_rows(v_ptr, key, v_row, v_col, v_dim, seen)
        row = (batch * kv_heads * group + head) * seq_q
        for first in range(start, seq_q, QUERIES):
            query = first + tl.arange(0, QUERIES)
            inside = query < seq_q
            q = _load_rows(q_ptr + batch * q_batch + head * q_head, query, q_row, col, dim, inside)
            q = (q.to(tl.float32) * sign).to(q.dtype)
            dout = _load_rows(
                dout_ptr + batch * dout_batch + head * dout_head,
                query, dout_row, v_col, v_dim, inside,
            )  # fmt: skip
            highest, part = _statistics(highest_ptr + row, total_ptr + row, query, seq_q)
            delta = tl.load(delta_ptr + row + query, mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            p, ds = _softmax_gradient(
                score, dp, highest, part, delta, query, key, seen, seq_q, seq_k,
                head_mask, mask_query, mask_key, factor, CAUSAL, MASK,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")

    inside = (key < seq_k)[:, None]
    key_row = tl.cast(key, tl.int64)[:, None]
    place = dk_ptr + batch * dk_batch + kv_head * dk_head + key_row * dk_row + col[None, :]
    dk = (dk * (scale * sign)).to(dk_ptr.dtype.element_ty)
    tl.store(place, dk, mask=inside & (col < dim)[None, :])
    place = dv_ptr + batch * dv_batch + kv_head * dv_head + key_row * dv_row + v_col[None, :]
    tl.store(place, dv.to(dv_ptr.dtype.element_ty), mask=inside & (v_col < v_dim)[None, :])


def _width(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 16)  # the least that tl.dot takes


# Blocks of queries and keys, warps and stages by bytes an element and the wider of the two dims,
# the largest of those tried that ptxas compiles for sm_80, sm_90 and sm_100 with no access to local
# memory. Products in true fp32 are made of scalars; what a loop keeps of them fills the registers.
_FORWARD = {4: {64: (64, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 32, 8, 1)},
            2: {64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}}  # fmt: skip
_QUERIES = {4: {64: (32, 32, 8, 1), 128: (16, 16, 4, 2), 256: (16, 16, 8, 2)},
            2: {64: (64, 32, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)}}  # fmt: skip
_KEYS = {4: {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
         2: {64: (32, 32, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)}}  # fmt: skip


# What `tilewise kernels --prune attention` compiles, to choose from for the tables above.
SEARCH_SPACE = {
    name: {
        "QUERIES": (32, 64, 128), "KEYS": (32, 64, 128), "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    }
    for name in ("_forward_kernel", "_queries_backward_kernel", "_keys_backward_kernel")
}  # fmt: skip


def _options(table: dict, q: Tensor, v: Tensor) -> dict[str, int | bool]:
    dim, v_dim = _width(q.shape[-1]), _width(v.shape[-1])
    if q.itemsize == 4:
        dim = v_dim = max(dim, v_dim)  # unequal, they are more kernels than these were tried for
    queries, keys, warps, stages = table[q.itemsize][max(dim, v_dim, 64)]
    return {
        "DIM": dim, "V_DIM": v_dim, "QUERIES": queries, "KEYS": keys,
        "num_stages": stages, **launch_options(warps),
    }  # fmt: skip


def _scaling(scale: float) -> tuple[float, float]:
    """The sign goes to the queries, so that the highest score stays the highest when scaled."""
    return (math.copysign(1.0, scale), abs(scale) * LOG2_E) if scale else (0.0, LOG2_E)


def _mask_options(mask: Tensor | None, otherwise: Tensor) -> tuple[Tensor, tuple[int, ...], str]:
    """It, its strides with 0 along broadcast dims, and which kind of mask it is."""
    strides = broadcast_strides(mask)
    if mask is None:
        return otherwise, strides, "none"
    return mask.view(torch.uint8), strides, "padding" if mask.shape[2] == 1 else "full"


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: None, alibi_slopes: None,
    sinks: None, left: int, right: int, softcap: float, scale: float, *dropout: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask broadcastable
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    out = same_layout(q, v_dim)
    highest = q.new_empty(q.shape[:3], dtype=torch.float32)
    total = torch.empty_like(highest)
    flags, mask_strides, kind = _mask_options(mask, q)
    options = _options(_FORWARD, q, v)
    options["QUERIES"] = min(options["QUERIES"], max(triton.next_power_of_2(seq_q), 16))
    _forward_kernel[(triton.cdiv(seq_q, options["QUERIES"]), batch * heads)](
        out, highest, total, q, k, v, flags, heads, heads // kv_heads, seq_q, seq_k, dim, v_dim,
        *out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides,
        *_scaling(scale),
        CAUSAL=right == 0, MASK=kind, **options,
    )  # fmt: skip
    return out, highest, total


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    bias: None, alibi_slopes: None, sinks: None, out: Tensor, highest: Tensor, total: Tensor,
    left: int, right: int, softcap: float, scale: float, dropout_p: float, seeds: None,
    offsets: None, seed: int, offset: int, want_dq: bool, want_dk: bool, want_dv: bool,
    *unwanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Shapes as in `attention_forward`, dlse [batch, heads, seq_q] -> dq, dk, dv, laid out as q, k
    and v, and no dbias and no dsinks; what is not wanted is empty."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    dq, dk, dv = same_layout(q, dim), None, None
    delta = torch.empty_like(total)
    flags, mask_strides, kind = _mask_options(mask, q)
    shared = {"CAUSAL": right == 0, "MASK": kind}
    sizes = heads // kv_heads, seq_q, seq_k, dim, v_dim
    rest = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides, *_scaling(scale), scale
    )  # fmt: skip
    options = _options(_QUERIES, q, v) | shared
    _queries_backward_kernel[(triton.cdiv(seq_q, options["QUERIES"]), batch * heads)](
        dq, delta, dout, delta if dlse is None else dlse, q, k, v, flags, out, highest, total,
        heads, *sizes,
        *dq.stride()[:3], *dout.stride()[:3], *out.stride()[:3], *rest,
        DLSE=dlse is not None, **options,
    )  # fmt: skip
    if want_dk or want_dv:
        dk, dv = same_layout(k, dim), same_layout(v, v_dim)
        options = _options(_KEYS, q, v) | shared
        _keys_backward_kernel[(triton.cdiv(seq_k, options["KEYS"]), batch * kv_heads)](
            dk, dv, dout, q, k, v, flags, delta, highest, total, kv_heads, *sizes,
            *dk.stride()[:3], *dv.stride()[:3], *dout.stride()[:3], *rest, **options,
        )  # fmt: skip
    grads = zip((dq, dk, dv, None, None), (want_dq, want_dk, want_dv, *unwanted), strict=True)
    return tuple(t if wanted else q.new_empty(0) for t, wanted in grads)

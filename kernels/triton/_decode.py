"""Attention of a few new queries to a cache of keys: a split of the keys a program, for all queries
of the heads that share them, and what puts the splits of a query together.

Keys are split by their positions alone, and tiles of them too: no bit of a sequence depends on the
rest of the batch, on how much room its cache has or on its pages.
"""

import math

import triton
import triton.language as tl

from tilewise.kernels.triton._attention_scores import (
    LOG2_E,
    hide,
    load_rows,
    scored,
    store_rows,
    turned,
)
from tilewise.kernels.triton._pages import page_of

SPLIT = 256  # keys of one program: with 4096 keys of 8 heads there are 128, about one for each SM
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _length_of(lengths_ptr, batch, capacity):
    """How many keys a sequence has in its cache."""
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), capacity)


@triton.jit
def _load_keys(ptr, page, slot, strides, col, cols, there):
    """A tile [key, col], zeros past `cols` and for keys that are not there."""
    ptr += (page * strides[0] + tl.cast(slot, tl.int64) * strides[2])[:, None] + col[None, :]
    mask = there[:, None]
    if cols is not None:
        mask = mask & (col < cols)[None, :]
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _split_kernel(
    sums_ptr, highest_ptr, total_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rules,
    kv_heads, group, seq_q, capacity, splits, dim, v_dim, pages, table_stride,
    q_strides, k_strides, v_strides, sign,
    DIM: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # Row r of a program is query r % seq_q of head r // seq_q of those that share the keys.
    blocks = tl.cdiv(group * seq_q, ROWS)
    program = tl.program_id(0)
    block, split = program % blocks, program // blocks % splits
    index = tl.cast(program // (blocks * splits), tl.int64)
    batch, kv_head = index // kv_heads, index % kv_heads
    length = _length_of(lengths_ptr, batch, capacity)
    start, end = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length)
    if rules.left is not None:
        start = tl.maximum(start, length - seq_q - rules.left)
    if start >= end:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    inside, query = row < group * seq_q, row % seq_q
    head = kv_head * group + row // seq_q
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    q_ptr += batch * q_strides[0]
    places = head * q_strides[1] + tl.cast(query, tl.int64) * q_strides[2]
    q = turned(load_rows(q_ptr, places, 1, col, dim, inside), sign)
    slope = 0.0
    if rules.slopes is not None:
        place = batch * rules.slope_batch + head * rules.slope_head
        slope = tl.load(rules.slopes + place, mask=inside, other=0.0)[:, None]
    k_ptr += kv_head * k_strides[1]
    v_ptr += kv_head * v_strides[1]
    if table_ptr is not None:
        table_ptr += batch * table_stride

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_DIM], tl.float32)
    for i in range(start // KEYS, tl.cdiv(end, KEYS)):
        key = i * KEYS + tl.arange(0, KEYS)
        there = (key >= start) & (key < end)
        page, slot, there = page_of(table_ptr, batch, i * KEYS, key, there, pages, KEYS, PAGE)
        k = _load_keys(k_ptr, page, slot, k_strides, col, dim, there)
        v = _load_keys(v_ptr, page, slot, v_strides, v_col, v_dim, there)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        queries, keys, shift = inside[:, None], there[None, :], length - seq_q
        score, _ = scored(
            product, query[:, None], key[None, :], queries, keys, shift, rules, 0, slope
        )
        score = hide(score, query[:, None], key[None, :], queries, keys, shift, rules, 0)
        above = tl.maximum(highest, tl.max(score, 1) * rules.factor)
        base = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(tl.fma(score, rules.factor, -base[:, None]))
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
        highest = above

    place = (index * splits + split) * group * seq_q + row
    tl.store(highest_ptr + place, highest, mask=inside)
    tl.store(total_ptr + place, total, mask=inside)
    store_rows(sums_ptr, sums, place, V_DIM, v_col, v_dim, inside)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, sums_ptr, highest_ptr, total_ptr, lengths_ptr, sinks_ptr,
    heads, group, seq_q, capacity, splits, v_dim, left, out_strides,
    V_DIM: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # One query of one head. A split that none of its sequence's queries sees was not written.
    program = tl.cast(tl.program_id(0), tl.int64)
    index, query = program // seq_q, program % seq_q
    batch, head = index // heads, index % heads
    length = _length_of(lengths_ptr, batch, capacity)
    first, last = 0, tl.cdiv(length, SPLIT)
    if left is not None:
        first = tl.maximum(length - seq_q - left, 0) // SPLIT
    rows = group * seq_q
    place = (index // group) * splits * rows + head % group * seq_q + query

    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head + tl.arange(0, 1)).to(tl.float32) * _LOG2_E
        highest = tl.maximum(highest, sink)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    col = tl.arange(0, V_DIM)
    sums = tl.zeros([V_DIM], tl.float32)
    for i in range(first // PARTS, tl.cdiv(last, PARTS)):
        split = i * PARTS + tl.arange(0, PARTS)
        there = (split >= first) & (split < last)
        part = place + tl.cast(split, tl.int64) * rows
        top = tl.load(highest_ptr + part, mask=there, other=float("-inf"))
        found = tl.load(total_ptr + part, mask=there, other=0.0)
        parts = load_rows(sums_ptr, part, V_DIM, col, v_dim, there)
        above = tl.maximum(highest, tl.max(top, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        weight, rescale = tl.exp2(top - base), tl.exp2(highest - base)
        total = total * rescale + tl.sum(weight * found, 0)
        sums = sums * rescale + tl.sum(weight[:, None] * parts, 0)
        highest = above

    nothing = total == 0
    out = tl.where(nothing, 0.0, sums / tl.where(nothing, 1.0, total))
    lse = (highest + tl.log2(tl.where(nothing, 1.0, total))) * _LN_2
    lse = tl.where(nothing, float("-inf"), lse)
    tl.store(lse_ptr + program + tl.arange(0, 1), lse)
    out_ptr += batch * out_strides[0] + head * out_strides[1] + query * out_strides[2]
    mask = None if v_dim is None else col < v_dim
    tl.store(out_ptr + col, out.to(out_ptr.dtype.element_ty), mask=mask)

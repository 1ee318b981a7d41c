"""The forward pass of attention: a block of queries a program, keys and values streamed past it."""

import triton
import triton.language as tl

from tilewise.kernels.triton._attention_scores import (
    LOG2_E,
    at_head,
    hide,
    kept,
    load_rows,
    load_tile,
    numbers_of,
    rows_of_head,
    scored,
    seen_keys,
    step_at,
    steps_of,
    store_rows,
    stretches,
    turned,
)
from tilewise.kernels.triton._packed import fill_gaps, gaps_of, rows_of, sequence_of

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _attend(
    highest, total, sums, q, k_rows, v_rows, query, first, row, seed, offset, mask_at, bias_at,
    slope, rules, drawn, seq_q, seq_k, dim, v_dim, k_strides, v_strides,
    CHECK: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = first + tl.arange(0, KEYS)
    seen = None
    if CHECK:
        seen = seen_keys(key, seq_k, rules, mask_at)
    k = load_tile(k_rows, k_strides, first, dim, seen, KEYS, DIM)
    v = load_tile(v_rows, v_strides, first, v_dim, seen, KEYS, V_DIM)
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    keys = seen[None, :] if CHECK else (key < seq_k)[None, :]
    queries, shift = (query < seq_q)[:, None], seq_k - seq_q
    score, _ = scored(
        product, query[:, None], key[None, :], queries, keys, shift, rules, bias_at, slope
    )
    if CHECK:
        score = hide(score, query[:, None], key[None, :], queries, keys, shift, rules, mask_at)

    above = tl.maximum(highest, tl.max(score, 1) * rules.factor)
    base = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(tl.fma(score, rules.factor, -base[:, None]))
    rescale = tl.exp2(highest - base)
    total = total * rescale + tl.sum(p, 1)
    if drawn.scale is not None:
        p = tl.where(kept(drawn, seed, offset, row, first, KEYS), p, 0.0)
    sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
    return above, total, sums


@triton.jit
def _forward_kernel(
    out_ptr, highest_ptr, total_ptr, q_ptr, k, v, sinks_ptr, packed, rules, drawn,
    heads, group, seq_q, seq_k, dim, v_dim, out_strides, q_strides, k_strides, v_strides, sign,
    DIM: tl.constexpr, V_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_q, QUERIES)
    program = tl.program_id(0)
    first_query = (blocks - 1 - program % blocks) * QUERIES  # causal: the longest first
    index = tl.cast(program // blocks, tl.int64)
    batch, head = index // heads, index % heads
    query = first_query + tl.arange(0, QUERIES)
    at_q, at_k, seq_q, seq_k = sequence_of(packed, batch, seq_q, seq_k)
    row, line = rows_of(packed, index, head, at_q, seq_q)
    inside, row, line = query < seq_q, row + query, line + query
    out_ptr += head * out_strides[1]
    if packed.ends_q is not None:
        gaps = gaps_of(packed, False, batch, at_q, seq_q, program, blocks)
        lines = head * packed.total_q
        fill_gaps(out_ptr, 0.0, out_strides[0], v_dim, gaps, QUERIES, V_DIM)
        fill_gaps(highest_ptr + lines, float("-inf"), 1, None, gaps, QUERIES, 1)
        fill_gaps(total_ptr + lines, 0.0, 1, None, gaps, QUERIES, 1)
        if first_query >= seq_q:
            return

    k_rows = rows_of_head(k, k_strides, at_k, head // group)
    v_rows = rows_of_head(v, v_strides, at_k, head // group)
    mask_at, bias_at, slope = at_head(rules, batch, head)
    seed, offset = numbers_of(drawn)
    q_ptr += at_q * q_strides[0] + head * q_strides[1]
    q = load_rows(q_ptr, query, q_strides[2], tl.arange(0, DIM), dim, inside)
    q = turned(q, sign)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        highest = tl.maximum(highest, sink)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    sums = tl.zeros([QUERIES, V_DIM], tl.float32)
    stretch = stretches(
        first_query + seq_k - seq_q, seq_k, rules.left, rules.right, rules.mask,
        True, QUERIES, KEYS,
    )  # fmt: skip
    for CHECK in tl.static_range(2):
        if CHECK or rules.mask is None:
            for i in range(0, steps_of(CHECK, *stretch, KEYS)):
                first = step_at(CHECK, i, *stretch, KEYS)
                highest, total, sums = _attend(
                    highest, total, sums, q, k_rows, v_rows, query, first, row, seed, offset,
                    mask_at, bias_at, slope, rules, drawn, seq_q, seq_k, dim, v_dim,
                    k_strides, v_strides, CHECK, DIM, V_DIM, KEYS,
                )  # fmt: skip

    nothing = total == 0
    out = tl.where(nothing[:, None], 0.0, sums / tl.where(nothing, 1.0, total)[:, None])
    if drawn.scale is not None:
        out *= drawn.scale
    tl.store(highest_ptr + line, highest, mask=inside)
    tl.store(total_ptr + line, total, mask=inside)
    out_ptr += at_q * out_strides[0]
    store_rows(out_ptr, out, query, out_strides[2], tl.arange(0, V_DIM), v_dim, inside)

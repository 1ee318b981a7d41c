"""The gradients of what is added to the scores of attention: the bias, and the sink beside them."""

import triton
import triton.language as tl

from tilewise.kernels.triton._attention_scores import (
    LOG2_E,
    at_head,
    hide,
    kept,
    load_tile,
    numbers_of,
    probabilities,
    rows_of_head,
    scored,
    seen_keys,
    statistics,
    store_rows,
    stretches,
    turned,
)
from tilewise.kernels.triton._packed import rows_of, sequence_of

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _scores_gradient(
    dout, q, k, v, delta_ptr, highest_ptr, total_ptr, first_query, first_key, batch, head, row,
    line, at_q, at_k, group, rules, drawn, seed, offset, sign, seq_q, seq_k, dim, v_dim,
    dout_strides, q_strides, k_strides, v_strides,
    DIM: tl.constexpr, V_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """ds [query, key] of one head."""
    query, key = first_query + tl.arange(0, QUERIES), first_key + tl.arange(0, KEYS)
    mask_at, bias_at, slope = at_head(rules, batch, head)
    inside, seen = query < seq_q, seen_keys(key, seq_k, rules, mask_at)
    q_rows = rows_of_head(q, q_strides, at_q, head)
    dout_rows = rows_of_head(dout, dout_strides, at_q, head)
    k_rows = rows_of_head(k, k_strides, at_k, head // group)
    v_rows = rows_of_head(v, v_strides, at_k, head // group)
    q = load_tile(q_rows, q_strides, first_query, dim, inside, QUERIES, DIM)
    dout = load_tile(dout_rows, dout_strides, first_query, v_dim, inside, QUERIES, V_DIM)
    k = load_tile(k_rows, k_strides, first_key, dim, seen, KEYS, DIM)
    v = load_tile(v_rows, v_strides, first_key, v_dim, seen, KEYS, V_DIM)
    SPLIT: tl.constexpr = q.dtype == tl.float32
    highest, share = statistics(highest_ptr + line, total_ptr + line, query, seq_q, SPLIT)
    delta = tl.load(delta_ptr + line + query, mask=inside, other=0.0)

    product = tl.dot(turned(q, sign), tl.trans(k), input_precision="ieee")
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    queries, keys, shift = inside[:, None], seen[None, :], seq_k - seq_q
    score, _ = scored(
        product, query[:, None], key[None, :], queries, keys, shift, rules, bias_at, slope
    )
    score = hide(score, query[:, None], key[None, :], queries, keys, shift, rules, mask_at)
    p = probabilities(score, rules.factor, highest[:, None], share[:, None], SPLIT)
    if drawn.scale is not None:
        keep = kept(drawn, seed, offset, row + query, first_key, KEYS)
        dp = tl.where(keep, dp * drawn.scale, 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def _meets(
    packed, first_query, first_key, seq_q, seq_k, left, right,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Whether a tile has a query and a key of a packed sequence; of a batch they all have."""
    if packed.ends_q is None:
        return True
    else:
        place = first_key - (seq_k - seq_q)
        start, _, _, end = stretches(place, seq_q, right, left, None, True, KEYS, QUERIES)
        return (first_key < seq_k) & (first_query >= start) & (first_query < end)


@triton.jit
def _bias_backward_kernel(
    sums_ptr, dout, q, k, v, delta_ptr, highest_ptr, total_ptr, packed, rules, drawn, heads, group,
    seq_q, seq_k, dim, v_dim, dout_strides, q_strides, k_strides, v_strides, sign,
    lines, bias_heads, batch_copies, head_copies, parts,
    BY_QUERY: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    # A tile of the bias was added in `batch_copies` batches and `head_copies` heads, and to all
    # blocks of queries where it does not vary with them. Each program adds up one of `parts` parts
    # of what its tile was added to.
    program = tl.program_id(0)
    part, tile = tl.cast(program % parts, tl.int64), program // parts
    blocks = tl.cdiv(seq_k, KEYS)
    first_key, line = tile % blocks * KEYS, tile // blocks
    first_query, start, end = 0, 0, seq_q
    if packed.ends_q is None:
        start, _, _, end = stretches(
            first_key - (seq_k - seq_q), seq_q, rules.right, rules.left, None, True, KEYS, QUERIES
        )
    if BY_QUERY:
        blocks = tl.cdiv(seq_q, QUERIES)
        first_query, line = line % blocks * QUERIES, line // blocks
        start, end = tl.maximum(start, first_query), tl.minimum(end, first_query + QUERIES)
    blocks = tl.cdiv(tl.maximum(end - start, 0), QUERIES)
    bias_batch, bias_head = tl.cast(line // bias_heads, tl.int64), line % bias_heads
    copies = tl.cast(batch_copies * head_copies, tl.int64) * blocks

    seed, offset = numbers_of(drawn)
    sums = tl.zeros([QUERIES, KEYS], tl.float32)
    for i in range(part * copies // parts, (part + 1) * copies // parts):
        copy = i // blocks
        first = tl.cast(start + i % blocks * QUERIES, tl.int32)
        batch, head = bias_batch + copy // head_copies, bias_head + copy % head_copies
        at_q, at_k, own_q, own_k = sequence_of(packed, batch, seq_q, seq_k)
        if _meets(packed, first, first_key, own_q, own_k, rules.left, rules.right, QUERIES, KEYS):
            sums += _scores_gradient(
                dout, q, k, v, delta_ptr, highest_ptr, total_ptr, first, first_key, batch, head,
                *rows_of(packed, batch * heads + head, head, at_q, seq_q), at_q, at_k,
                group, rules, drawn, seed, offset, sign, own_q, own_k, dim, v_dim,
                dout_strides, q_strides, k_strides, v_strides, DIM, V_DIM, QUERIES, KEYS,
            )  # fmt: skip

    query, key = first_query + tl.arange(0, QUERIES), first_key + tl.arange(0, KEYS)
    sums_ptr += (part * lines + line) * (seq_q if BY_QUERY else 1) * seq_k
    if BY_QUERY:
        store_rows(sums_ptr, sums, query, seq_k, key, seq_k, query < seq_q)
    else:
        tl.store(sums_ptr + key, tl.sum(sums, 0), mask=key < seq_k)


@triton.jit
def _sink_share(sinks_ptr, highest_ptr, total_ptr, head, row, inside):
    """What part of the sum of each row is the sink's, and where there is a sum."""
    total = tl.load(total_ptr + row, mask=inside, other=0.0)
    something = total != 0
    if sinks_ptr is None:
        return tl.zeros_like(total), something
    else:
        highest = tl.load(highest_ptr + row, mask=inside, other=0.0)
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        p = tl.exp2(sink - tl.where(something, highest, float("inf")))
        return p / tl.where(something, total, 1.0), something


@triton.jit
def _sinks_backward_kernel(
    sums_ptr, sinks_ptr, delta_ptr, highest_ptr, total_ptr, batch, heads, seq_q, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program adds up one of `parts` parts of the queries of a head.
    head, part = tl.program_id(0) // parts, tl.cast(tl.program_id(0) % parts, tl.int64)
    rows = tl.cast(batch, tl.int64) * seq_q
    blocks = tl.cdiv(rows, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(part * blocks // parts, (part + 1) * blocks // parts):
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside, row = i < rows, (i // seq_q * heads + head) * seq_q + i % seq_q
        share, there = _sink_share(sinks_ptr, highest_ptr, total_ptr, head, row, inside)
        sums -= share * tl.load(delta_ptr + row, mask=there, other=0.0)
    tl.store(sums_ptr + part * heads + head, tl.sum(sums, 0))

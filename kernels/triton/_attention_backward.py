"""The backward pass of attention: one kernel for dq and one for dk and dv, each the only writer of
its elements: no atomics, the same bits every time."""

import triton
import triton.language as tl

from tilewise.kernels.triton._attention_scores import (
    at_head,
    hide,
    kept,
    load_rows,
    load_tile,
    numbers_of,
    probabilities,
    rows_of_head,
    scored,
    seen_keys,
    statistics,
    step_at,
    steps_of,
    store_rows,
    stretches,
    turned,
)
from tilewise.kernels.triton._packed import fill_gaps, gaps_of, rows_of, sequence_of


@triton.jit
def _add_queries(
    dq, exact, mean, dbias_ptr, q, dout, highest, share, delta, k_rows, v_rows, query, first, row,
    seed, offset, mask_at, bias_at, slope, rules, drawn, seq_q, seq_k, dim, v_dim, k_strides,
    v_strides,
    CHECK: tl.constexpr, DQ: tl.constexpr, EXACT: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = first + tl.arange(0, KEYS)
    seen = None
    if CHECK:
        seen = seen_keys(key, seq_k, rules, mask_at)
    k = load_tile(k_rows, k_strides, first, dim, seen, KEYS, DIM)
    v = load_tile(v_rows, v_strides, first, v_dim, seen, KEYS, V_DIM)
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    keys = seen[None, :] if CHECK else (key < seq_k)[None, :]
    queries, shift = (query < seq_q)[:, None], seq_k - seq_q
    score, steep = scored(
        product, query[:, None], key[None, :], queries, keys, shift, rules, bias_at, slope
    )
    if CHECK:
        score = hide(score, query[:, None], key[None, :], queries, keys, shift, rules, mask_at)

    SPLIT: tl.constexpr = q.dtype == tl.float32
    p = probabilities(score, rules.factor, highest[:, None], share[:, None], SPLIT)
    if drawn.scale is not None:
        dp = tl.where(kept(drawn, seed, offset, row, first, KEYS), dp * drawn.scale, 0.0)
    if EXACT:
        exact += tl.sum(p * dp, 1)
    if DQ or dbias_ptr is not None:
        ds = p * (dp - delta[:, None])
    if dbias_ptr is not None:
        store_rows(dbias_ptr, ds, row, seq_k, key, seq_k, query < seq_q)
    if DQ:
        if rules.softcap is not None:
            ds *= steep
            p *= steep
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if q.dtype == tl.float32:
            mean = tl.dot(p, k, mean, input_precision="ieee")
    return dq, exact, mean


@triton.jit
def _queries_backward_kernel(
    dq_ptr, dbias_ptr, delta_ptr, dout_ptr, dlse_ptr, q_ptr, k, v, out_ptr, highest_ptr, total_ptr,
    packed, rules, drawn, heads, group, seq_q, seq_k, dim, v_dim, dq_strides, dout_strides,
    out_strides, q_strides, k_strides, v_strides, sign, scale,
    DQ: tl.constexpr, EXACT: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Out is rounded, and with it delta: alike for all keys of a query, and more than ds is where a
    # query sees little beside one key. EXACT is that from the probabilities, for the other kernels;
    # in fp32 the error times the mean key is taken from dq. A bias of as many elements as there are
    # scores is no such sum: its gradient is written here, zeros where no tile is seen are there.
    blocks = tl.cdiv(seq_q, QUERIES)
    program = tl.program_id(0)
    first_query = (blocks - 1 - program % blocks) * QUERIES  # causal: the longest first
    index = tl.cast(program // blocks, tl.int64)
    batch, head = index // heads, index % heads
    query = first_query + tl.arange(0, QUERIES)
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    at_q, at_k, seq_q, seq_k = sequence_of(packed, batch, seq_q, seq_k)
    row, line = rows_of(packed, index, head, at_q, seq_q)
    inside, row = query < seq_q, row + query
    dq_ptr += head * dq_strides[1]
    if packed.ends_q is not None:
        if DQ:
            gaps = gaps_of(packed, False, batch, at_q, seq_q, program, blocks)
            fill_gaps(dq_ptr, 0.0, dq_strides[0], dim, gaps, QUERIES, DIM)
        if first_query >= seq_q:
            return

    dout_ptr += at_q * dout_strides[0] + head * dout_strides[1]
    out_ptr += at_q * out_strides[0] + head * out_strides[1]
    dout = load_rows(dout_ptr, query, dout_strides[2], v_col, v_dim, inside)
    out = load_rows(out_ptr, query, out_strides[2], v_col, v_dim, inside)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    exact = tl.zeros([QUERIES], tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + line + query, mask=inside, other=0.0)
        delta -= dlse
        exact -= dlse

    if DQ or EXACT or dbias_ptr is not None:
        k_rows = rows_of_head(k, k_strides, at_k, head // group)
        v_rows = rows_of_head(v, v_strides, at_k, head // group)
        q_ptr += at_q * q_strides[0] + head * q_strides[1]
        mask_at, bias_at, slope = at_head(rules, batch, head)
        seed, offset = numbers_of(drawn)
        q = turned(load_rows(q_ptr, query, q_strides[2], col, dim, inside), sign)
        SPLIT: tl.constexpr = q.dtype == tl.float32
        highest, share = statistics(highest_ptr + line, total_ptr + line, query, seq_q, SPLIT)
        dq = tl.zeros([QUERIES, DIM], tl.float32)
        mean = tl.zeros_like(dq)
        stretch = stretches(
            first_query + seq_k - seq_q, seq_k, rules.left, rules.right, rules.mask,
            True, QUERIES, KEYS,
        )  # fmt: skip
        for CHECK in tl.static_range(2):
            if CHECK or rules.mask is None:
                for i in range(0, steps_of(CHECK, *stretch, KEYS)):
                    first = step_at(CHECK, i, *stretch, KEYS)
                    dq, exact, mean = _add_queries(
                        dq, exact, mean, dbias_ptr, q, dout, highest, share, delta, k_rows, v_rows,
                        query, first, row, seed, offset, mask_at, bias_at, slope, rules, drawn,
                        seq_q, seq_k, dim, v_dim, k_strides, v_strides,
                        CHECK, DQ, EXACT, DIM, V_DIM, KEYS,
                    )  # fmt: skip
        if DQ:
            if SPLIT:
                dq -= (exact - delta)[:, None] * mean
            dq_ptr += at_q * dq_strides[0]
            store_rows(dq_ptr, dq * scale, query, dq_strides[2], col, dim, inside)
    tl.store(delta_ptr + line + query, exact if EXACT else delta, mask=inside)


@triton.jit
def _add_keys(
    dk, dv, k, v, dout_rows, q_rows, delta_ptr, highest_ptr, total_ptr, key, first_key, first, row,
    seed, offset, mask_at, bias_at, slope, rules, drawn, seq_q, seq_k, dim, v_dim, q_strides,
    dout_strides,
    CHECK: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    # What lies past the last query has no share, and what past the last key is not stored, so
    # neither needs to be hidden.
    query = first + tl.arange(0, QUERIES)
    inside = query < seq_q
    q = load_tile(q_rows, q_strides, first, dim, inside, QUERIES, DIM)
    dout = load_tile(dout_rows, dout_strides, first, v_dim, inside, QUERIES, V_DIM)
    SPLIT: tl.constexpr = q.dtype == tl.float32
    highest, share = statistics(highest_ptr, total_ptr, query, seq_q, SPLIT)
    delta = tl.load(delta_ptr + query, mask=inside, other=0.0)
    product = tl.dot(k, tl.trans(q), input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    queries, keys, shift = inside[None, :], (key < seq_k)[:, None], seq_k - seq_q
    if CHECK:
        keys = seen_keys(key, seq_k, rules, mask_at)[:, None]
    score, steep = scored(
        product, query[None, :], key[:, None], queries, keys, shift, rules, bias_at, slope
    )
    if CHECK:
        score = hide(score, query[None, :], key[:, None], queries, keys, shift, rules, mask_at)

    p = probabilities(score, rules.factor, highest[None, :], share[None, :], SPLIT)
    averaged = p
    if drawn.scale is not None:
        keep = tl.trans(kept(drawn, seed, offset, row + query, first_key, KEYS))
        dp = tl.where(keep, dp * drawn.scale, 0.0)
        averaged = tl.where(keep, p, 0.0)
    dv = tl.dot(averaged.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if rules.softcap is not None:
        ds *= steep
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys_backward_kernel(
    dk_ptr, dv_ptr, dout, q, k_ptr, v_ptr, delta_ptr, highest_ptr, total_ptr,
    packed, rules, drawn, kv_heads, group, seq_q, seq_k, dim, v_dim, dk_strides, dv_strides,
    dout_strides, q_strides, k_strides, v_strides, sign, scale,
    DIM: tl.constexpr, V_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_k, KEYS)
    program = tl.program_id(0)
    first_key = program % blocks * KEYS  # causal: the longest first
    place = tl.cast(program // blocks, tl.int64)
    batch, kv_head = place // kv_heads, place % kv_heads
    key = first_key + tl.arange(0, KEYS)
    col, v_col = tl.arange(0, DIM), tl.arange(0, V_DIM)
    at_q, at_k, seq_q, seq_k = sequence_of(packed, batch, seq_q, seq_k)
    dk_ptr += kv_head * dk_strides[1]
    dv_ptr += kv_head * dv_strides[1]
    if packed.ends_k is not None:
        gaps = gaps_of(packed, True, batch, at_k, seq_k, program, blocks)
        fill_gaps(dk_ptr, 0.0, dk_strides[0], dim, gaps, KEYS, DIM)
        fill_gaps(dv_ptr, 0.0, dv_strides[0], v_dim, gaps, KEYS, V_DIM)
        if first_key >= seq_k:
            return

    k_ptr += at_k * k_strides[0] + kv_head * k_strides[1]
    v_ptr += at_k * v_strides[0] + kv_head * v_strides[1]
    seed, offset = numbers_of(drawn)

    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, V_DIM], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        mask_at, bias_at, slope = at_head(rules, batch, head)
        seen = seen_keys(key, seq_k, rules, mask_at)
        k = turned(load_rows(k_ptr, key, k_strides[2], col, dim, seen), sign)
        v = load_rows(v_ptr, key, v_strides[2], v_col, v_dim, seen)
        index = batch * kv_heads * group + head
        row, line = rows_of(packed, index, head, at_q, seq_q)
        q_rows = rows_of_head(q, q_strides, at_q, head)
        dout_rows = rows_of_head(dout, dout_strides, at_q, head)
        stretch = stretches(
            first_key - (seq_k - seq_q), seq_q, rules.right, rules.left, rules.mask,
            False, KEYS, QUERIES,
        )  # fmt: skip
        bounded = rules.mask is not None or rules.left is not None or rules.right is not None
        # What does not change in a loop stays in it: taken out, it fills the registers.
        for CHECK in tl.static_range(2):
            if bounded if CHECK else rules.mask is None:
                for i in tl.range(0, steps_of(CHECK, *stretch, QUERIES), disable_licm=True):
                    first = step_at(CHECK, i, *stretch, QUERIES)
                    dk, dv = _add_keys(
                        dk, dv, k, v, dout_rows, q_rows, delta_ptr + line, highest_ptr + line,
                        total_ptr + line, key, first_key, first, row, seed, offset, mask_at,
                        bias_at, slope, rules, drawn, seq_q, seq_k, dim, v_dim, q_strides,
                        dout_strides, CHECK, DIM, V_DIM, QUERIES, KEYS,
                    )  # fmt: skip

    inside = key < seq_k
    dk_ptr += at_k * dk_strides[0]
    store_rows(dk_ptr, dk * scale, key, dk_strides[2], col, dim, inside)
    if drawn.scale is not None:
        dv *= drawn.scale
    dv_ptr += at_k * dv_strides[0]
    store_rows(dv_ptr, dv, key, dv_strides[2], v_col, v_dim, inside)

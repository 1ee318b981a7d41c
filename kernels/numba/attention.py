"""Attention on the CPU: launches of what `_attend` and `_attend_back` compute."""

import torch
from torch import Tensor

from tilewise.kernels.numba import _attend, _attend_back
from tilewise.kernels.numba._online_softmax import scaling
from tilewise.kernels.numba._rules import BLOCK, KEYS, SCORED, rules_of
from tilewise.kernels.numba._shared import same_layout, thread_scratch, wide_dtype
from tilewise.kernels.numba._simd import address, kind
from tilewise.kernels.numba._tiles import rounded

# Dq is summed in parts while there are fewer tasks, and memory, than this. By the sizes alone, so
# that the bits do not depend on the number of threads.
TASKS = 8
PART_ELEMENTS = 1 << 26


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
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    out = same_layout(q, v_dim)
    highest = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    total = torch.empty_like(highest)
    group = heads // kv_heads
    own_padding = mask is not None and mask.shape[2] == 1 and mask.shape[1] > 1
    shared = group if seq_q < BLOCK and not own_padding else 1
    items = batch * heads // shared * -(-seq_q * shared // int(BLOCK))
    counter, scratch, size = thread_scratch(highest, _attend.scratch_of(dim, v_dim))
    given = (mask, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    rules = rules_of(q, *given)
    _attend.attend(
        torch.get_num_threads(), total.numel() * seq_k, address(counter), items,
        address(scratch), size, (address(out), address(highest), address(total)),
        (address(q), address(k), address(v), address(sinks)),
        (kind(q), kind(total), kind(q if sinks is None else sinks), total.itemsize),
        (heads, kv_heads, seq_q, seq_k, dim, v_dim, shared),
        (*(t.stride()[:3] for t in (out, q, k, v)), total.stride()), (0, 0), rules,
        *_scaling(q, rules, scale),
    )  # fmt: skip
    return out, highest, total


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
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    dropout = (dropout_p, seeds, offsets, seed, offset)
    given = (mask, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    rules = rules_of(q, *given)
    sign, factors = _scaling(q, rules, scale)
    dq, dbias, dsinks = (q.new_empty(0) for _ in range(3))
    dk, dv = same_layout(k, dim), same_layout(v, v_dim)
    if want_dq or want_dk or want_dv or want_dbias:
        # Batches and heads that have one bias are in one item, which adds to its gradient alone.
        one_batch = want_dbias and bias is not None and bias.shape[0] == 1
        one_head = want_dbias and bias is not None and bias.shape[1] == 1
        at_once, heads_at_once = batch if one_batch else 1, kv_heads if one_head else 1
        units, tiles = batch // at_once * (kv_heads // heads_at_once), -(-seq_k // int(KEYS))
        parts = min(tiles, max(TASKS // units, 1), max(PART_ELEMENTS // q.numel(), 1))
        shape = (parts if want_dq else 0, batch, heads, rounded(seq_q), rounded(dim))
        sums = total.new_zeros(shape)
        bias_sums = _bias_sums(total, bias, parts) if want_dbias else None
        counter, scratch, size = thread_scratch(total, _attend_back.scratch_of(dim, v_dim))
        tensors = (dout, dlse, q, k, v, out, highest, total)
        _attend_back.differentiate(
            torch.get_num_threads(), 2 * total.numel() * seq_k, address(counter), units * parts,
            address(scratch), size,
            (address(sums), address(dk), address(dv), address(bias_sums)),
            tuple(map(address, tensors)), (kind(q), kind(total), total.itemsize),
            (batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, parts, at_once, heads_at_once),
            (*(t.stride()[:3] for t in (dk, dv, dout, q, k, v, out)), total.stride(),
             *_bias_strides(bias_sums)), (0, 0), rules, 0,
            (int(want_dq), int(want_dk), int(want_dv), int(want_dbias)), sign, _size(scale), factors,
        )  # fmt: skip
        if want_dq:
            for part in sums[1:]:
                sums[0] += part
            dq = same_layout(q, dim).copy_(sums[0, :, :, :seq_q, :dim].mul_(scale))
        if bias_sums is not None:
            dbias = bias_sums.sum(0).to(bias.dtype)
    if want_dsinks:
        dsinks = sinks.new_empty(heads)
        tensors = (dout, dlse, out, highest, total)
        _attend_back.differentiate_sinks(
            heads, dout.numel(), address(dsinks), address(sinks), tuple(map(address, tensors)),
            (kind(q), kind(total), kind(sinks)), (batch, seq_q, v_dim),
            (dout.stride()[:3], out.stride()[:3]), total.stride(), 0, factors,
        )  # fmt: skip
    return dq, dk if want_dk else q.new_empty(0), dv if want_dv else q.new_empty(0), dbias, dsinks


def _bias_sums(total: Tensor, bias: Tensor, parts: int) -> Tensor:
    """Zeros for the gradient of a bias: one set, or one a part if it does not vary along keys."""
    return total.new_zeros(parts if bias.shape[3] == 1 else 1, *bias.shape)


def _bias_strides(sums: Tensor | None) -> tuple[tuple[int, ...], int]:
    """0 along what is broadcast; and how far apart the parts are."""
    if sums is None:
        return (0, 0, 0, 0), 0
    strides = tuple(0 if n == 1 else s for n, s in zip(sums.shape, sums.stride(), strict=True))
    return strides[1:], strides[0]

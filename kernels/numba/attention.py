"""Attention on the CPU: launches of what `_attend` and `_attend_back` compute."""

import torch
from torch import Tensor

from tilewise.kernels.numba import _attend, _attend_back
from tilewise.kernels.numba._online_softmax import scaling
from tilewise.kernels.numba._rules import BLOCK, KEYS, SCORED, rules_of
from tilewise.kernels.numba._shared import (
    broadcast_strides,
    same_layout,
    thread_scratch,
    wide_dtype,
)
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
    dropout = (dropout_p, seeds, offsets, seed, offset)
    given = (mask, bias, alibi_slopes, sinks, left, right, softcap, _size(scale), dropout)
    rules = rules_of(q, *given)
    sign, factors = _scaling(q, rules, scale)
    results = (out, highest, total)
    grads = tuple(q.new_empty(0) for _ in range(4))
    if want_dq or want_dk or want_dv or want_dbias:
        wanted = (want_dq, want_dk, want_dv, want_dbias)
        numbers = (sign, _size(scale), factors)
        grads = _differentiate(dout, dlse, q, k, v, bias, results, rules, wanted, numbers)
    dsinks = q.new_empty(0)
    if want_dsinks:
        batch, heads, seq_q, _ = q.shape
        dsinks = sinks.new_empty(heads)
        _attend_back.differentiate_sinks(
            heads, dout.numel(), address(dsinks), address(sinks),
            tuple(map(address, (dout, dlse, *results))), (kind(q), kind(total), kind(sinks)),
            (batch, seq_q, v.shape[3]), (dout.stride()[:3], out.stride()[:3]), total.stride(), 0,
            factors,
        )  # fmt: skip
    dq = grads[0].mul_(scale) if want_dq else grads[0]
    return _like(dq, q, want_dq), *grads[1:], dsinks


def _like(sums: Tensor, x: Tensor, wanted: bool) -> Tensor:
    """Sums of padded rows as a tensor laid out as `x`."""
    if not wanted:
        return sums
    return same_layout(x, x.shape[3]).copy_(sums[:, :, : x.shape[2], : x.shape[3]])


def _differentiate(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    results: tuple[Tensor, ...], rules: tuple, wanted: tuple[bool, ...], numbers: tuple,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq before its scale, as sums of padded rows, dk, dv and dbias, or empty if not wanted."""
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    want_dq, want_dk, want_dv, want_dbias = wanted
    total = results[-1]
    dk = same_layout(k, dim) if want_dk else q.new_empty(0)
    dv = same_layout(v, v_dim) if want_dv else q.new_empty(0)
    # Batches and heads that have one bias are in one item, which adds to its gradient alone.
    shared = want_dbias and bias is not None
    at_once = batch if shared and bias.shape[0] == 1 else 1
    heads_at_once = kv_heads if shared and bias.shape[1] == 1 else 1
    units, tiles = batch // at_once * (kv_heads // heads_at_once), -(-seq_k // int(KEYS))
    parts = min(tiles, max(TASKS // units, 1), max(PART_ELEMENTS // q.numel(), 1))
    sums = total.new_zeros(parts if want_dq else 0, batch, heads, rounded(seq_q), rounded(dim))
    dbias = total.new_zeros(bias.shape) if want_dbias else None
    counter, scratch, size = thread_scratch(total, _attend_back.scratch_of(dim, v_dim))
    strides = [
        t.stride()[:3] if t.numel() else (0, 0, 0) for t in (dk, dv, dout, q, k, v, results[0])
    ]
    _attend_back.differentiate(
        torch.get_num_threads(), 2 * total.numel() * seq_k, address(counter), units * parts,
        address(scratch), size, tuple(map(address, (sums, dk, dv, dbias))),
        tuple(map(address, (dout, dlse, q, k, v, *results))),
        (kind(q), kind(total), total.itemsize),
        (batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, parts, at_once, heads_at_once),
        (*strides, total.stride(), broadcast_strides(dbias)), (0, 0), rules,
        tuple(map(int, wanted)), *numbers,
    )  # fmt: skip
    for part in sums[1:]:
        sums[0] += part
    dq = sums[0] if want_dq else q.new_empty(0)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias.to(bias.dtype)

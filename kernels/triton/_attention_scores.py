"""Scores of attention: tiles of queries and keys, what is added to them, hidden and dropped.

What an option that is not there would give is None, which the compiler knows: it costs nothing.
A tile lies as its kernel likes: queries and keys come with a dim of size 1 for each other.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._activations import tanh
from tilewise.kernels.triton._dropout import draw
from tilewise.kernels.triton._philox import keep, philox_words
from tilewise.kernels.triton._shared import broadcast_strides

LOG2_E = math.log2(math.e)


class Rules(NamedTuple):
    """How products become scores.

    Attributes:
        mask: Bytes, 0 where a key is hidden.
        mask_batch, mask_head, mask_query, mask_key: Its strides; None for the queries of one that
            is the same for all of them, a padding mask.
        bias: It.
        bias_batch, bias_head, bias_query, bias_key: Its strides; None for queries or keys that it
            is the same for.
        slopes: Of ALiBi.
        slope_batch, slope_head: Their strides.
        left: How many keys before its own place a query sees.
        right: And after it.
        softcap: The bound.
        steepness: What a product is multiplied by before tanh.
        scale: What a product is multiplied by where something is added to it.
        factor: What makes a score one in units of log 2.
    """

    mask: Any
    mask_batch: Any
    mask_head: Any
    mask_query: Any
    mask_key: Any
    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_query: Any
    bias_key: Any
    slopes: Any
    slope_batch: Any
    slope_head: Any
    left: Any
    right: Any
    softcap: Any
    steepness: Any
    scale: Any
    factor: Any


class Drawn(NamedTuple):
    """What dropout is drawn by: tensors or numbers, the threshold and the scale of what is kept."""

    seeds: Any
    offsets: Any
    seed: Any
    offset: Any
    threshold: Any
    scale: Any


@triton.jit
def load_rows(ptr, row, stride, col, cols, there):
    """A tile [row, col], zeros past `cols` and where a row is not there; None is all of them."""
    ptr += tl.cast(row, tl.int64)[:, None] * stride + col[None, :]
    if there is None:
        if cols is None:
            return tl.load(ptr)
        else:
            return tl.load(ptr, mask=(col < cols)[None, :], other=0.0)
    else:
        if cols is None:
            return tl.load(ptr, mask=there[:, None], other=0.0)
        else:
            return tl.load(ptr, mask=there[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit
def rows_of_head(x, strides, batch, head):
    """Where the rows of a head begin; without strides a tensor descriptor, and its place in it."""
    if strides is None:
        return x, tl.cast(batch, tl.int32), tl.cast(head, tl.int32)
    else:
        return x + batch * strides[0] + head * strides[1], 0, 0


@triton.jit
def load_tile(rows, strides, first, cols, there, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows from `first` on as `load_rows` gives them. Of a descriptor those past the end are zeros
    too, and all before it are there."""
    x, batch, head = rows
    if strides is None:
        return x.load([batch, head, first, 0]).reshape(ROWS, COLS)
    else:
        row, col = first + tl.arange(0, ROWS), tl.arange(0, COLS)
        return load_rows(x, row, strides[2], col, cols, there)


@triton.jit
def store_rows(ptr, value, row, stride, col, cols, there):
    """A tile [row, col], but for what is past `cols` and rows that are not there."""
    ptr += tl.cast(row, tl.int64)[:, None] * stride + col[None, :]
    mask = there[:, None]
    if cols is not None:
        mask = mask & (col < cols)[None, :]
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def stretches(
    place, others, before, after, all_checked,
    TAIL: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Where a block of OWN rows, the first of them at `place` among the others, begins to see some
    of these, where all of it all of them, where no longer, and where nothing; but for the last in
    whole steps. TAIL says whether a last step that is not whole is one to be checked."""
    start = 0
    whole = 0
    partial = others // STEP * STEP if TAIL else tl.cdiv(others, STEP) * STEP
    end = others
    if before is not None:
        start = tl.maximum(place - before, 0) // STEP * STEP
        whole = tl.cdiv(tl.maximum(place + (OWN - 1) - before, 0), STEP) * STEP
    if after is not None:
        end = tl.minimum(others, tl.maximum(place + OWN + after, 0))
        partial = tl.minimum(partial, tl.maximum(place + after + 1, 0) // STEP * STEP)
    if all_checked is not None:
        whole = start
        partial = start
    return start, whole, tl.maximum(whole, partial), end


@triton.jit
def steps_of(CHECK: tl.constexpr, start, whole, partial, end, STEP: tl.constexpr):
    """How many steps see some, or see all."""
    if CHECK:
        before = tl.minimum(whole, end) - start
        return tl.cdiv(before, STEP) + tl.cdiv(tl.maximum(end - partial, 0), STEP)
    else:
        return (partial - whole) // STEP


@triton.jit
def step_at(CHECK: tl.constexpr, i, start, whole, partial, end, STEP: tl.constexpr):
    """Where the step with this number begins: of those that see some, at both boundaries."""
    if CHECK:
        before = tl.cdiv(tl.minimum(whole, end) - start, STEP)
        first = tl.where(i < before, start + i * STEP, partial + (i - before) * STEP)
    else:
        first = whole + i * STEP
    return tl.multiple_of(first, STEP)


@triton.jit
def at_head(rules, batch, head):
    """How far into mask and bias a head begins, and its slope; 0 of what is not there."""
    mask_at, bias_at, slope = 0, 0, 0.0
    if rules.mask is not None:
        mask_at = batch * rules.mask_batch + head * rules.mask_head
    if rules.bias is not None:
        bias_at = batch * rules.bias_batch + head * rules.bias_head
    if rules.slopes is not None:
        place = batch * rules.slope_batch + head * rules.slope_head
        slope = tl.load(rules.slopes + place)
    return mask_at, bias_at, slope


@triton.jit
def seen_keys(key, seq_k, rules, mask_at):
    """The keys there are and a padding mask leaves: the others are never read, as may be NaN."""
    seen = key < seq_k
    if rules.mask is not None and rules.mask_query is None:
        place = mask_at + tl.cast(key, tl.int64) * rules.mask_key
        seen = tl.load(rules.mask + place, mask=seen, other=0) != 0
    return seen


@triton.jit
def _varying(ptr, query_stride, key_stride, query, key, queries, keys):
    """Of a bias or a mask, the elements of queries and keys that are there."""
    if query_stride is None:
        if key_stride is None:
            return tl.load(ptr)
        else:
            return tl.load(ptr + tl.cast(key, tl.int64) * key_stride, mask=keys, other=0)
    else:
        ptr += tl.cast(query, tl.int64) * query_stride
        if key_stride is None:
            return tl.load(ptr, mask=queries, other=0)
        else:
            ptr += tl.cast(key, tl.int64) * key_stride
            return tl.load(ptr, mask=queries & keys, other=0)


@triton.jit
def scored(product, query, key, queries, keys, shift, rules, bias_at, slope):
    """Scores of products, in what `factor` makes units of log 2, and the slope of the softcap."""
    score, steep = product, 1.0
    if rules.softcap is not None:
        t = tanh(product * rules.steepness)
        score = rules.softcap * t
        steep = 1.0 - t * t
    elif rules.scale is not None:
        score = product * rules.scale
    if rules.bias is not None:
        bias = rules.bias + bias_at
        added = _varying(bias, rules.bias_query, rules.bias_key, query, key, queries, keys)
        score += added.to(tl.float32)
    if rules.slopes is not None:
        score -= slope * tl.abs(query + shift - key).to(tl.float32)
    return score, steep


@triton.jit
def hide(score, query, key, queries, keys, shift, rules, mask_at):
    """Scores, -inf where the two may not meet."""
    allowed = keys
    if rules.right is not None:
        allowed = allowed & (key <= query + (shift + rules.right))
    if rules.left is not None:
        allowed = allowed & (key >= query + (shift - rules.left))
    if rules.mask is not None and rules.mask_query is not None:
        mask = rules.mask + mask_at
        flags = _varying(mask, rules.mask_query, rules.mask_key, query, key, queries, keys)
        allowed = allowed & (flags != 0)
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def _number_of(ptr, number):
    if ptr is None:
        return tl.cast(number, tl.int64)
    else:
        return tl.load(ptr)


@triton.jit
def numbers_of(drawn):
    """Seed and offset, once for all tiles."""
    seed, offset = 0, 0
    if drawn.scale is not None:
        seed = _number_of(drawn.seeds, drawn.seed)
        offset = _number_of(drawn.offsets, drawn.offset)
    return seed, offset


@triton.jit
def kept(drawn, seed, offset, row, first, KEYS: tl.constexpr):
    """Whether dropout keeps the keys from `first` on, a multiple of 4, of these rows of it, [row,
    key]. Four keys share a draw."""
    return keep(philox_words(seed, offset, row[:, None], first, KEYS), drawn.threshold)


@triton.jit
def statistics(highest_ptr, total_ptr, query, seq_q, SPLIT: tl.constexpr):
    """The highest score of each query and 1 / the sum, infinity and 0 where there is nothing to
    see. If not SPLIT both are in the first: to 16 bits it does not matter how that is rounded."""
    total = tl.load(total_ptr + query, mask=query < seq_q, other=0.0)
    highest = tl.load(highest_ptr + query, mask=query < seq_q, other=0.0)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    if not SPLIT:
        highest += tl.log2(total)
    return tl.where(nothing, float("inf"), highest), tl.where(nothing, 0.0, 1.0 / total)


@triton.jit
def probabilities(score, factor, highest, share, SPLIT: tl.constexpr):
    """Of scores and the `statistics` of their queries."""
    p = tl.exp2(tl.fma(score, factor, -highest))
    if SPLIT:
        p *= share
    return p


@triton.jit
def turned(x, sign):
    """`x` times the sign of the scale, None of a positive one."""
    if sign is None:
        return x
    else:
        return (x.to(tl.float32) * sign).to(x.dtype)


def rules_of(
    mask: Tensor | None, bias: Tensor | None, slopes: Tensor | None, left: int, right: int,
    softcap: float, scale: float, seq_q: int, seq_k: int,
) -> tuple[Rules, float | None]:  # fmt: skip
    """How scores are made, and the sign of the scale. This goes to one factor, so that the highest
    product stays the highest when scaled; and `scale` itself to what nothing is added to, in one
    product with log2(e)."""
    size, sign = abs(scale), None if scale > 0 else -1.0 if scale else 0.0
    added = softcap > 0 or bias is not None or slopes is not None
    rules = Rules(
        None if mask is None else mask.view(torch.uint8), *_varying_strides(mask, padding=True),
        bias, *_varying_strides(bias),
        slopes, *((None, None) if slopes is None else slopes.stride()),
        left if 0 <= left < seq_k - 1 else None, right if 0 <= right < seq_q - 1 else None,
        softcap or None, size / softcap if softcap else None, size if added else None,
        LOG2_E if added or not scale else size * LOG2_E,
    )  # fmt: skip
    return rules, sign


def _varying_strides(t: Tensor | None, padding: bool = False) -> tuple[int | None, ...]:
    """Of batch and heads, 0 along what is broadcast; of queries and keys, None there."""
    if t is None:
        return (None,) * 4
    batch, heads, queries, keys = broadcast_strides(t)
    by_query, by_key = (size > 1 for size in t.shape[2:])
    one_row = padding and not by_query
    return batch, heads, queries if by_query else None, keys if by_key or one_row else None


def hides_keys(rules: Rules) -> bool:
    """Whether there is a padding mask: what it hides is not even read."""
    return rules.mask is not None and rules.mask_query is None


def drawn_by(
    dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int
) -> Drawn:
    """All None without dropout; seeds and offsets have one element."""
    if dropout_p == 0:
        return Drawn(*[None] * 6)
    return Drawn(*draw(dropout_p, seeds, offsets, seed, offset)[0])

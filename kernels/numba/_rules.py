"""What becomes of a tile of scores, keys its rows and queries its lanes, before the softmax.

A score is scaled, capped, given its bias and its slope, and hidden where the rules say so. What a
rule says of a query and its keys lies in memory along the keys: it is copied to a panel of rows and
transposed. Lanes are rows of the heads that share a key, one head's queries after the other's.
"""

import math

import numpy as np
from torch import Tensor

from tilewise.kernels.numba._columns import (
    add_columns,
    cap_columns,
    hide_columns,
    mark_columns,
    place_columns,
)
from tilewise.kernels.numba._dropout import draw
from tilewise.kernels.numba._matmul import HEIGHT, PANEL, lanes, once, transpose
from tilewise.kernels.numba._parallel import callee
from tilewise.kernels.numba._shared import broadcast_strides
from tilewise.kernels.numba._simd import INTEGER, address, kind, load, offset, pointer, real, store

KEYS = np.int64(128)  # in a tile, which with its scores stays in the L2 cache
FLAG = np.uint8(0)
FAR = float("inf")

# Lines of numbers, one for each query of a block.
LINE = np.int64(128)
HIGHEST, TOTAL, RESCALE, START, SLOPE = (np.int64(i) * LINE for i in range(5))
LINES = 5

# Where these stand in what `rules_of` returns.
LEFT, RIGHT, SCALE, CAP, MASK, BIAS, SLOPES, DROPOUT, SCORED = range(9)


def rules_of(
    q: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    softcap: float,
    size: float,
    dropout: tuple,
) -> tuple:
    """The rules as a kernel takes them: numbers, addresses and strides; 0 where there is no such
    rule. Where a score is more than the product, it is made in natural units: `SCORED`."""
    scored = bool(softcap) or not all(t is None for t in (bias, alibi_slopes, sinks))
    padding = mask is not None and mask.shape[2] == 1
    slope_strides = (0, 0) if alibi_slopes is None else alibi_slopes.stride()
    return (
        left, right, size / softcap if softcap else size, softcap,
        (address(mask), broadcast_strides(mask), int(padding)),
        (address(bias), broadcast_strides(bias), kind(q if bias is None else bias)),
        (address(alibi_slopes), slope_strides),
        draw(*dropout), int(scored),
    )  # fmt: skip


# --- Which keys a block of queries sees at all.


@callee
def first_seen(rules, lowest, seq_q, seq_k):
    """The first key that the query `lowest`, or any after it, sees."""
    return max(lowest + seq_k - seq_q - rules[LEFT], 0) if rules[LEFT] >= 0 else 0


@callee
def end_seen(rules, highest, seq_q, seq_k):
    """One past the last key that the query `highest`, or any before it, sees."""
    if rules[RIGHT] < 0:
        return seq_k
    return min(max(highest + seq_k - seq_q + rules[RIGHT] + 1, 0), seq_k)


@callee
def _all_see_all(rules, lowest, highest, first, keys, seq_q, seq_k):
    """Whether all queries from `lowest` to `highest` see all of these keys."""
    near = rules[LEFT] < 0 or first >= highest + seq_k - seq_q - rules[LEFT]
    return near and (rules[RIGHT] < 0 or first + keys - 1 <= lowest + seq_k - seq_q + rules[RIGHT])


# --- What lies along the keys, as a tile.


@callee
def place_of(strides, batch, head, query):
    """Where the line of this query begins, in elements."""
    return batch * strides[0] + head * strides[1] + query * strides[2]


@callee
def _read_line(line, source, step, keys):
    if step == 1:
        for j in range(keys):
            store(line, j, load(source, j))
    else:
        for j in range(keys):
            store(line, j, load(source, j * step))


@callee
def _mark_line(line, mask, step, keys):
    """0 for what is seen, -inf for the others."""
    seen, hidden = real(line, 0), real(line, -math.inf)
    for j in range(keys):
        store(line, j, seen if load(mask, j * step) else hidden)


@callee
def _turned(tile, stage, keys):
    """The stage, a line of KEYS a lane, with a row a key."""
    tall = (keys + HEIGHT - 1) // HEIGHT * HEIGHT
    width = lanes(tile)
    transpose(tile, PANEL, stage, KEYS, PANEL, (tall + width - 1) // width * width)


@callee
def _bias_tile(tile, stage, bias, batch, head, row, used, first, keys, seq_q):
    at, strides, bias_kind = bias
    once()
    for i in range(used):
        place = place_of(strides, batch, head + (row + i) // seq_q, (row + i) % seq_q)
        place += first * strides[3]
        source = offset(pointer(at, bias_kind), place)
        _read_line(offset(stage, i * KEYS), source, strides[3], keys)
    _turned(tile, stage, keys)


@callee
def _mask_tile(tile, stage, mask, batch, head, row, used, first, keys, seq_q):
    at, strides, _ = mask
    once()
    for i in range(used):
        place = place_of(strides, batch, head + (row + i) // seq_q, (row + i) % seq_q)
        place += first * strides[3]
        _mark_line(offset(stage, i * KEYS), pointer(at + place, FLAG), strides[3], keys)
    _turned(tile, stage, keys)


@callee
def _hide_keys(scores, stride, cols, mask, batch, head, first, keys):
    """-inf for all queries, where a mask of padding hides a key."""
    at, strides, _ = mask
    flags = pointer(at + place_of(strides, batch, head, 0), FLAG)
    for i in range(keys):
        if load(flags, (first + i) * strides[3]) == 0:
            for j in range(cols):
                store(scores, i * stride + j, real(scores, -math.inf))


# --- A tile of scores by all the rules.


@callee
def _start_lanes(stats, rules, row, rows, cols, seq_q, seq_k, first, batch, head):
    """For each lane: how far the first key is from the query's own place, and the slope."""
    slopes_at, slope_strides = rules[SLOPES]
    for j in range(cols):
        r = row + min(j, rows - 1)
        store(stats, START + j, real(stats, first - (r % seq_q + seq_k - seq_q)))
        slope = real(stats, 0)
        if slopes_at:
            place = batch * slope_strides[0] + (head + r // seq_q) * slope_strides[1]
            slope = real(stats, load(pointer(slopes_at, np.float32(0)), place))
        store(stats, SLOPE + j, slope)


@callee
def make_scores(
    scores, stride, bounded, tile, stage, stats, rules, batch, head, row, rows, cols, first, keys,
    seq_q, seq_k,
):  # fmt: skip
    """Turn products [keys, cols] of queries `row` and on into scores.

    `bounded` gets the tanh of a cap, and may be `tile`, which is scratch for as many rows of PANEL;
    `stage` is for PANEL rows of KEYS. `stats` begins at the first of these lanes.
    """
    once()
    step, scale, cap = lanes(scores), real(scores, rules[SCALE]), real(scores, rules[CAP])
    one_head = row // seq_q == (row + rows - 1) // seq_q
    lowest = row % seq_q if one_head else 0
    highest = (row + rows - 1) % seq_q if one_head else seq_q - 1
    placing = rules[SLOPES][0] != 0 or not _all_see_all(
        rules, lowest, highest, first, keys, seq_q, seq_k
    )
    if rules[SCORED]:
        for vector in range(cols // step):
            j = vector * step
            cap_columns(offset(scores, j), stride, keys, scale, cap, offset(bounded, j))
    if rules[BIAS][0]:
        _bias_tile(tile, stage, rules[BIAS], batch, head, row, rows, first, keys, seq_q)
        for vector in range(cols // step):
            j = vector * step
            add_columns(offset(scores, j), stride, offset(tile, j), PANEL, keys)
    if placing:
        _start_lanes(stats, rules, row, rows, cols, seq_q, seq_k, first, batch, head)
        left = real(scores, FAR if rules[LEFT] < 0 else float(rules[LEFT]))
        right = real(scores, FAR if rules[RIGHT] < 0 else float(rules[RIGHT]))
        for vector in range(cols // step):
            j = vector * step
            place_columns(
                offset(scores, j), stride, keys, offset(stats, START + j), left, right,
                offset(stats, SLOPE + j),
            )  # fmt: skip
    mask_at, _, padding = rules[MASK]
    if mask_at and padding:
        _hide_keys(scores, stride, cols, rules[MASK], batch, head, first, keys)
    elif mask_at:
        _mask_tile(tile, stage, rules[MASK], batch, head, row, rows, first, keys, seq_q)
        for vector in range(cols // step):
            j = vector * step
            hide_columns(offset(scores, j), stride, offset(tile, j), PANEL, keys)


@callee
def mark_dropped(marks, stride, counters, rules, batch, head, heads, row, rows, cols, first, keys,
                 seq_q, max_q):  # fmt: skip
    """marks[keys, cols] = 1 / (1 - p) where dropout keeps a probability, 0 where it does not.

    `counters` is scratch for a number a lane.
    """
    once()
    _, threshold, scale, seeds_at, _, seed, offsets_at, _, place = rules[DROPOUT]
    seed = load(pointer(seeds_at, INTEGER), 0) if seeds_at else seed
    place = load(pointer(offsets_at, INTEGER), 0) if offsets_at else place
    for j in range(cols):
        r = row + min(j, rows - 1)
        store(counters, j, (batch * heads + head + r // seq_q) * max_q + r % seq_q)
    step = lanes(marks)
    for vector in range(cols // step):
        j = vector * step
        mark_columns(
            offset(marks, j), stride, keys, first, offset(counters, j), seed, place, threshold,
            real(marks, scale),
        )  # fmt: skip

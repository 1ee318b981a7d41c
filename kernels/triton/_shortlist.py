"""The few logits of a row among which its cuts lie, on the GPU, from programs that share the row.

Of a small top-k: what the largest logits of k groups of columns reach, the k-th in rank reaches
too, and of a usual row hardly more logits than k do. Of others: numbers and masses of steps down
from the largest say in which step a cut lies. Such logits are listed, in any order, and as they are
few, every program that needs the cut searches them itself. Where they are not, `_ranks` searches
the row. All sums are of integers: a cut does not know how its row is shared out.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import filters_of
from tilewise.kernels.triton._parts import GROUPS, find_tops, groups_of, part_of, top_of_parts
from tilewise.kernels.triton._ranks import (
    DIGITS,
    SIGN,
    cut_to_min_p,
    goal_of,
    key_of,
    load,
    mass_of,
    prefix,
    row_block,
)
from tilewise.kernels.triton._shared import launch_options

FEW = tl.constexpr(512)  # so large a top-k is small
ROOM = tl.constexpr(4096)  # of a list
TILE = tl.constexpr(512)  # of a list
STEPS = tl.constexpr(1024)
BOUND_PASSES = tl.constexpr(5)  # of three bits
STEP_BITS = tl.constexpr(8)  # 256 steps of 1/64, as many of 1/32, of 1/16 and of 1/8
FIRST_STEP = tl.constexpr(129 << 8)  # the bits of 4.0
# Of a list: how many are on it, then what `_search` calls `goal`, `near`, `base` and `skipped`; the
# last is a count for whoever reads the list.
FIELDS = tl.constexpr(8)
COLUMN_BITS = tl.constexpr(23)  # of a rank: as many logits have masses whose sum fits
LAST = tl.constexpr((1 << 23) - 1)  # column; of a lower one more bits are turned
NO_RANK = tl.constexpr(1 << 62)
LEAST_VOCAB, MOST_VOCAB = 8192, 1 << 23


class Shortlist(NamedTuple):
    """Of rows that `parts` programs share: `_parts.find_tops`, ranks, and what they are."""

    parts: int
    tops: Tensor | None
    firsts: Tensor | None
    ranks: Tensor | None = None
    sums: Tensor | None = None

    @property
    def words(self) -> int:
        """Of the sums of a row."""
        return 0 if self.sums is None else self.sums.shape[1]


@triton.jit
def is_searched(t, k, p, vocab):
    """Whether top-k or top-p cut a row, and not to its first."""
    return (t > 0) & (k != 1) & (p > 0) & (((k > 0) & (k < vocab)) | (p < 1))


@triton.jit
def is_few(k):
    return (k > 0) & (k <= FEW)


@triton.jit
def _rank_of(key, col, DIGITS: tl.constexpr):
    """An int64 for each logit of a row, ordered as they are in rank; at least 0."""
    SHIFT: tl.constexpr = 32 - 2 * DIGITS
    return ((key >> SHIFT).to(tl.int64) << COLUMN_BITS) + (col ^ LAST)


@triton.jit
def place_of(rank, DIGITS: tl.constexpr):
    """The key and the column."""
    SHIFT: tl.constexpr = 32 - 2 * DIGITS
    key = (rank >> COLUMN_BITS).to(tl.uint32) << SHIFT
    # Of a negative number all bits are turned, those too that a narrower dtype does not have.
    key = tl.where(key < SIGN, key + ((1 << SHIFT) - 1), key)
    return key, ((rank & LAST) ^ LAST).to(tl.int32)


@triton.jit
def logit_of(key):
    bits = tl.where(key < SIGN, key ^ 0xFFFFFFFF, key ^ SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _step_of(x, top):
    gap = tl.where(x == top, 0.0, top - x)  # inf - inf is NaN
    bits = (gap + 4.0).to(tl.int32, bitcast=True) >> (23 - STEP_BITS)
    return tl.minimum(bits - FIRST_STEP, STEPS - 1)


@triton.jit
def listed(ranks_ptr, start, count):
    """A tile of the list; -1 past its end."""
    place = start + tl.arange(0, TILE)
    return tl.load(ranks_ptr + place, mask=place < count, other=-1)


@triton.jit
def _weights(rank, top, inverse, near, MASSES: tl.constexpr, DIGITS: tl.constexpr):
    """Of those on the list: of a step from `near` on 1, or the mass of any."""
    key, _ = place_of(rank, DIGITS)
    x = tl.where(rank >= 0, logit_of(key), float("-inf"))
    if MASSES:
        return mass_of(x, top, inverse)
    else:
        return ((_step_of(x, top) >= near) & (rank >= 0)).to(tl.int64)


@triton.jit
def _reached(rank, weight, low, shift):
    """The weights from `low` on, and from seven higher ranks."""
    thresholds = low + (tl.arange(0, 8).to(tl.int64) << shift)
    return tl.sum(tl.where(rank[:, None] >= thresholds[None, :], weight[:, None], 0), 0)


@triton.jit
def _shift_of(span):
    """By so many bits a span fits into three."""
    return tl.maximum((span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 129, 0)


@triton.jit
def _reach(
    ranks_ptr, count, goal, top, inverse, near, MASSES: tl.constexpr, DIGITS: tl.constexpr
):  # fmt: skip
    """The highest rank on the list from which on the weights reach `goal`, which all of them do."""
    low, high = tl.cast(0, tl.int64), tl.cast(NO_RANK, tl.int64)
    while low < high:
        lowest, highest = tl.cast(NO_RANK, tl.int64), tl.cast(0, tl.int64)
        for start in range(0, count, TILE):
            rank = listed(ranks_ptr, start, count)
            inside = (rank >= low) & (rank <= high)
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, rank, NO_RANK), 0))
            highest = tl.maximum(highest, tl.max(tl.where(inside, rank, 0), 0))
        shift = _shift_of(highest - lowest)
        sums = tl.zeros([8], tl.int64)
        for start in range(0, count, TILE):
            rank = listed(ranks_ptr, start, count)
            weight = _weights(rank, top, inverse, near, MASSES, DIGITS)
            sums += _reached(rank, weight, lowest, shift)
        steps = tl.sum((sums >= goal).to(tl.int64), 0) - 1
        low = lowest + (steps << shift)
        high = tl.minimum(highest, low + (tl.cast(1, tl.int64) << shift) - 1)
    return low


@triton.jit
def _bound_of(groups_ptr, groups, k, GROUPS: tl.constexpr):
    """A key that the largest logits of k groups reach, 0 if there are less; nearly the highest."""
    group = tl.arange(0, GROUPS)
    x = tl.load(groups_ptr + group, mask=group < groups, other=float("-inf"))
    key = tl.where(group < groups, (key_of(x) >> 8).to(tl.int32), -1)
    low, high = tl.cast(0, tl.int32), tl.max(key, 0)
    for _ in range(BOUND_PASSES):
        lowest = tl.min(tl.where(key >= low, key, high), 0)
        shift = _shift_of(high - lowest)
        thresholds = lowest + (tl.arange(0, 8) << shift)
        counts = tl.sum((key[:, None] >= thresholds[None, :]).to(tl.int32), 0)
        steps = tl.sum((counts >= k).to(tl.int32), 0) - 1
        low = tl.where(steps < 0, low, lowest + (steps << shift))
        high = tl.minimum(high, low + (1 << shift) - 1)
    return low.to(tl.uint32) << 8


@triton.jit(do_not_specialize=["k"])
def _steps_kernel(
    sums_ptr, x_ptr, tops_ptr, firsts_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    vocab, x_stride, k, t, p, m, WORDS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """How many logits above -inf, and which mass, each step of a row has."""
    row = tl.cast(tl.program_id(0), tl.int64)
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    top, _ = top_of_parts(tops_ptr, firsts_ptr, row, tl.num_programs(1), vocab, PARTS)
    if can & (top > float("-inf")) & is_searched(t, k, p, vocab) & (is_few(k) == 0):
        begin, end = part_of(vocab, BLOCK)
        for start in range(begin, end, BLOCK):
            x, _col = load(x_ptr + row * x_stride, start, end, BLOCK)
            place = row * WORDS + FIELDS + _step_of(x, top)
            mask = x > float("-inf")
            if k > 0:
                one = tl.full([BLOCK], 1, tl.int64)
                tl.atomic_add(sums_ptr + place, one, mask=mask, sem="relaxed")
            if p < 1:
                mass = mass_of(x, top, 1.0 / t)
                mask = mask & (mass > 0)
                tl.atomic_add(sums_ptr + place + STEPS, mass, mask=mask, sem="relaxed")


@triton.jit
def _steps_of_cuts(counts_ptr, k, p):
    """The step of the k-th, -1 if there are less, what is wanted in it, and the mass before it, or
    of all; steps between which the goal of top-p lies, and the mass before those."""
    step = tl.arange(0, STEPS)
    k_step, goal = tl.cast(-1, tl.int32), tl.cast(0, tl.int64)
    if k > 0:
        counts = tl.load(counts_ptr + step)
        if k <= tl.sum(counts, 0):
            k_step = tl.sum((tl.cumsum(counts, 0) < k).to(tl.int32), 0)
            goal = k - tl.sum(tl.where(step < k_step, counts, 0), 0)
    base, skipped = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    first, last = tl.cast(STEPS, tl.int32), tl.cast(-1, tl.int32)
    if p < 1:
        masses = tl.load(counts_ptr + STEPS + step)
        base = tl.sum(tl.where((k_step < 0) | (step < k_step), masses, 0), 0)
        most = base + tl.sum(tl.where(step == k_step, masses, 0), 0)
        until = tl.cumsum(masses, 0)
        first = tl.sum((until < goal_of(p, tl.maximum(base, 1))).to(tl.int32), 0)
        last = tl.sum((until < goal_of(p, most)).to(tl.int32), 0)
        skipped = tl.sum(tl.where(step < first, masses, 0), 0)
    return k_step, goal, base, first, last, skipped


@triton.jit(do_not_specialize=["k"])
def _list_kernel(
    ranks_ptr, sums_ptr, x_ptr, tops_ptr, firsts_ptr, groups_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    vocab, x_stride, groups, k, t, p, m, WORDS: tl.constexpr, GROUPS: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, parts = tl.cast(tl.program_id(0), tl.int64), tl.num_programs(1)
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    top, _ = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    fields_ptr = sums_ptr + row * WORDS
    can = can & (top > float("-inf")) & is_searched(t, k, p, vocab)
    bound, k_step, goal = tl.cast(0, tl.uint32), tl.cast(-1, tl.int32), tl.cast(0, tl.int64)
    base, skipped = goal, goal
    near, first, last = tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(STEPS, tl.int32)
    few = can & is_few(k)
    many = can & (is_few(k) == 0) & (WORDS > FIELDS)
    if groups_ptr is not None:
        goal = tl.where(few, k, 0)
        if few:
            bound = _bound_of(groups_ptr + row * groups, groups, k, GROUPS)
    if many:
        k_step, goal, base, first, last, skipped = _steps_of_cuts(fields_ptr + FIELDS, k, p)
        near = tl.where(k_step < 0, STEPS, k_step)
    if tl.program_id(1) == 0:
        tl.store(fields_ptr + 1, goal)
        tl.store(fields_ptr + 2, near.to(tl.int64))
        tl.store(fields_ptr + 3, base)
        tl.store(fields_ptr + 4, skipped)

    if few | many:
        begin, end = part_of(vocab, BLOCK)
        for start in range(begin, end, BLOCK):
            x, col = load(x_ptr + row * x_stride, start, end, BLOCK)
            step = _step_of(x, top)
            key = key_of(x)
            mine = (step == k_step) | ((step >= first) & (step <= last))
            mine = (mine & (key >= bound) & (x > float("-inf"))).to(tl.int32)
            count = tl.sum(mine, 0)
            if count > 0:
                before = tl.atomic_add(fields_ptr, count.to(tl.int64), sem="relaxed")
                place = before + tl.cumsum(mine, 0) - 1
                rank = _rank_of(key, col, DIGITS)
                tl.store(ranks_ptr + row * ROOM + place, rank, mask=(mine > 0) & (place < ROOM))


@triton.jit
def _search(ranks_ptr, fields_ptr, top, inverse, p, DIGITS: tl.constexpr):
    """`least` and `stop` of top-k and top-p. Of those from the step `near` on `goal` are within
    top-k; before the list the mass is `skipped`, before `near` it is `base`."""
    count = tl.load(fields_ptr)
    goal = tl.load(fields_ptr + 1)
    near = tl.load(fields_ptr + 2).to(tl.int32)
    rank = tl.cast(0, tl.int64)
    if (goal > 0) & (goal <= count):
        rank = _reach(ranks_ptr, count, goal, top, inverse, near, False, DIGITS)
    if p < 1:
        total = tl.load(fields_ptr + 3)
        for start in range(0, count, TILE):
            own = listed(ranks_ptr, start, count)
            mass = _weights(own, top, inverse, near, True, DIGITS)
            mass = tl.where(own >= rank, mass, 0)
            total += tl.sum(mass * _weights(own, top, inverse, near, False, DIGITS), 0)
        goal = goal_of(p, total) - tl.load(fields_ptr + 4)
        rank = _reach(ranks_ptr, count, goal, top, inverse, near, True, DIGITS)
    key, col = place_of(rank, DIGITS)
    return tl.where(rank > 0, key, 0), tl.where(rank > 0, col + 1, 0)


@triton.jit
def has_list(fields_ptr, t, k, p, vocab, WORDS: tl.constexpr):
    """Whether the cuts of a row, which can be drawn from, lie on its list: without sums of steps
    only those of a small top-k do."""
    fits = tl.load(fields_ptr) <= ROOM
    return is_searched(t, k, p, vocab) & fits & (is_few(k) | (WORDS > FIELDS))


@triton.jit
def cuts_on_list(ranks_ptr, fields_ptr, vocab, top, t, p, m, DIGITS: tl.constexpr):
    """`least` and `stop` of all filters."""
    least, stop = _search(ranks_ptr, fields_ptr, top, 1.0 / t, p, DIGITS)
    return cut_to_min_p(least, stop, vocab, top, t, m)


@triton.jit
def left_of(
    x_ptr, ranks_ptr, sums_ptr, row, vocab, first, top, t, k, p, m,
    WORDS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_ranks.prefix`, from the list of the row where there is one."""
    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    is_listed = False
    if ranks_ptr is not None:
        is_listed = has_list(sums_ptr + row * WORDS, t, k, p, vocab, WORDS)
        if is_listed:
            least, stop = cuts_on_list(
                ranks_ptr + row * ROOM, sums_ptr + row * WORDS, vocab, top, t, p, m, DIGITS
            )
    if is_listed == 0:
        least, stop = prefix(x_ptr, vocab, first, top, t, k, p, m, DIGITS, BLOCK)
    return least, stop


def has_few(filters: tuple) -> bool:
    """Whether a row may have a small top-k."""
    return filters[0] is not None or 0 < filters[4] <= FEW.value


def has_many(filters: tuple) -> bool:
    """Whether a row may be cut that has not."""
    k_each, _, p_each, _, k, _, p, _ = filters
    return k_each is not None or k > FEW.value or (k == 0 and (p_each is not None or p < 1))


def selects(filters: tuple) -> bool:
    """Whether a row may be cut by top-k or top-p."""
    return has_few(filters) or has_many(filters)


def is_listed(filters: tuple, vocab: int, parts: int) -> bool:
    """Whether lists are worth their launches: alone, a program takes only small top-k from one."""
    fits = LEAST_VOCAB <= vocab <= MOST_VOCAB
    return fits and (has_few(filters) or (parts > 1 and has_many(filters)))


def shortlist(rows: Tensor, filters: tuple, parts: int) -> Shortlist:
    """rows [batch, vocab]; `_options.filters` -> the lists of those that have one."""
    (batch, vocab), block = rows.shape, row_block(rows.shape[1])
    groups, words = None, FIELDS.value
    if has_few(filters):
        groups = rows.new_empty(batch, parts * groups_of(parts), dtype=torch.float32)
    if parts > 1 and has_many(filters):
        words += 2 * STEPS.value
    sums = rows.new_empty(batch, words, dtype=torch.int64)
    common = {
        "WORDS": words, "BLOCK": block, "PARTS": triton.next_power_of_2(parts),
        **launch_options(max(block // 128, 1)),
    }  # fmt: skip
    tops, firsts = find_tops(rows, parts, groups, sums)
    tail = *filters[:4], vocab, rows.stride(0)
    if words > FIELDS.value:
        _steps_kernel[(batch, parts)](sums, rows, tops, firsts, *tail, *filters[4:], **common)
    ranks = rows.new_empty(batch, ROOM.value, dtype=torch.int64)
    _list_kernel[(batch, parts)](
        ranks, sums, rows, tops, firsts, groups, *tail, parts * groups_of(parts), *filters[4:],
        GROUPS=GROUPS, DIGITS=DIGITS[rows.dtype], **common,
    )  # fmt: skip
    return Shortlist(parts, tops, firsts, ranks, sums)

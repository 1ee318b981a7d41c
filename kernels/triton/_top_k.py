"""The k largest of each row in rank, on the GPU.

A rank is an integer: the key of a number above its column, which is turned, so that no two are
alike. Of few, each program sorts a piece of the row and keeps its first k, and those meet again
until one piece holds all. Many are listed by the place of the k-th, by programs that share the row
where rows are few, sorted by pieces, and merged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import UNFILTERED
from tilewise.kernels.triton._parts import part_of, parts_of, top_of_parts
from tilewise.kernels.triton._ranks import (
    DIGITS,
    cut_to_top_k,
    is_before,
    key_of,
    load,
    row_block,
)
from tilewise.kernels.triton._shared import launch_options
from tilewise.kernels.triton._shortlist import (
    FIELDS,
    ROOM,
    Shortlist,
    cuts_on_list,
    has_list,
    is_listed,
    shortlist,
)

PIECE = 1024  # ranks that a program sorts
FEW = PIECE // 4  # so many at most: a round then leaves a quarter
LOW_WORD = tl.constexpr(0xFFFFFFFF)
HALF = tl.constexpr(1 << 31)
NONE = tl.constexpr(-(1 << 63))


@triton.jit
def _rank_of(x, col):
    return ((key_of(x).to(tl.int64) - HALF) << 32) + (LOW_WORD - tl.cast(col, tl.int64))


@triton.jit
def _write(values_ptr, indices_ptr, x_ptr, rank, place, k):
    index = LOW_WORD - (rank & LOW_WORD)
    mask = place < k
    tl.store(indices_ptr + place, index, mask=mask)
    tl.store(values_ptr + place, tl.load(x_ptr + index, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["k"])
def _list_kernel(
    ranks_ptr, x_ptr, tops_ptr, firsts_ptr, listed_ptr, sums_ptr, vocab, x_stride, k,
    WORDS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The ranks of the first k of a row, in any order."""
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * x_stride
    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    on_list = False
    if listed_ptr is not None:
        sums_ptr += row * WORDS
        top, _ = top_of_parts(tops_ptr, firsts_ptr, row, tl.num_programs(1), vocab, PARTS)
        one = tl.cast(1.0, tl.float32)
        goal, count = tl.load(sums_ptr + 1), tl.load(sums_ptr)
        # NaN is first in rank, and -inf may be within k, but neither is on a list.
        on_list = (top > float("-inf")) & (goal > 0) & (goal <= count)
        on_list = on_list & has_list(sums_ptr, one, k, one, vocab, WORDS)
        if on_list:
            least, stop = cuts_on_list(
                listed_ptr + row * ROOM, sums_ptr, vocab, top, one, one, one * 0, DIGITS
            )
    if on_list == 0:
        least, stop = cut_to_top_k(x_ptr, vocab, k, DIGITS, BLOCK)

    begin, end = part_of(vocab, BLOCK)
    before = tl.cast(0, tl.int64)
    for start in range(begin, end, BLOCK):
        x, col = load(x_ptr, start, end, BLOCK)
        mine = (is_before(key_of(x), col, least, stop) & (col < end)).to(tl.int32)
        count = tl.sum(mine, 0).to(tl.int64)
        if listed_ptr is not None:
            before = tl.atomic_add(sums_ptr + FIELDS - 1, count, sem="relaxed")
        place = before + tl.cumsum(mine, 0) - 1
        tl.store(ranks_ptr + row * k + place, _rank_of(x, col), mask=mine > 0)
        before += count


@triton.jit
def _sort_kernel(
    values_ptr, indices_ptr, to_ptr, ranks_ptr, x_ptr, count, x_stride, kept, k,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `kept` of each piece of `count` ranks, or of numbers where there are none yet."""
    row, piece = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    x_ptr += row * x_stride
    if ranks_ptr is None:
        x, col = load(x_ptr, piece * BLOCK, count, BLOCK)
        rank = tl.where(col < count, _rank_of(x, col), NONE)
    else:
        place = piece * BLOCK + tl.arange(0, BLOCK)
        rank = tl.load(ranks_ptr + row * count + place, mask=place < count, other=NONE)
    rank = tl.sort(rank, descending=True)
    place = tl.arange(0, BLOCK)
    if LAST:
        _write(values_ptr + row * k, indices_ptr + row * k, x_ptr, rank, place, k)
    else:
        to_ptr += (row * tl.num_programs(1) + piece) * kept
        tl.store(to_ptr + place, rank, mask=place < kept)


@triton.jit
def _merge_kernel(
    values_ptr, indices_ptr, to_ptr, ranks_ptr, x_ptr, count, x_stride, width, k,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs of `width` ranks in order become runs of twice as many: each finds its own place."""
    row = tl.cast(tl.program_id(0), tl.int64)
    ranks_ptr += row * count
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks_ptr + place, mask=place < count, other=NONE)

    start = place // width * width
    other = tl.where(start // width % 2 == 0, start + width, start - width)
    low = tl.minimum(other, count)
    high = tl.minimum(other + width, count)
    reach = width
    while reach > 0:  # half of the ranks between low and high, until there is none
        middle = (low + high) // 2
        found = tl.load(ranks_ptr + middle, mask=low < high, other=NONE)
        goes_on = low < high
        low = tl.where(goes_on & (found > rank), middle + 1, low)
        high = tl.where(goes_on & (found <= rank), middle, high)
        reach = reach // 2
    moved = tl.minimum(start, other) + (place - start) + (low - tl.minimum(other, count))

    if LAST:
        moved = tl.where(place < count, moved, k)
        _write(values_ptr + row * k, indices_ptr + row * k, x_ptr + row * x_stride, rank, moved, k)
    else:
        tl.store(to_ptr + row * count + moved, rank, mask=place < count)


def _sorted(values, indices, x, ranks, count, kept, last):
    """Sort pieces of `count` ranks of each row, or of x, and write or return what is kept."""
    (rows, k), block = values.shape, min(max(triton.next_power_of_2(count), 16), PIECE)
    pieces = triton.cdiv(count, block)
    to = None if last else x.new_empty(rows, pieces * kept, dtype=torch.int64)
    _sort_kernel[(rows, pieces)](
        values, indices, to, ranks, x, count, x.stride(0), kept, k,
        LAST=last, BLOCK=block, **launch_options(max(block // 256, 1)),
    )  # fmt: skip
    return to


def top_k_forward(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [rows, vocab] -> values, indices [rows, k]."""
    rows, vocab = x.shape
    values, indices = x.new_empty(rows, k), x.new_empty(rows, k, dtype=torch.int64)
    ranks, count = None, vocab
    if k <= FEW or vocab <= PIECE:
        while count > PIECE:
            ranks = _sorted(values, indices, x, ranks, count, k, False)
            count = ranks.shape[1]
        _sorted(values, indices, x, ranks, count, k, True)
        return values, indices

    if k < vocab:
        ranks, count = x.new_empty(rows, k, dtype=torch.int64), k
        block, parts = row_block(vocab), parts_of(rows, vocab)
        filters = *UNFILTERED[:4], k, *UNFILTERED[5:]
        found = Shortlist(1, None, None)
        if is_listed(filters, vocab, parts):
            found = shortlist(x, filters, parts)
        _list_kernel[(rows, found.parts)](
            ranks, x, *found[1:], vocab, x.stride(0), k, WORDS=found.words,
            DIGITS=DIGITS[x.dtype], BLOCK=block, PARTS=triton.next_power_of_2(found.parts),
            **launch_options(max(block // 128, 1)),
        )  # fmt: skip
    if count <= PIECE:
        _sorted(values, indices, x, ranks, count, k, True)
        return values, indices
    ranks = _sorted(values, indices, x, ranks, count, PIECE, False)
    count, width = ranks.shape[1], PIECE
    while width < count:
        last = 2 * width >= count
        to = None if last else torch.empty_like(ranks)
        _merge_kernel[(rows, triton.cdiv(count, PIECE))](
            values, indices, to, ranks, x, count, x.stride(0), width, k,
            LAST=last, BLOCK=PIECE, **launch_options(8),
        )  # fmt: skip
        ranks, width = to, 2 * width
    return values, indices

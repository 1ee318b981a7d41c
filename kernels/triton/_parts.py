"""Rows shared by programs, on the GPU: how many, which columns are whose, and the largest logit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._ranks import bests_of, row_block, top_of, winner
from tilewise.kernels.triton._shared import launch_options

PROGRAMS, MAX_PARTS = 256, 64
GROUPS = 2048  # of the columns of a row


@triton.jit
def part_of(vocab, BLOCK: tl.constexpr):
    """The columns of a program of those of a row."""
    size = tl.cdiv(tl.cdiv(vocab, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, vocab)


@triton.jit
def _tops_kernel(
    tops_ptr, firsts_ptr, groups_ptr, sums_ptr, x_ptr, vocab, x_stride,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of each part of a row; if wanted the largest logits of GROUPS groups of the part,
    and zeros for sums of the row."""
    row = tl.cast(tl.program_id(0), tl.int64)
    begin, end = part_of(vocab, BLOCK)
    best, best_col, is_nan = bests_of(x_ptr + row * x_stride, begin, end, BLOCK)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops_ptr + place, top_of(best, is_nan))
    tl.store(firsts_ptr + place, winner(best, best_col, end))
    if groups_ptr is not None:
        group = tl.max(tl.reshape(best, [GROUPS, BLOCK // GROUPS]), 1)
        tl.store(groups_ptr + place * GROUPS + tl.arange(0, GROUPS), group)
    if sums_ptr is not None:
        zero = tl.zeros([BLOCK], tl.int64)
        for start in range(tl.program_id(1) * BLOCK, WORDS, tl.num_programs(1) * BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(sums_ptr + row * WORDS + word, zero, mask=word < WORDS)


@triton.jit
def top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS: tl.constexpr):
    """The largest logit of a row, NaN if there is one, and its first column."""
    part = tl.arange(0, PARTS)
    tops = tl.load(tops_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    firsts = tl.load(firsts_ptr + row * parts + part, mask=part < parts, other=0)
    top = tl.max(tl.where(tops == tops, tops, float("-inf")), 0)
    first = tl.min(tl.where(tops == top, firsts, vocab), 0)
    is_nan = tl.max((tops != tops).to(tl.int32), 0)
    return tl.where(is_nan > 0, float("nan"), top), first


def parts_of(rows: int, vocab: int) -> int:
    """How many programs share a row."""
    return max(min(vocab // row_block(vocab), PROGRAMS // max(rows, 1), MAX_PARTS), 1)


def groups_of(parts: int) -> int:
    """Of a part, so that a row has GROUPS, or a little less."""
    return GROUPS // triton.next_power_of_2(parts)


def find_tops(
    rows: Tensor, parts: int, groups: Tensor | None = None, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rows [batch, vocab] -> of each part the largest logit, NaN if there is one, and its first
    column [batch, parts]; fills groups [batch, parts * groups], and sums [batch, words] with 0."""
    (batch, vocab), block = rows.shape, row_block(rows.shape[1])
    tops = rows.new_empty(batch, parts, dtype=torch.float32)
    firsts = rows.new_empty(batch, parts, dtype=torch.int32)
    _tops_kernel[(batch, parts)](
        tops, firsts, groups, sums, rows, vocab, rows.stride(0),
        WORDS=0 if sums is None else sums.shape[1], GROUPS=groups_of(parts), BLOCK=block,
        **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return tops, firsts

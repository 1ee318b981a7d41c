"""What is left of rows of logits after all filters, as logits or as probabilities, on the GPU: a
program a row, or for few rows several, which find their cuts by `_shortlist`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._options import COUNT, adjusted, filters, filters_of
from tilewise.kernels.triton._parts import find_tops, part_of, parts_of, top_of_parts
from tilewise.kernels.triton._ranks import (
    DIGITS,
    ONE,
    first_of,
    is_before,
    key_of,
    load,
    mass_of,
    masses_before,
    prefix,
    row_block,
)
from tilewise.kernels.triton._shared import launch_options
from tilewise.kernels.triton._shortlist import Shortlist, is_listed, left_of, shortlist


@triton.jit
def _write(
    out_ptr, x_ptr, begin, end, least, stop, top, t, whole, can,
    PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left of columns; `whole` is the mass of all that is left."""
    t = tl.where(t > 0, t, 1.0)
    for start in range(begin, end, BLOCK):
        x, col = load(x_ptr, start, end, BLOCK)
        left = is_before(key_of(x), col, least, stop)
        if PROBABILITIES:
            gap = tl.where(x == top, 0.0, x - top)
            mass = tl.exp(tl.div_rn(gap, tl.zeros_like(gap) + t))
            value = tl.where(left, tl.div_rn(mass, tl.zeros_like(gap) + whole), 0.0)
            value = tl.where(can & (top > float("-inf")), value, float("nan"))
        else:
            value = tl.where(left, tl.div_rn(x, tl.zeros_like(x) + t), float("-inf"))
            value = tl.where(can & (top == top), value, float("nan"))
        tl.store(out_ptr + col, value.to(out_ptr.dtype.element_ty), mask=col < end)


@triton.jit(do_not_specialize=["k"])
def _filter_kernel(
    out_ptr, x_ptr, k_ptr, t_ptr, p_ptr, m_ptr, vocab, x_stride, k, t, p, m,
    PROBABILITIES: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)

    first, top = first_of(x_ptr, 0, vocab, BLOCK)
    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    there = can & (top > float("-inf"))
    if there:
        least, stop = prefix(x_ptr, vocab, first, top, t, k, p, m, DIGITS, BLOCK)
    if top == float("inf"):  # beside it nothing else is left
        least = tl.maximum(least, key_of(top) - 1)
    whole = 1.0
    if PROBABILITIES:
        inverse = 1.0 / tl.where(t > 0, t, 1.0)
        total, _ = masses_before(
            x_ptr, vocab, tl.where(there, top, 0.0), inverse, least, stop, least, stop, BLOCK
        )  # fmt: skip
        whole = total.to(tl.float32) / ONE

    out_ptr += row * vocab
    _write(out_ptr, x_ptr, 0, vocab, least, stop, top, t, whole, can, PROBABILITIES, BLOCK)


@triton.jit(do_not_specialize=["k"])
def _cuts_kernel(
    cuts_ptr, masses_ptr, x_ptr, tops_ptr, firsts_ptr, ranks_ptr, sums_ptr,
    k_ptr, t_ptr, p_ptr, m_ptr, vocab, x_stride, k, t, p, m, WORDS: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`least` and `stop` of each row, and what mass is left in each part of it."""
    row, part = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    x_ptr += row * x_stride
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    top, first = top_of_parts(tops_ptr, firsts_ptr, row, tl.num_programs(1), vocab, PARTS)

    least, stop = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    mass = tl.zeros([BLOCK], tl.int64)
    if can & (top > float("-inf")):
        least, stop = left_of(
            x_ptr, ranks_ptr, sums_ptr, row, vocab, first, top, t, k, p, m, WORDS, DIGITS, BLOCK
        )
        if top == float("inf"):  # beside it nothing else is left
            least = tl.maximum(least, key_of(top) - 1)
        begin, end = part_of(vocab, BLOCK)
        inverse = 1.0 / tl.where(t > 0, t, 1.0)
        for start in range(begin, end, BLOCK):
            x, col = load(x_ptr, start, end, BLOCK)
            left = is_before(key_of(x), col, least, stop)
            mass += tl.where(left, mass_of(x, top, inverse), 0)

    tl.store(masses_ptr + row * tl.num_programs(1) + part, tl.sum(mass, 0))
    if part == 0:
        tl.store(cuts_ptr + 2 * row, least.to(tl.int64))
        tl.store(cuts_ptr + 2 * row + 1, stop.to(tl.int64))


@triton.jit
def cut_of_parts(cuts_ptr, masses_ptr, row, parts, PARTS: tl.constexpr):
    """`least` and `stop` of a row, and the mass of all that is left of it."""
    part = tl.arange(0, PARTS)
    masses = tl.load(masses_ptr + row * parts + part, mask=part < parts, other=0)
    least = tl.load(cuts_ptr + 2 * row).to(tl.uint32)
    return least, tl.load(cuts_ptr + 2 * row + 1).to(tl.int32), tl.sum(masses, 0)


@triton.jit
def _parts_kernel(
    out_ptr, x_ptr, tops_ptr, firsts_ptr, cuts_ptr, masses_ptr, k_ptr, t_ptr, p_ptr, m_ptr,
    vocab, x_stride, k, t, p, m,
    PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, parts = tl.cast(tl.program_id(0), tl.int64), tl.num_programs(1)
    t, k, p, m, can = filters_of(row, k_ptr, t_ptr, p_ptr, m_ptr, k, t, p, m)
    top, _ = top_of_parts(tops_ptr, firsts_ptr, row, parts, vocab, PARTS)
    least, stop, mass = cut_of_parts(cuts_ptr, masses_ptr, row, parts, PARTS)
    begin, end = part_of(vocab, BLOCK)
    out_ptr += row * vocab
    x_ptr += row * x_stride
    whole = mass.to(tl.float32) / ONE
    _write(out_ptr, x_ptr, begin, end, least, stop, top, t, whole, can, PROBABILITIES, BLOCK)


def find_cuts(rows: Tensor, filters: tuple, found: Shortlist) -> tuple[Tensor, Tensor]:
    """`least` and `stop` of each row [batch, 2], and what mass is left in each part of it
    [batch, parts]."""
    (batch, vocab), block = rows.shape, row_block(rows.shape[1])
    cuts = rows.new_empty(batch, 2, dtype=torch.int64)
    masses = rows.new_empty(batch, found.parts, dtype=torch.int64)
    _cuts_kernel[(batch, found.parts)](
        cuts, masses, rows, *found[1:], *filters[:4], vocab, rows.stride(0), *filters[4:],
        WORDS=found.words, DIGITS=DIGITS[rows.dtype], BLOCK=block,
        PARTS=triton.next_power_of_2(found.parts), **launch_options(max(block // 128, 1)),
    )  # fmt: skip
    return cuts, masses


def find_list(rows: Tensor, filters: tuple) -> Shortlist | None:
    """The lists of rows, or how they begin, where programs are to share them."""
    parts = parts_of(*rows.shape)
    if is_listed(filters, rows.shape[1], parts):
        return shortlist(rows, filters, parts)
    return None if parts == 1 else Shortlist(parts, *find_tops(rows, parts))


def filter_logits_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab], OPTIONS, whether probabilities are wanted -> [batch, vocab], of the
    dtype of the logits; probabilities in fp32."""
    rows, as_probabilities = adjusted(logits, arguments), arguments[COUNT]
    dtype = torch.float32 if as_probabilities else logits.dtype
    out = logits.new_empty(logits.shape, dtype=dtype)
    (batch, vocab), options, block = rows.shape, filters(arguments), row_block(rows.shape[1])
    tail = *options[:4], vocab, rows.stride(0), *options[4:]
    common = {
        "PROBABILITIES": as_probabilities, "BLOCK": block,
        **launch_options(max(block // 128, 1)),
    }  # fmt: skip
    found = find_list(rows, options)
    if found is None:
        _filter_kernel[(batch,)](out, rows, *tail, DIGITS=DIGITS[rows.dtype], **common)
        return out
    cuts, masses = find_cuts(rows, options, found)
    _parts_kernel[(batch, found.parts)](
        out, rows, found.tops, found.firsts, cuts, masses, *tail,
        PARTS=triton.next_power_of_2(found.parts), **common,
    )  # fmt: skip
    return out

"""How rows are shared out among tasks, the same whatever the number of threads."""

import torch
from torch import Tensor

# Rows are split into this many parts whatever the number of threads, so the bits never change;
# and a sum over parts of sums is nearer the truth than one long sum.
PARTS = 32

CACHE_LINE = 64  # bytes


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64. (`torch.promote_types` takes 1 us.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parts_for(rows: int) -> int:
    """Into how many independent parts to split `rows`."""
    return min(rows, PARTS)


ROWS_SUMMED = 64  # in one chain, which is wrong by the root of its length
PARTIAL_SUMS = 1 << 20  # at most so many in all: for wide rows longer chains, not more memory


def sum_parts_for(rows: int, cols: int) -> int:
    """Into how many parts to split rows of which sums are taken."""
    parts = max(rows // ROWS_SUMMED, parts_for(rows))
    return max(min(parts, PARTIAL_SUMS // max(cols, 1)), 1)


def part_rows(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Memory for a row of each part, [parts, cols or more], each on cache lines of its own."""
    cols, per_line = x.shape[-1], CACHE_LINE // dtype.itemsize
    return x.new_empty(parts, cols if parts == 1 else -(-cols // per_line) * per_line, dtype=dtype)


def partial_sums(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """`part_rows` of zeros."""
    return part_rows(x, parts, dtype).zero_()


def summed(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of `partial_sums` in the shape and dtype of `like`, [cols]."""
    total = parts.view(-1) if len(parts) == 1 else parts.sum(0)[: len(like)]
    return total if total.dtype == like.dtype else total.to(like.dtype)


def same_layout(x: Tensor, cols: int) -> Tensor:
    """An empty [..., cols] whose other dims lie in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def thread_scratch(x: Tensor, elements: int) -> tuple[Tensor, Tensor, int]:
    """A counter, and scratch of `elements` for each thread, on cache lines of its own."""
    elements = -(-int(elements) // CACHE_LINE) * CACHE_LINE
    slots = torch.get_num_threads()
    counter = torch.zeros(1, dtype=torch.int64)
    return counter, x.new_empty(slots * elements), elements


def laid_out(*sizes: tuple[int, int]) -> tuple[tuple[int, ...], int]:
    """Where pieces begin, each of so many elements of so many bytes, on cache lines of their own,
    and the bytes of all."""
    starts, size = [], 0
    for count, width in sizes:
        starts.append(size)
        size += -(-count * width // CACHE_LINE) * CACHE_LINE
    return tuple(starts), size


def broadcast_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of a [batch, heads, queries, cols], 0 along what is broadcast, which is all of None."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(
        0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)
    )

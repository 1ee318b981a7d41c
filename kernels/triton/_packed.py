"""Sequences packed one after the other: which rows are whose, and which are nobody's."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._attention_scores import store_rows


class Packed(NamedTuple):
    """Where sequences lie; all None where each is one of a batch.

    Attributes:
        ends_q: Where the queries of each begin, and where those of the last end.
        ends_k: And the keys.
        sequences: How many there are.
        total_q: How many rows of queries there are.
        total_k: And of keys.
        spacing: How many rows dropout counts for a head of a sequence.
    """

    ends_q: Any = None
    ends_k: Any = None
    sequences: Any = None
    total_q: Any = None
    total_k: Any = None
    spacing: Any = None


@triton.jit
def _within(end, total):
    """No wrong number leads beyond the rows there are."""
    return tl.minimum(tl.maximum(end, 0), total)


@triton.jit
def _span(ends_ptr, total, sequence, longest):
    """The first row of a sequence and how many it has; more than the longest are not its own."""
    first = _within(tl.load(ends_ptr + sequence), total)
    end = tl.maximum(_within(tl.load(ends_ptr + sequence + 1), total), first)
    return tl.cast(first, tl.int64), tl.cast(tl.minimum(end - first, longest), tl.int32)


@triton.jit
def sequence_of(packed, batch, seq_q, seq_k):
    """What the first strides lead to its queries and its keys by, and how many of both it has."""
    if packed.ends_q is None:
        return batch, batch, seq_q, seq_k
    else:
        at_q, own_q = _span(packed.ends_q, packed.total_q, batch, seq_q)
        at_k, own_k = _span(packed.ends_k, packed.total_k, batch, seq_k)
        return at_q, at_k, own_q, own_k


@triton.jit
def rows_of(packed, index, head, at_q, seq_q):
    """Where the rows of a head begin that dropout draws by, and where its statistics."""
    if packed.ends_q is None:
        return index * seq_q, index * seq_q
    else:
        return index * packed.spacing, tl.cast(head, tl.int64) * packed.total_q + at_q


@triton.jit
def gaps_of(packed, OF_KEYS: tl.constexpr, sequence, first, rows, program, blocks):
    """The rows of nobody beside a sequence: how many before the first one of all, how many with
    those behind its own, where these begin, and which of its blocks fills which. Whatever the ends
    are, no row is forgotten."""
    ends_ptr = packed.ends_k if OF_KEYS else packed.ends_q
    total = packed.total_k if OF_KEYS else packed.total_q
    before = tl.where(sequence == 0, first, 0)
    behind = first + rows
    end = _within(tl.load(ends_ptr + sequence + 1), total)
    end = tl.where(sequence == packed.sequences - 1, total, end)
    return before, before + tl.maximum(end - behind, 0), behind, program % blocks, blocks


@triton.jit
def fill_gaps(ptr, value, stride, cols, gaps, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store `value` in the rows of nobody, with the other blocks of the sequence."""
    before, number, behind, block, blocks = gaps
    for start in range(block * ROWS, number, blocks * ROWS):
        i = start + tl.arange(0, ROWS)
        row = tl.where(i < before, i, behind - before + i)
        values = tl.full([ROWS, COLS], value, tl.float32)
        store_rows(ptr, values, row, stride, tl.arange(0, COLS), cols, i < number)


def packed_in(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor, max_seqlen_q: int
) -> Packed:
    """Ends of sequences [sequences + 1], q and k [rows, heads, dim]."""
    sequences = len(cu_seqlens_q) - 1
    return Packed(cu_seqlens_q, cu_seqlens_k, sequences, len(q), len(k), max_seqlen_q)

"""What turning heads on the GPU shares: where a row stands, and the angles of its position."""

import triton
import triton.language as tl
from torch import Tensor


def places(
    cos: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[int, int], int, dict[str, int]]:
    """What a kernel is given: both tensors, the strides of the first, how many sequences, options.

    `cos` stands for a tensor that there is not.
    """
    strides = (0, 0) if position_ids is None else position_ids.stride()
    sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    # Steps of a search among the beginnings, of which a last sequence has one too many.
    steps = 0 if cu_seqlens is None else cu_seqlens.numel().bit_length()
    ids, ends = (cos if t is None else t for t in (position_ids, cu_seqlens))
    return (ids, ends), strides, sequences, {"HAS_IDS": position_ids is not None, "STEPS": steps}


@triton.jit
def positions_of(
    ids_ptr, ends_ptr, batch, row, seq, ids_batch, ids_seq, sequences,
    HAS_IDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The positions of int64 rows, and whether each belongs to a sequence: the last packed one may
    end before the rows do."""
    position = row
    is_row = row < seq
    if HAS_IDS:
        at = ids_ptr + batch * ids_batch + row * ids_seq
        position = tl.load(at, mask=is_row, other=0)
    if STEPS > 0:  # of the sequences that begin at the row or before, the last
        sequence = tl.zeros_like(row)
        for step in tl.static_range(STEPS):
            later = sequence + (1 << (STEPS - 1 - step))
            begins = tl.load(ends_ptr + later, mask=is_row & (later <= sequences), other=0)
            sequence = tl.where((later <= sequences) & (begins <= row), later, sequence)
        position = row - tl.load(ends_ptr + sequence, mask=is_row, other=0)
        is_row = is_row & (sequence < sequences)
    return position, is_row


@triton.jit
def angles_of(
    cos_ptr, sin_ptr, position, is_row, cos_stride, sin_stride, positions,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cos and sin [rows, BLOCK] of positions [rows, 1], in fp32.

    A position that the tables do not have: its angle is NaN, and nothing is read. The angle of a
    row of no sequence is 0.
    """
    pair = tl.arange(0, BLOCK)[None, :]
    known = (position >= 0) & (position < positions) & (pair < HALF)
    nan = float("nan")
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=known, other=nan).to(tl.float32)
    sin = tl.load(sin_ptr + position * sin_stride + pair, mask=known, other=nan).to(tl.float32)
    return tl.where(is_row, cos, 1.0), tl.where(is_row, sin, 0.0)


@triton.jit
def turn_rows(
    y_rows, x_rows, inside, read, cos, sin, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x, [rows, 1] pointers, turned by cos and sin to those of y: of what is not `read` 0,
    and nothing where not `inside`. Dims past the tables pass through."""
    if HALF > 0:
        if INTERLEAVED:
            col = tl.arange(0, 2 * BLOCK)[None, :]
            mask = inside & (col < 2 * HALF)
            x = tl.load(x_rows + col, mask=mask & read, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
            y = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(y_rows + col, tl.reshape(y, [x.shape[0], 2 * BLOCK]), mask=mask)
        else:
            col = tl.arange(0, BLOCK)[None, :]
            mask = inside & (col < HALF)
            a = tl.load(x_rows + col, mask=mask & read, other=0.0).to(tl.float32)
            b = tl.load(x_rows + HALF + col, mask=mask & read, other=0.0).to(tl.float32)
            tl.store(y_rows + col, a * cos - b * sin, mask=mask)
            tl.store(y_rows + HALF + col, b * cos + a * sin, mask=mask)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)[None, :]
        mask = inside & (rest < REST)
        passing = tl.load(x_rows + 2 * HALF + rest, mask=mask & read, other=0.0)
        tl.store(y_rows + 2 * HALF + rest, passing, mask=mask)

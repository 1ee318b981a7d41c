"""Rotary embedding on the CPU: the rows of q, then those of k, in the order they lie in memory."""

import math

import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._rotation import PAST, layout, places, position_of
from tilewise.kernels.numba._shared import parts_for
from tilewise.kernels.numba._simd import address, kind, load, offset, pointer, real, store
from tilewise.kernels.numba._stream import LINE, finish_writes, streamed
from tilewise.kernels.numba._turn import turn_pairs

NAN = math.nan  # the angle of a position that the tables do not have


@Kernel
def _rotate(
    part, q_layout, k_layout, cos_at, sin_at, place,
    kind, table_kind, dim, half, positions, cos_stride, sin_stride, parts, interleaved, sign,
    past_caches,
):  # fmt: skip
    # A layout is what `layout` says: q and k are walked by the same loops.
    sign = real(kind, sign)
    for turn in range(2):
        layout = q_layout if turn == 0 else k_layout
        y_at, x_at, rows, outer, inner, seq_is_inner = layout[:6]
        y_batch, y_outer, y_inner, x_batch, x_outer, x_inner = layout[6:]
        row, end = part * rows // parts, (part + 1) * rows // parts
        while row < end:  # a line: rows with the same batch and outer index
            line, first = row // inner, row % inner
            b, o = line // outer, line % outer
            count = min(inner - first, end - row)
            row += count
            for i in range(first, first + count):
                x = offset(pointer(x_at, kind), b * x_batch + o * x_outer + i * x_inner)
                y = offset(pointer(y_at, kind), b * y_batch + o * y_outer + i * y_inner)
                position = position_of(b, i if seq_is_inner else o, place)

                if position == PAST:
                    for j in range(dim):
                        store(y, j, real(kind, 0))
                    continue
                if position < 0 or position >= positions:
                    for j in range(2 * half):
                        store(y, j, real(kind, NAN))
                else:
                    cos = offset(pointer(cos_at, table_kind), position * cos_stride)
                    sin = offset(pointer(sin_at, table_kind), position * sin_stride)
                    if interleaved:
                        for j in range(half):
                            c, s = real(kind, load(cos, j)), real(kind, load(sin, j)) * sign
                            u, v = load(x, 2 * j), load(x, 2 * j + 1)
                            store(y, 2 * j, u * c - v * s)
                            store(y, 2 * j + 1, v * c + u * s)
                    else:
                        outs, ins = (y, offset(y, half)), (x, offset(x, half), cos, sin)
                        turn_pairs(outs, ins, (sign,), half, past_caches)
                for j in range(dim - 2 * half):
                    store(y, 2 * half + j, load(x, 2 * half + j))
    if past_caches:
        finish_writes()


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    offset: int, interleaved: bool, sign: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_turned, k_turned = torch.empty_like(q), torch.empty_like(k)
    batch, heads, seq, dim = q.shape
    parts = parts_for(batch * heads * seq)
    _rotate(
        parts, q.numel() + k.numel(), layout(q_turned, q), layout(k_turned, k),
        address(cos), address(sin), places(position_ids, cu_seqlens, offset),
        kind(q), kind(cos), dim, cos.shape[1], cos.shape[0],
        cos.stride(0), sin.stride(0), parts, interleaved, sign,
        cos.shape[1] * q.itemsize % LINE == 0 and streamed(q_turned, k_turned),
    )  # fmt: skip
    return q_turned, k_turned


def rotary_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], cos, sin [positions, half] -> q, k turned by their angles."""
    return _launch(q, k, cos, sin, position_ids, cu_seqlens, offset, interleaved, 1)


def rotary_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk [batch, heads, seq, dim], cos, sin [positions, half] -> dq, dk turned back."""
    return _launch(dq, dk, cos, sin, position_ids, cu_seqlens, offset, interleaved, -1)

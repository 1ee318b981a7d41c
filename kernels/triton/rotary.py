"""Rotary embedding on the GPU: one program turns some positions of some heads, of q or of k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._rotation import angles_of, places, positions_of, turn_rows
from tilewise.kernels.triton._shared import launch_options

HEADS = 4  # of one program: it reads the tables once for all of them
TILE = 1024  # pairs of one head at a time: 8 a thread, which is 16 bytes of a half


@triton.jit
def _turn_heads(
    y_ptr, x_ptr, y_batch, y_head, y_seq, x_batch, x_head, x_seq,
    batch, group, row, heads, seq, is_row, cos, sin,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    inside = (row < seq)[:, None]
    read = inside & is_row  # a row of no sequence is not read: it may be anything, and becomes 0
    for i in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        head = tl.cast(i, tl.int64)
        x_rows = x_ptr + batch * x_batch + head * x_head + (row * x_seq)[:, None]
        y_rows = y_ptr + batch * y_batch + head * y_head + (row * y_seq)[:, None]
        turn_rows(
            y_rows, x_rows, inside, read, cos, sin, HALF, REST, INTERLEAVED, BLOCK, REST_BLOCK
        )


@triton.jit
def _rotate_kernel(
    q_turned_ptr, k_turned_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, ids_ptr, ends_ptr,
    q_turned_batch, q_turned_head, q_turned_seq, k_turned_batch, k_turned_head, k_turned_seq,
    q_batch, q_head, q_seq, k_batch, k_head, k_seq, cos_stride, sin_stride, ids_batch, ids_seq,
    heads, kv_heads, seq, positions, first_position, sequences,
    HAS_IDS: tl.constexpr, STEPS: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.cast(tl.program_id(2), tl.int64)
    group = tl.program_id(1)
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    position, is_row = positions_of(
        ids_ptr, ends_ptr, batch, row, seq, ids_batch, ids_seq, sequences, HAS_IDS, STEPS
    )
    is_row = is_row[:, None]
    cos, sin = angles_of(
        cos_ptr, sin_ptr, (position + first_position)[:, None], is_row, cos_stride, sin_stride,
        positions, HALF, BLOCK,
    )  # fmt: skip
    if INVERSE:
        sin = -sin

    q_groups = tl.cdiv(heads, HEADS)
    if group < q_groups:
        _turn_heads(
            q_turned_ptr, q_ptr,
            q_turned_batch, q_turned_head, q_turned_seq, q_batch, q_head, q_seq,
            batch, group, row, heads, seq, is_row, cos, sin,
            HALF, REST, INTERLEAVED, HEADS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        _turn_heads(
            k_turned_ptr, k_ptr,
            k_turned_batch, k_turned_head, k_turned_seq, k_batch, k_head, k_seq,
            batch, group - q_groups, row, kv_heads, seq, is_row, cos, sin,
            HALF, REST, INTERLEAVED, HEADS, BLOCK, REST_BLOCK,
        )  # fmt: skip


def _options(dim: int, half: int) -> dict[str, int]:
    block, rest = triton.next_power_of_2(half), dim - 2 * half
    return {
        "HALF": half,
        "REST": rest,
        "HEADS": HEADS,
        "ROWS": max(TILE // block, 1),
        "BLOCK": block,
        "REST_BLOCK": triton.next_power_of_2(max(rest, 1)),
        **launch_options(4),
    }


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    offset: int, interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_turned, k_turned = torch.empty_like(q), torch.empty_like(k)
    batch, heads, seq, dim = q.shape
    kv_heads, options = k.shape[1], _options(dim, cos.shape[1])
    groups = triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    tables, strides, sequences, place_options = places(cos, position_ids, cu_seqlens)
    _rotate_kernel[(triton.cdiv(seq, options["ROWS"]), groups, batch)](
        q_turned, k_turned, q, k, cos, sin, *tables,
        *q_turned.stride()[:3], *k_turned.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        cos.stride(0), sin.stride(0), *strides,
        heads, kv_heads, seq, cos.shape[0], offset, sequences,
        INVERSE=inverse, INTERLEAVED=interleaved, **place_options, **options,
    )  # fmt: skip
    return q_turned, k_turned


def rotary_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], cos, sin [positions, half] -> q, k turned by their angles."""
    return _launch(q, k, cos, sin, position_ids, cu_seqlens, offset, interleaved, inverse=False)


def rotary_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk [batch, heads, seq, dim], cos, sin [positions, half] -> dq, dk turned back."""
    return _launch(dq, dk, cos, sin, position_ids, cu_seqlens, offset, interleaved, inverse=True)

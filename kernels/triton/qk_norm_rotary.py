"""QK norm and rotary embedding on the GPU: one program normalises and turns some heads of one
position at a time, of q or of k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels.triton._rotation import angles_of, places, positions_of
from tilewise.kernels.triton._shared import launch_options

HEADS = 4  # of one program of the forward pass: it reads the tables once for all of them
TILE = 1024  # pairs of one head at a time
PARTS = 512  # programs of the backward pass: no function of the GPU, as the bits are not either


@triton.jit
def _columns(HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Where both elements of each pair are."""
    pair = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, pair < HALF
    else:
        return pair, pair + HALF, pair < HALF


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise_heads(
    y_ptr, rstd_ptr, x_ptr, weight_ptr, y_batch, y_head, y_seq, x_batch, x_head, x_seq,
    batch, group, row, heads, seq, is_row, cos, sin, eps, weight_offset,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    first, second, is_pair = _columns(HALF, INTERLEAVED, BLOCK)
    rest = tl.arange(0, REST_BLOCK)[None, :]
    inside = (row < seq)[:, None]
    u_weight = _load(weight_ptr + first, is_pair) + weight_offset
    v_weight = _load(weight_ptr + second, is_pair) + weight_offset
    if REST > 0:
        rest_weight = _load(weight_ptr + 2 * HALF + rest, rest < REST) + weight_offset

    for i in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        head = tl.cast(i, tl.int64)
        x_rows = x_ptr + batch * x_batch + head * x_head + (row * x_seq)[:, None]
        y_rows = y_ptr + batch * y_batch + head * y_head + (row * y_seq)[:, None]
        u = _load(x_rows + first, is_row & is_pair)
        v = _load(x_rows + second, is_row & is_pair)
        square_sum = tl.sum(u * u + v * v, 1)
        if REST > 0:
            passing = _load(x_rows + 2 * HALF + rest, is_row & (rest < REST))
            square_sum += tl.sum(passing * passing, 1)
        rstd = tl.rsqrt(square_sum / (2 * HALF + REST) + eps)
        tl.store(rstd_ptr + (batch * heads + head) * seq + row, rstd, mask=row < seq)

        u *= rstd[:, None] * u_weight
        v *= rstd[:, None] * v_weight
        tl.store(y_rows + first, u * cos - v * sin, mask=inside & is_pair)
        tl.store(y_rows + second, v * cos + u * sin, mask=inside & is_pair)
        if REST > 0:
            passing *= rstd[:, None] * rest_weight
            tl.store(y_rows + 2 * HALF + rest, passing, mask=inside & (rest < REST))


@triton.jit
def _forward_kernel(
    q_turned_ptr, k_turned_ptr, q_rstd_ptr, k_rstd_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr,
    cos_ptr, sin_ptr, ids_ptr, ends_ptr,
    q_turned_batch, q_turned_head, q_turned_seq, k_turned_batch, k_turned_head, k_turned_seq,
    q_batch, q_head, q_seq, k_batch, k_head, k_seq, cos_stride, sin_stride, ids_batch, ids_seq,
    heads, kv_heads, seq, positions, first_position, sequences, eps, weight_offset,
    HAS_IDS: tl.constexpr, STEPS: tl.constexpr, INTERLEAVED: tl.constexpr,
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

    q_groups = tl.cdiv(heads, HEADS)
    if group < q_groups:
        _normalise_heads(
            q_turned_ptr, q_rstd_ptr, q_ptr, q_weight_ptr,
            q_turned_batch, q_turned_head, q_turned_seq, q_batch, q_head, q_seq,
            batch, group, row, heads, seq, is_row, cos, sin, eps, weight_offset,
            HALF, REST, INTERLEAVED, HEADS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        _normalise_heads(
            k_turned_ptr, k_rstd_ptr, k_ptr, k_weight_ptr,
            k_turned_batch, k_turned_head, k_turned_seq, k_batch, k_head, k_seq,
            batch, group - q_groups, row, kv_heads, seq, is_row, cos, sin, eps, weight_offset,
            HALF, REST, INTERLEAVED, HEADS, BLOCK, REST_BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    dx_ptr, parts_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr, cos_ptr, sin_ptr, ids_ptr, ends_ptr,
    dx_batch, dx_head, dx_seq, dy_batch, dy_head, dy_seq, x_batch, x_head, x_seq,
    cos_stride, sin_stride, ids_batch, ids_seq,
    tiles, heads, seq, positions, first_position, sequences, weight_offset,
    HAS_IDS: tl.constexpr, STEPS: tl.constexpr, INTERLEAVED: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DWEIGHT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = rstd * (g - xhat * mean(g * xhat)), with g = weight * the gradient turned back
    first, second, is_pair = _columns(HALF, INTERLEAVED, BLOCK)
    rest = tl.arange(0, REST_BLOCK)[None, :]
    u_weight = _load(weight_ptr + first, is_pair) + weight_offset
    v_weight = _load(weight_ptr + second, is_pair) + weight_offset
    rest_weight = _load(weight_ptr + 2 * HALF + rest, rest < REST) + weight_offset
    du_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    dv_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    drest_weight = tl.zeros([ROWS, REST_BLOCK], tl.float32)

    down = tl.cdiv(seq, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line = tl.cast(tile // down, tl.int64)
        batch, head = line // heads, line % heads
        row = tl.cast(tile % down, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < seq)[:, None]
        position, is_row = positions_of(
            ids_ptr, ends_ptr, batch, row, seq, ids_batch, ids_seq, sequences, HAS_IDS, STEPS
        )
        rstd = _load(rstd_ptr + line * seq + row, is_row)[:, None]
        is_row = is_row[:, None]
        cos, sin = angles_of(
            cos_ptr, sin_ptr, (position + first_position)[:, None], is_row, cos_stride, sin_stride,
            positions, HALF, BLOCK,
        )  # fmt: skip

        x_rows = x_ptr + batch * x_batch + head * x_head + (row * x_seq)[:, None]
        dy_rows = dy_ptr + batch * dy_batch + head * dy_head + (row * dy_seq)[:, None]
        u = _load(x_rows + first, is_row & is_pair) * rstd
        v = _load(x_rows + second, is_row & is_pair) * rstd
        a = _load(dy_rows + first, is_row & is_pair)
        b = _load(dy_rows + second, is_row & is_pair)
        du = tl.where(is_pair, a * cos + b * sin, 0.0)  # beyond the pairs an angle is NaN
        dv = tl.where(is_pair, b * cos - a * sin, 0.0)
        dot = tl.sum(du * u * u_weight + dv * v * v_weight, 1)
        if REST > 0:
            w = _load(x_rows + 2 * HALF + rest, is_row & (rest < REST)) * rstd
            dw = _load(dy_rows + 2 * HALF + rest, is_row & (rest < REST))
            dot += tl.sum(dw * w * rest_weight, 1)
            drest_weight += dw * w
        du_weight += du * u
        dv_weight += dv * v

        if WANT_DX:
            mean = (dot / (2 * HALF + REST))[:, None]
            dx_rows = dx_ptr + batch * dx_batch + head * dx_head + (row * dx_seq)[:, None]
            du = rstd * (du * u_weight - u * mean)
            dv = rstd * (dv * v_weight - v * mean)
            tl.store(dx_rows + first, du, mask=inside & is_pair)
            tl.store(dx_rows + second, dv, mask=inside & is_pair)
            if REST > 0:
                dw = rstd * (dw * rest_weight - w * mean)
                tl.store(dx_rows + 2 * HALF + rest, dw, mask=inside & (rest < REST))

    if WANT_DWEIGHT:
        part = parts_ptr + tl.cast(tl.program_id(0), tl.int64) * (2 * HALF + REST)
        tl.store(part + first, tl.sum(du_weight, 0)[None, :], mask=is_pair)
        tl.store(part + second, tl.sum(dv_weight, 0)[None, :], mask=is_pair)
        if REST > 0:
            drest = tl.sum(drest_weight, 0)[None, :]
            tl.store(part + 2 * HALF + rest, drest, mask=rest < REST)


def _options(dim: int, half: int, tile: int) -> dict[str, int]:
    block, rest = triton.next_power_of_2(half), dim - 2 * half
    rest_block = triton.next_power_of_2(max(rest, 1))
    return {
        "HALF": half, "REST": rest, "ROWS": max(tile // max(block, rest_block), 1),
        "BLOCK": block, "REST_BLOCK": rest_block, **launch_options(4),
    }  # fmt: skip


def qk_norm_rotary_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    eps: float, weight_offset: float, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], weights [dim], cos, sin [positions, half]
    -> q, k normalised and turned, rstd of each [batch, heads, seq]."""
    turned = tuple(torch.empty_like(x) for x in (q, k))
    rstd = tuple(x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k))
    batch, heads, seq, dim = q.shape
    kv_heads, options = k.shape[1], _options(dim, cos.shape[1], TILE)
    groups = triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    tables, strides, sequences, place_options = places(cos, position_ids, cu_seqlens)
    _forward_kernel[(triton.cdiv(seq, options["ROWS"]), groups, batch)](
        *turned, *rstd, q, k, q_weight, k_weight, cos, sin, *tables,
        *(n for t in (*turned, q, k) for n in t.stride()[:3]),
        cos.stride(0), sin.stride(0), *strides,
        heads, kv_heads, seq, cos.shape[0], offset, sequences, eps, weight_offset,
        INTERLEAVED=interleaved, HEADS=HEADS, **place_options, **options,
    )  # fmt: skip
    return *turned, *rstd


def qk_norm_rotary_backward(
    dq_turned: Tensor, dk_turned: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None,
    q_rstd: Tensor, k_rstd: Tensor, weight_offset: float, offset: int, interleaved: bool,
    want_dq: bool, want_dk: bool, want_dq_weight: bool, want_dk_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients [batch, heads, seq, dim] of both, and what forward was given and gave
    -> dq, dk [batch, heads, seq, dim], dq_weight, dk_weight [dim], or empty where not wanted."""
    tables, strides, sequences, place_options = places(cos, position_ids, cu_seqlens)
    grads, dweights = [], []
    for dy, x, weight, rstd, want_dx, want_dweight in (
        (dq_turned, q, q_weight, q_rstd, want_dq, want_dq_weight),
        (dk_turned, k, k_weight, k_rstd, want_dk, want_dk_weight),
    ):
        batch, heads, seq, dim = x.shape
        options = _options(dim, cos.shape[1], TILE // 2)
        tiles = batch * heads * triton.cdiv(seq, options["ROWS"])
        programs = min(tiles, PARTS)
        dx = torch.empty_like(x) if want_dx else x.new_empty(0)
        parts = rstd.new_empty(programs if want_dweight else 0, dim)
        if want_dx or want_dweight:
            _backward_kernel[(programs,)](
                dx, parts, dy, x, weight, rstd, cos, sin, *tables,
                *(n for t in (dx if want_dx else x, dy, x) for n in t.stride()[:3]),
                cos.stride(0), sin.stride(0), *strides,
                tiles, heads, seq, cos.shape[0], offset, sequences, weight_offset,
                INTERLEAVED=interleaved, WANT_DX=want_dx, WANT_DWEIGHT=want_dweight,
                **place_options, **options,
            )  # fmt: skip
        grads.append(dx)
        dweights.append(parts.sum(0).to(weight.dtype) if want_dweight else weight.new_empty(0))
    return *grads, *dweights

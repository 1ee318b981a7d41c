"""QK norm and rotary embedding on the CPU: each head is read twice, the second time from L1."""

import math

import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._rotation import PAST, inline, layout, places, position_of
from tilewise.kernels.numba._shared import partial_sums, parts_for, sum_parts_for, summed
from tilewise.kernels.numba._simd import (
    address,
    kind,
    load,
    offset,
    pointer,
    real,
    reciprocal_root,
    store,
)

NAN = math.nan  # the angle of a position that the tables do not have


@inline
def _turn(y, x, weight, cos, sin, r, shift, poison, half, step, gap):
    """Pairs (j * step, j * step + gap), constants where it is inlined."""
    for j in range(half):
        c, s = real(y, load(cos, j)) * poison, real(y, load(sin, j)) * poison
        i, k = j * step, j * step + gap
        u = load(x, i) * r * (real(y, load(weight, i)) + shift)
        v = load(x, k) * r * (real(y, load(weight, k)) + shift)
        store(y, i, u * c - v * s)
        store(y, k, v * c + u * s)


@Kernel
def _forward(
    part, q_side, k_side, cos_at, sin_at, place,
    kind, wide, weight_kind, table_kind,
    dim, half, positions, cos_stride, sin_stride, parts, interleaved, eps, weight_offset,
):  # fmt: skip
    shift = real(kind, weight_offset)
    for turn in range(2):
        side = q_side if turn == 0 else k_side
        y_at, x_at, rows, outer, inner, seq_is_inner = side[:6]
        y_batch, y_outer, y_inner, x_batch, x_outer, x_inner = side[6:12]
        weight, rstd = pointer(side[12], weight_kind), pointer(side[13], wide)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            line, i = row // inner, row % inner
            b, o = line // outer, line % outer
            x = offset(pointer(x_at, kind), b * x_batch + o * x_outer + i * x_inner)
            y = offset(pointer(y_at, kind), b * y_batch + o * y_outer + i * y_inner)
            at = row if seq_is_inner else (b * inner + i) * outer + o
            position = position_of(b, i if seq_is_inner else o, place)
            if position == PAST:
                store(rstd, at, real(kind, 0))
                for j in range(dim):
                    store(y, j, real(kind, 0))
                continue

            square_sum = real(kind, 0)
            for j in range(dim):
                square_sum += load(x, j) * load(x, j)
            r = reciprocal_root(square_sum / real(kind, dim) + real(kind, eps))
            store(rstd, at, r)

            is_known = position >= 0 and position < positions
            poison = real(kind, 1.0 if is_known else NAN)
            place_in_table = position if is_known else 0
            cos = offset(pointer(cos_at, table_kind), place_in_table * cos_stride)
            sin = offset(pointer(sin_at, table_kind), place_in_table * sin_stride)
            if interleaved:
                _turn(y, x, weight, cos, sin, r, shift, poison, half, 2, 1)
            else:
                _turn(y, x, weight, cos, sin, r, shift, poison, half, 1, half)
            for j in range(2 * half, dim):
                store(y, j, load(x, j) * r * (real(kind, load(weight, j)) + shift))


@inline
def _sum_back(dweight, dy, x, weight, cos, sin, r, shift, poison, half, step, gap, summing):
    """The sum of g * xhat over pairs, with g the gradient turned back; and that of the weight."""
    dot = real(x, 0)
    for j in range(half):
        c, s = real(x, load(cos, j)) * poison, real(x, load(sin, j)) * poison
        i, k = j * step, j * step + gap
        du, dv = load(dy, i), load(dy, k)
        gu, gv = (du * c + dv * s) * (load(x, i) * r), (dv * c - du * s) * (load(x, k) * r)
        dot += gu * (real(x, load(weight, i)) + shift) + gv * (real(x, load(weight, k)) + shift)
    # A loop of its own: LLVM has two orders for a sum beside which something is written, and where
    # that lies decides.
    for j in range(half if summing else 0):
        c, s = real(x, load(cos, j)) * poison, real(x, load(sin, j)) * poison
        i, k = j * step, j * step + gap
        du, dv = load(dy, i), load(dy, k)
        store(dweight, i, load(dweight, i) + (du * c + dv * s) * (load(x, i) * r))
        store(dweight, k, load(dweight, k) + (dv * c - du * s) * (load(x, k) * r))
    return dot


@inline
def _turn_back(dx, dy, x, weight, cos, sin, r, shift, poison, mean, half, step, gap):
    for j in range(half):
        c, s = real(x, load(cos, j)) * poison, real(x, load(sin, j)) * poison
        i, k = j * step, j * step + gap
        du, dv = load(dy, i), load(dy, k)
        gu = (du * c + dv * s) * (real(x, load(weight, i)) + shift)
        gv = (dv * c - du * s) * (real(x, load(weight, k)) + shift)
        store(dx, i, r * (gu - load(x, i) * r * mean))
        store(dx, k, r * (gv - load(x, k) * r * mean))


@Kernel
def _backward(
    part, q_side, k_side, cos_at, sin_at, place,
    kind, wide, weight_kind, table_kind,
    dim, half, positions, cos_stride, sin_stride, sum_stride, parts, interleaved, weight_offset,
):  # fmt: skip
    # dx = rstd * (g - xhat * mean(g * xhat)), with g = weight * the gradient turned back
    shift = real(kind, weight_offset)
    for turn in range(2):
        side = q_side if turn == 0 else k_side
        dx_at, dy_at, x_at, rows, outer, inner, seq_is_inner = side[:7]
        dx_batch, dx_outer, dx_inner, dy_batch, dy_outer, dy_inner = side[7:13]
        x_batch, x_outer, x_inner = side[13:16]
        weight, rstd = pointer(side[16], weight_kind), pointer(side[17], wide)
        writing, summing = side[19] != 0, side[18] != 0
        dweight = offset(pointer(side[18], wide), part * sum_stride)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            line, i = row // inner, row % inner
            b, o = line // outer, line % outer
            x = offset(pointer(x_at, kind), b * x_batch + o * x_outer + i * x_inner)
            dy = offset(pointer(dy_at, kind), b * dy_batch + o * dy_outer + i * dy_inner)
            dx = offset(pointer(dx_at, kind), b * dx_batch + o * dx_outer + i * dx_inner)
            position = position_of(b, i if seq_is_inner else o, place)
            if position == PAST:
                for j in range(dim if writing else 0):
                    store(dx, j, real(kind, 0))
                continue

            r = load(rstd, row if seq_is_inner else (b * inner + i) * outer + o)
            is_known = position >= 0 and position < positions
            poison = real(kind, 1.0 if is_known else NAN)
            place_in_table = position if is_known else 0
            cos = offset(pointer(cos_at, table_kind), place_in_table * cos_stride)
            sin = offset(pointer(sin_at, table_kind), place_in_table * sin_stride)
            if interleaved:
                dot = _sum_back(
                    dweight, dy, x, weight, cos, sin, r, shift, poison, half, 2, 1, summing
                )
            else:
                dot = _sum_back(
                    dweight, dy, x, weight, cos, sin, r, shift, poison, half, 1, half, summing
                )
            for j in range(2 * half, dim):
                g = load(dy, j) * (load(x, j) * r)
                dot += g * (real(kind, load(weight, j)) + shift)
            for j in range(2 * half, dim if summing else 0):
                store(dweight, j, load(dweight, j) + load(dy, j) * (load(x, j) * r))
            if not writing:
                continue

            mean = dot / real(kind, dim)
            if interleaved:
                _turn_back(dx, dy, x, weight, cos, sin, r, shift, poison, mean, half, 2, 1)
            else:
                _turn_back(dx, dy, x, weight, cos, sin, r, shift, poison, mean, half, 1, half)
            for j in range(2 * half, dim):
                g = load(dy, j) * (real(kind, load(weight, j)) + shift)
                store(dx, j, r * (g - load(x, j) * r * mean))


def qk_norm_rotary_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    eps: float, weight_offset: float, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], weights [dim], cos, sin [positions, half]
    -> q, k normalised and turned, rstd of each [batch, heads, seq]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = tuple(torch.empty_like(x) for x in (q, k))
    rstd = tuple(x.new_empty(x.shape[:3], dtype=wide) for x in (q, k))
    sides = (
        (*layout(y, x), address(weight), address(of))
        for y, x, weight, of in zip(turned, (q, k), (q_weight, k_weight), rstd, strict=True)
    )
    parts = parts_for(rstd[0].numel())
    _forward(
        parts, q.numel() + k.numel(), *sides, address(cos), address(sin),
        places(position_ids, cu_seqlens, offset),
        kind(q), kind(rstd[0]), kind(q_weight), kind(cos), q.shape[3], cos.shape[1], cos.shape[0],
        cos.stride(0), sin.stride(0), parts, interleaved, eps, weight_offset,
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
    parts = sum_parts_for(max(q_rstd.numel(), k_rstd.numel()), q.shape[3])
    grads, sums, sides = [], [], []
    for dy, x, weight, rstd, want_dx, want_dweight in (
        (dq_turned, q, q_weight, q_rstd, want_dq, want_dq_weight),
        (dk_turned, k, k_weight, k_rstd, want_dk, want_dk_weight),
    ):
        wanted = want_dx or want_dweight
        dy, x, rstd = (t if wanted else t[:, :0] for t in (dy, x, rstd))
        dx = torch.empty_like(x) if want_dx else x.new_empty(0)
        sum_of = partial_sums(weight, parts, rstd.dtype) if want_dweight else None
        walk = layout(dx if want_dx else x, dy, x)
        sides.append((*walk, address(weight), address(rstd), address(sum_of), int(want_dx)))
        grads.append(dx)
        sums.append(sum_of)
    _backward(
        parts, 2 * (q.numel() + k.numel()), *sides, address(cos), address(sin),
        places(position_ids, cu_seqlens, offset),
        kind(q), kind(q_rstd), kind(q_weight), kind(cos), q.shape[3], cos.shape[1], cos.shape[0],
        cos.stride(0), sin.stride(0), max(0 if s is None else s.shape[1] for s in sums), parts,
        interleaved, weight_offset,
    )  # fmt: skip
    dweights = (
        weight.new_empty(0) if s is None else summed(s, weight)
        for weight, s in zip((q_weight, k_weight), sums, strict=True)
    )
    return *grads, *dweights

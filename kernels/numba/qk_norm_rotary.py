"""QK norm and rotary embedding on the CPU: each head is read twice, the second time from L1."""

import math

import torch
from torch import Tensor

from tilewise.kernels.numba._parallel import Kernel, callee
from tilewise.kernels.numba._rotation import PAST, inline, layout, places, position_of
from tilewise.kernels.numba._shared import (
    partial_sums,
    parts_for,
    sum_parts_for,
    summed,
    wide_dtype,
)
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
from tilewise.kernels.numba._stream import LINE, finish_writes, loop_of, streamed, sums_of

NAN = math.nan  # the angle of a position that the tables do not have


def _turned(u, v, u_weight, v_weight, cos, sin, r, shift):
    u, v = u * r * (u_weight + shift), v * r * (v_weight + shift)
    return u * cos - v * sin, v * cos + u * sin


_turn_pair, _turn_halves = inline(_turned), loop_of(_turned)
_scale = loop_of(lambda x, weight, r, shift: (x * r * (weight + shift),))
_sum_squares = sums_of(lambda x: (x * x,), 1)


@inline
def _turn_pairs(y, x, weight, cos, sin, r, shift, half):
    for j in range(half):
        i, k = 2 * j, 2 * j + 1
        u_weight, v_weight = real(y, load(weight, i)), real(y, load(weight, k))
        c, s = real(y, load(cos, j)), real(y, load(sin, j))
        u, v = _turn_pair(load(x, i), load(x, k), u_weight, v_weight, c, s, r, shift)
        store(y, i, u)
        store(y, k, v)


@Kernel
def _forward(
    part, q_side, k_side, cos_at, sin_at, place,
    kind, wide, weight_kind, table_kind,
    dim, half, positions, cos_stride, sin_stride, parts, interleaved, eps, weight_offset,
    past_caches,
):  # fmt: skip
    shift = real(kind, weight_offset)
    for turn in range(2):
        side = q_side if turn == 0 else k_side
        y_at, x_at, rows, outer, inner, seq_is_inner = side[:6]
        y_batch, y_outer, y_inner, x_batch, x_outer, x_inner = side[6:12]
        weight, rstd = pointer(side[12], weight_kind), pointer(side[13], wide)
        row, end = part * rows // parts, (part + 1) * rows // parts
        while row < end:  # a line: rows with the same batch and outer index
            line, first = row // inner, row % inner
            b, o = line // outer, line % outer
            count = min(inner - first, end - row)
            row += count
            for i in range(first, first + count):
                x = offset(pointer(x_at, kind), b * x_batch + o * x_outer + i * x_inner)
                y = offset(pointer(y_at, kind), b * y_batch + o * y_outer + i * y_inner)
                at = line * inner + i if seq_is_inner else (b * inner + i) * outer + o
                position = position_of(b, i if seq_is_inner else o, place)
                if position == PAST:
                    store(rstd, at, real(kind, 0))
                    for j in range(dim):
                        store(y, j, real(kind, 0))
                    continue

                (square_sum,) = _sum_squares((), (x,), (), dim)
                r = reciprocal_root(square_sum / real(kind, dim) + real(kind, eps))
                store(rstd, at, r)

                is_known = position >= 0 and position < positions
                place_in_table = position if is_known else 0
                cos = offset(pointer(cos_at, table_kind), place_in_table * cos_stride)
                sin = offset(pointer(sin_at, table_kind), place_in_table * sin_stride)
                turning = r if is_known else real(kind, NAN)
                if interleaved:
                    _turn_pairs(y, x, weight, cos, sin, turning, shift, half)
                else:
                    outs = y, offset(y, half)
                    ins = x, offset(x, half), weight, offset(weight, half), cos, sin
                    _turn_halves(outs, ins, (turning, shift), half, past_caches)
                if 2 * half < dim:
                    rest = offset(x, 2 * half), offset(weight, 2 * half)
                    _scale((offset(y, 2 * half),), rest, (r, shift), dim - 2 * half, False)
    if past_caches:
        finish_writes()


# --- Backward: the sum of g * xhat, with g = weight * the gradient turned back, and those of the
# weight; then dx = rstd * (g - xhat * mean(g * xhat)).


def _summed_back(du, dv, u, v, u_weight, v_weight, cos, sin, u_sum, v_sum, r, shift):
    gu, gv = (du * cos + dv * sin) * (u * r), (dv * cos - du * sin) * (v * r)
    dot = gu * (u_weight + shift) + gv * (v_weight + shift)
    return None if u_sum is None else u_sum + gu, None if v_sum is None else v_sum + gv, dot


def _turned_back(du, dv, u, v, u_weight, v_weight, cos, sin, r, mean, shift):
    gu, gv = (du * cos + dv * sin) * (u_weight + shift), (dv * cos - du * sin) * (v_weight + shift)
    return r * (gu - u * r * mean), r * (gv - v * r * mean)


def _summed(dy, x, weight, sum, r, shift):
    g = dy * (x * r)
    return None if sum is None else sum + g, g * (weight + shift)


_sum_halves_back = sums_of(_summed_back, 1)
_turn_pair_back, _turn_halves_back = inline(_turned_back), loop_of(_turned_back)
_sum_rest = sums_of(_summed, 1)
_scale_back = loop_of(
    lambda dy, x, weight, r, mean, shift: (r * (dy * (weight + shift) - x * r * mean),)
)


@inline
def _sum_pairs_back(dweight, dy, x, weight, cos, sin, r, shift, half, summing):
    dot = real(x, 0)
    for j in range(half):
        c, s = real(x, load(cos, j)), real(x, load(sin, j))
        i, k = 2 * j, 2 * j + 1
        du, dv = load(dy, i), load(dy, k)
        gu, gv = (du * c + dv * s) * (load(x, i) * r), (dv * c - du * s) * (load(x, k) * r)
        dot += gu * (real(x, load(weight, i)) + shift) + gv * (real(x, load(weight, k)) + shift)
    # A loop of its own: LLVM has two orders for a sum beside which something is written, and where
    # that lies decides.
    for j in range(half if summing else 0):
        c, s = real(x, load(cos, j)), real(x, load(sin, j))
        i, k = 2 * j, 2 * j + 1
        du, dv = load(dy, i), load(dy, k)
        store(dweight, i, load(dweight, i) + (du * c + dv * s) * (load(x, i) * r))
        store(dweight, k, load(dweight, k) + (dv * c - du * s) * (load(x, k) * r))
    return dot


@inline
def _turn_pairs_back(dx, dy, x, weight, cos, sin, r, shift, mean, half):
    for j in range(half):
        i, k = 2 * j, 2 * j + 1
        du, dv, u, v = load(dy, i), load(dy, k), load(x, i), load(x, k)
        u_weight, v_weight = real(x, load(weight, i)), real(x, load(weight, k))
        c, s = real(x, load(cos, j)), real(x, load(sin, j))
        u, v = _turn_pair_back(du, dv, u, v, u_weight, v_weight, c, s, r, mean, shift)
        store(dx, i, u)
        store(dx, k, v)


@callee
def _sum_back(dweight, dy, x, weight, cos, sin, r, turning, shift, half, dim, summing, interleaved):
    """The sum of g * xhat over a row; adds to those of the weight where they are wanted."""
    second, rest = offset(dweight, half), offset(dweight, 2 * half)
    if interleaved:
        dot = _sum_pairs_back(dweight, dy, x, weight, cos, sin, turning, shift, half, summing)
    else:
        pairs = (
            dy, offset(dy, half), x, offset(x, half), weight, offset(weight, half), cos, sin,
        )  # fmt: skip
        if summing:
            ins = (*pairs, dweight, second)
            (dot,) = _sum_halves_back((dweight, second), ins, (turning, shift), half)
        else:
            (dot,) = _sum_halves_back((None, None), (*pairs, None, None), (turning, shift), half)
    if 2 * half < dim:
        row = offset(dy, 2 * half), offset(x, 2 * half), offset(weight, 2 * half)
        if summing:
            (more,) = _sum_rest((rest,), (*row, rest), (r, shift), dim - 2 * half)
        else:
            (more,) = _sum_rest((None,), (*row, None), (r, shift), dim - 2 * half)
        dot += more
    return dot


@Kernel
def _backward(
    part, q_side, k_side, cos_at, sin_at, place,
    kind, wide, weight_kind, table_kind,
    dim, half, positions, cos_stride, sin_stride, sum_stride, parts, interleaved, weight_offset,
    past_caches,
):  # fmt: skip
    shift = real(kind, weight_offset)
    for turn in range(2):
        side = q_side if turn == 0 else k_side
        dx_at, dy_at, x_at, rows, outer, inner, seq_is_inner = side[:7]
        dx_batch, dx_outer, dx_inner, dy_batch, dy_outer, dy_inner = side[7:13]
        x_batch, x_outer, x_inner = side[13:16]
        weight, rstd = pointer(side[16], weight_kind), pointer(side[17], wide)
        writing, summing = side[19] != 0, side[18] != 0
        dweight = offset(pointer(side[18], wide), part * sum_stride)
        row, end = part * rows // parts, (part + 1) * rows // parts
        while row < end:
            line, first = row // inner, row % inner
            b, o = line // outer, line % outer
            count = min(inner - first, end - row)
            row += count
            for i in range(first, first + count):
                x = offset(pointer(x_at, kind), b * x_batch + o * x_outer + i * x_inner)
                dy = offset(pointer(dy_at, kind), b * dy_batch + o * dy_outer + i * dy_inner)
                dx = offset(pointer(dx_at, kind), b * dx_batch + o * dx_outer + i * dx_inner)
                position = position_of(b, i if seq_is_inner else o, place)
                if position == PAST:
                    for j in range(dim if writing else 0):
                        store(dx, j, real(kind, 0))
                    continue

                at = line * inner + i if seq_is_inner else (b * inner + i) * outer + o
                r = load(rstd, at)
                is_known = position >= 0 and position < positions
                place_in_table = position if is_known else 0
                cos = offset(pointer(cos_at, table_kind), place_in_table * cos_stride)
                sin = offset(pointer(sin_at, table_kind), place_in_table * sin_stride)
                turning = r if is_known else real(kind, NAN)
                dot = _sum_back(
                    dweight, dy, x, weight, cos, sin, r, turning, shift, half, dim, summing,
                    interleaved,
                )  # fmt: skip
                if not writing:
                    continue

                mean = dot / real(kind, dim)  # NaN where the position is not known
                if interleaved:
                    _turn_pairs_back(dx, dy, x, weight, cos, sin, r, shift, mean, half)
                else:
                    ins = (
                        dy, offset(dy, half), x, offset(x, half), weight, offset(weight, half),
                        cos, sin,
                    )  # fmt: skip
                    outs = dx, offset(dx, half)
                    _turn_halves_back(outs, ins, (r, mean, shift), half, past_caches)
                if 2 * half < dim:
                    ins = offset(dy, 2 * half), offset(x, 2 * half), offset(weight, 2 * half)
                    rest = (offset(dx, 2 * half),)
                    _scale_back(rest, ins, (r, mean, shift), dim - 2 * half, False)
    if past_caches:
        finish_writes()


# --- Launches.


def qk_norm_rotary_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    eps: float, weight_offset: float, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], weights [dim], cos, sin [positions, half]
    -> q, k normalised and turned, rstd of each [batch, heads, seq]."""
    wide = wide_dtype(q.dtype)
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
        cos.shape[1] * q.itemsize % LINE == 0 and streamed(*turned),
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
        cos.shape[1] * q.itemsize % LINE == 0
        and streamed(*(dx for dx, want in zip(grads, (want_dq, want_dk), strict=True) if want)),
    )  # fmt: skip
    dweights = (
        weight.new_empty(0) if s is None else summed(s, weight)
        for weight, s in zip((q_weight, k_weight), sums, strict=True)
    )
    return *grads, *dweights

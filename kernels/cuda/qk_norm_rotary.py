"""QK norm and rotary embedding in CUDA C++: a few lanes a head, 16-byte accesses where aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._rotation import places
from tilewise.kernels.cuda._shared import DTYPES, address, stream

# Blocks whose sums of the weights' gradients are added in a second step, and rows of a block: no
# function of the GPU, so that the bits are not either.
PARTS = 1024
PART_ROWS = 32


def qk_norm_rotary_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    eps: float, weight_offset: float, offset: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [batch, heads, seq, dim], weights [dim], cos, sin [positions, half]
    -> q, k normalised and turned, rstd of each [batch, heads, seq]."""
    turned = tuple(torch.empty_like(x) for x in (q, k))
    rstd = tuple(x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k))
    given = (*turned, *rstd, q, k, q_weight, k_weight, cos, sin)
    batch, heads, seq, dim = q.shape
    _cuda.qk_norm_rotary_forward(
        *map(address, given), batch, heads, k.shape[1], seq, dim, cos.shape[1],
        *(n for t in (*turned, q, k) for n in t.stride()[:3]), cos.stride(0), sin.stride(0),
        *places(position_ids, cu_seqlens, offset), cos.shape[0], interleaved, eps, weight_offset,
        DTYPES[q.dtype], DTYPES[q_weight.dtype], DTYPES[cos.dtype], stream(q),
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
    batch, _, seq, dim = q.shape
    wanted = (want_dq or want_dq_weight, want_dk or want_dk_weight)
    heads = [x.shape[1] if want else 0 for x, want in zip((q, k), wanted, strict=True)]
    parts = [min(-(-batch * seq * n // PART_ROWS), -(-PARTS * n // sum(heads))) for n in heads]
    outs = [
        torch.empty_like(t) if want else None
        for t, want in (
            (q, want_dq), (k, want_dk), (q_weight, want_dq_weight), (k_weight, want_dk_weight),
        )
    ]  # fmt: skip
    sums = [
        None if out is None else q_rstd.new_empty(count, dim)
        for out, count in zip(outs[2:], parts, strict=True)
    ]
    strides = [(x if dx is None else dx).stride() for dx, x in zip(outs, (q, k), strict=False)]
    strides += [t.stride() for t in (dq_turned, dk_turned, q, k)]
    given = (*outs, *sums, dq_turned, dk_turned, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)
    _cuda.qk_norm_rotary_backward(
        *map(address, given), batch, *heads, seq, dim, cos.shape[1],
        *(n for stride in strides for n in stride[:3]), cos.stride(0), sin.stride(0),
        *places(position_ids, cu_seqlens, offset), cos.shape[0], *parts, interleaved,
        weight_offset, DTYPES[q.dtype], DTYPES[q_weight.dtype], DTYPES[cos.dtype], stream(q),
    )  # fmt: skip
    return tuple(q.new_empty(0) if out is None else out for out in outs)

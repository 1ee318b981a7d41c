"""Rotary embedding in CUDA C++: a few lanes a head, 16-byte accesses where heads are aligned."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._rotation import places
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, cu_seqlens: Tensor | None,
    offset: int, interleaved: bool, sign: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_turned, k_turned = torch.empty_like(q), torch.empty_like(k)
    batch, heads, seq, dim = q.shape
    _cuda.rotary_forward(
        address(q_turned), address(k_turned), address(q), address(k), address(cos), address(sin),
        batch, heads, k.shape[1], seq, dim, cos.shape[1],
        *q_turned.stride()[:3], *k_turned.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        cos.stride(0), sin.stride(0), *places(position_ids, cu_seqlens, offset), cos.shape[0],
        interleaved, sign, DTYPES[q.dtype], DTYPES[cos.dtype], stream(q),
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

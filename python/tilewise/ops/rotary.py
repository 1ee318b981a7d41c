"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of dimensions of `q` and `k` by the angles of their positions."""
    return rotary_reference(
        q, k, cos, sin, interleaved=interleaved, position_ids=position_ids, offset=offset
    )


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The formula of `rotary`, in plain PyTorch."""
    if position_ids is None:
        cos, sin = (t[offset : offset + q.shape[-2]] for t in (cos, sin))
    else:  # [batch, seq] -> [batch, 1, seq, half]
        cos, sin = (t[position_ids + offset].unsqueeze(-3) for t in (cos, sin))
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide, half = x.to(wide_dtype(x.dtype)), cos.shape[-1]
    turning, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1).to(x.dtype)

"""Scaled dot-product attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762), tiled with
an online softmax (Dao et al., 2022, https://arxiv.org/abs/2205.14135)."""

import torch
from torch import Tensor

from tilewise.op import wide_dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Average the rows of `v` by the softmax of the scores of `q` against `k`."""
    return attention_reference(q, k, v, mask=mask, causal=causal, scale=scale)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The formula of `attention`, in plain PyTorch; probabilities are rounded to the dtype of `q`
    before they multiply `v`, as in any tensor-core kernel."""
    wide, groups = wide_dtype(q.dtype), q.shape[1] // max(k.shape[1], 1)
    keys, values = (t.to(wide).repeat_interleave(groups, 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * (q.to(wide) @ keys.mT)
    seq_q, seq_k = score.shape[-2:]
    allowed = torch.ones(seq_q, seq_k, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(seq_k - seq_q)
    if mask is not None:
        allowed = allowed & mask
    score = score.masked_fill(~allowed, float("-inf"))
    nothing = ~allowed.any(-1, keepdim=True)
    p = torch.softmax(score.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return (p.to(q.dtype).to(wide) @ values).to(q.dtype)

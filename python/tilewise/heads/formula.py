"""The formula of attention, dense and in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewise.op import wide_dtype
from tilewise.rng import keep_mask, keep_scale

Window = Sequence[int | None]


def limits(causal: bool, window: Window | None) -> tuple[int, int]:
    """How many keys to the left and right of its own place a query sees; -1 is all of them."""
    left, right = (-1 if n is None else n for n in (window or (None, None)))
    return left, 0 if causal else right


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale asked for, or 1 / sqrt(dim)."""
    return max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)


def scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    own: Tensor | None = None,
) -> Tensor:
    """Scores of queries against as many heads of keys, -inf where the two may not meet.

    s = scale * q k^T, or softcap * tanh(scale * q k^T / softcap)
    s = s + bias - slope * |own_i - j|, with own_i = i + seq_k - seq_q unless given, `[..., seq_q]`
    """
    s = scale * (q @ k.mT)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    seq_q, seq_k = s.shape[-2:]
    if own is None:
        own = torch.arange(seq_k - seq_q, seq_k, device=q.device)
    distance = torch.arange(seq_k, device=q.device) - own[..., None]
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    hidden = None if mask is None else ~mask
    if left >= 0:
        before = distance < -left
        hidden = before if hidden is None else hidden | before
    if right >= 0:
        after = distance > right
        hidden = after if hidden is None else hidden | after
    return s if hidden is None else s.masked_fill(hidden, float("-inf"))


def probabilities(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of scores `[batch, heads, seq_q, seq_k]`, and lse `[batch, heads, seq_q]`.

        p = exp(s) / (exp(sink) + sum exp(s)), lse = log(exp(sink) + sum exp(s))

    Where all that is summed is 0, p is 0 and lse -inf, without a gradient.
    """
    seq_k, empty = s.shape[-1], float("-inf")
    if sinks is not None:
        column = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat([s, column], -1)
    nothing = (s == empty).all(-1, keepdim=True)
    s = s.masked_fill(nothing, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(nothing.squeeze(-1), empty)
    return torch.softmax(s, -1).masked_fill(nothing, 0.0)[..., :seq_k], lse


def dropped(p: Tensor, dropout_p: float, seed: Tensor | int, offset: Tensor | int) -> Tensor:
    """Probabilities, 0 where dropout says so and the others divided by 1 - `dropout_p`."""
    rows = torch.arange(p.shape[:-1].numel(), device=p.device).view(p.shape[:-1])
    kept = keep_mask(dropout_p, seed, offset, rows, p.shape[-1])
    return torch.where(kept, p * keep_scale(dropout_p), 0.0)


def weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    seed: Tensor | int,
    offset: Tensor | int,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By what each value is multiplied, in the dtype of the arithmetic, and lse."""
    dtype = q.dtype
    q, k = (t.to(wide_dtype(dtype)) for t in (q, k))
    k = _visible(_with_heads(k, q), mask)
    s = scores(q, k, mask, bias, alibi_slopes, left, right, softcap, scale, own)
    s = _with_rounded_gradient(s, dtype)
    p, lse = probabilities(s, sinks)
    return dropped(p, dropout_p, seed, offset) if dropout_p else p, lse


def _with_rounded_gradient(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`s`, whose gradient is rounded to `dtype`, as where it is an operand of tensor cores."""
    if dtype == s.dtype:
        return s
    rounded = s.detach() + (s - s.detach()).to(dtype).to(s.dtype)  # of 0, but not of a gradient
    return torch.where(s.isfinite(), rounded, s)


def averaged(p: Tensor, q: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The values by the `weights` of the queries, which are rounded to the dtype of `q` before they
    multiply `v`, as in any tensor-core kernel."""
    values = _visible(_with_heads(v.to(p.dtype), q), mask)
    return (p.to(q.dtype).to(p.dtype) @ values).to(q.dtype)


def attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """out and lse of the arguments of `weights`, in their order, and `v`."""
    p, lse = weights(q, k, mask, *options)
    return averaged(p, q, v, mask), lse


def _with_heads(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1)


def _visible(t: Tensor, mask: Tensor | None) -> Tensor:
    """Keys or values, 0 where a mask hides them from all queries: a NaN must meet no product."""
    if mask is None or mask.ndim == 0 or (mask.ndim > 1 and mask.shape[-2] != 1):
        return t
    return t.masked_fill(~(mask[None] if mask.ndim == 1 else mask).mT, 0.0)


def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of `merge_attention`: each part weighs exp(its lse - lse), which is a sigmoid."""
    empty = float("-inf")
    nothing = (lse_a == empty) & (lse_b == empty)
    lse_a, lse_b = (lse.masked_fill(nothing, 0.0) for lse in (lse_a, lse_b))
    parts = [
        torch.sigmoid(own - other)[..., None] * out.to(own.dtype)
        for out, own, other in ((out_a, lse_a, lse_b), (out_b, lse_b, lse_a))
    ]
    out = (parts[0] + parts[1]).masked_fill(nothing[..., None], 0.0)
    lse = torch.logsumexp(torch.stack([lse_a, lse_b], -1), -1)
    return out.to(out_a.dtype), lse.masked_fill(nothing, empty)

"""Attention, as in `torch.nn.functional`."""

import torch
from torch import Tensor

from tilewise.ops import attention as _attention

_torch = torch.nn.functional


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Average values by scores, as `torch.nn.functional.scaled_dot_product_attention`.

    PyTorch's own function runs, and raises its own errors, for what our kernels lack: dropout, a
    floating-point mask, a mask together with `is_causal`, batches to be broadcast, and shapes or
    dtypes that do not fit.

    Args:
        query: `[..., heads, seq_q, dim]` or `[batch, seq_q, dim]`, floating point.
        key: `[..., kv_heads, seq_k, dim]`, dtype of `query`.
        value: `[..., kv_heads, seq_k, v_dim]`, dtype of `query`.
        attn_mask: Broadcastable to `[..., heads, seq_q, seq_k]`. Bool, True where a query attends
            to a key; or floating point, added to the scores.
        dropout_p: Dropped out of the probabilities, always: it knows of no training mode.
        is_causal: Let query i attend only to keys j <= i, counted from the first of both.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        enable_gqa: Let kv_heads be a divisor of heads; otherwise they must be equal.

    Returns:
        `[..., heads, seq_q, v_dim]`, dtype of `query`.
    """
    ours = dropout_p == 0 and _fit(query, key, value, enable_gqa)
    if attn_mask is not None:
        ours = ours and attn_mask.dtype == torch.bool and not is_causal and attn_mask.ndim <= 4
        ours = ours and (query.ndim == 4 or attn_mask.ndim <= 2)
    if not ours:
        return _torch.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    seq_q, seq_k = query.shape[-2], key.shape[-2]
    if is_causal and seq_q != seq_k:  # ours counts from the last
        attn_mask = torch.ones(seq_q, seq_k, dtype=torch.bool, device=query.device).tril()
    q, k, v = (_with_heads(t) for t in (query, key, value))
    causal = is_causal and attn_mask is None
    out = _attention.attention(q, k, v, mask=attn_mask, causal=causal, scale=scale)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether our attention takes these; if not, PyTorch has an answer or an error."""
    if not 3 <= query.ndim == key.ndim == value.ndim or not query.is_floating_point():
        return False
    heads, kv_heads = (t.shape[-3] if t.ndim > 3 else 1 for t in (query, key))
    grouped = enable_gqa and kv_heads > 0 and heads % kv_heads == 0
    batch = slice(-3 if query.ndim > 3 else -2)
    return (
        query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.shape[batch] == key.shape[batch]
        and key.shape[:-1] == value.shape[:-1]
        and query.shape[-1] == key.shape[-1]
        and (heads == kv_heads or grouped)
    )


def _with_heads(x: Tensor) -> Tensor:
    """`[batch, heads, seq, dim]`, whatever the number of dimensions before heads, or without it."""
    return x.unsqueeze(1) if x.ndim == 3 else x.reshape(-1, *x.shape[-3:])

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

    PyTorch's own function runs, and raises its own errors, for what we lack: batches to be
    broadcast, and shapes or dtypes that do not fit. What is dropped out is drawn by a seed of
    PyTorch's generator, but not the same as PyTorch drops.

    Args:
        query: `[..., heads, seq_q, dim]` or `[batch, seq_q, dim]`, floating point.
        key: `[..., kv_heads, seq_k, dim]`, dtype of `query`.
        value: `[..., kv_heads, seq_k, v_dim]`, dtype of `query`.
        attn_mask: Broadcastable to `[..., heads, seq_q, seq_k]`. Bool, True where a query attends
            to a key; or floating point, added to the scores, with a gradient.
        dropout_p: Dropped out of the probabilities, always: it knows of no training mode.
        is_causal: Let query i attend only to keys j <= i, counted from the first of both.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        enable_gqa: Let kv_heads be a divisor of heads; otherwise they must be equal.

    Returns:
        `[..., heads, seq_q, v_dim]`, dtype of `query`.

    Raises:
        RuntimeError: If there is a mask with `is_causal`, or whatever PyTorch raises.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention: attn_mask must be None if is_causal, got both"
        )
    ours = 0 <= dropout_p <= 1 and _fit(query, key, value, enable_gqa)
    if not ours or (attn_mask is not None and not _fits(attn_mask, query, key)):
        return _torch.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    seq_q, seq_k = query.shape[-2], key.shape[-2]
    if is_causal and seq_q < seq_k:  # nobody sees the keys after the last query
        key, value = key[..., :seq_q, :], value[..., :seq_q, :]
    elif is_causal and seq_q > seq_k:  # ours counts from the last
        attn_mask = torch.ones(seq_q, seq_k, dtype=torch.bool, device=query.device).tril()
    q, k, v = (_with_heads(t) for t in (query, key, value))
    mask = bias = None
    if attn_mask is not None:
        mask = _spread(attn_mask, query)
        if mask.dtype != torch.bool:
            mask, bias = None, mask
    causal = is_causal and attn_mask is None
    out = _attention.attention(
        q, k, v, bias, mask=mask, causal=causal, dropout_p=dropout_p, scale=scale
    )
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


def _fits(attn_mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether this is a mask or a bias of their scores."""
    shape = (*query.shape[:-1], key.shape[-2])
    pairs = zip(attn_mask.shape[::-1], shape[::-1], strict=False)
    return (
        attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
        and attn_mask.device == query.device
        and attn_mask.ndim <= len(shape)
        and all(size in (1, whole) for size, whole in pairs)
    )


def _with_heads(x: Tensor) -> Tensor:
    """`[batch, heads, seq, dim]`, whatever the number of dimensions before heads, or without it."""
    return x.unsqueeze(1) if x.ndim == 3 else x.reshape(-1, *x.shape[-3:])


def _spread(attn_mask: Tensor, query: Tensor) -> Tensor:
    """It as of scores `[batch, heads, seq_q, seq_k]`; only if it varies along some of several
    batch dimensions is it copied."""
    if query.ndim == 3:
        return attn_mask.unsqueeze(1) if attn_mask.ndim == 3 else attn_mask
    if query.ndim == 4 or attn_mask.ndim <= 3:
        return attn_mask
    if attn_mask.shape[:-3].numel() > 1:
        attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:])
    return attn_mask.reshape(-1, *attn_mask.shape[-3:])

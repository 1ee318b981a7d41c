"""Functions of `torch.nn.functional`, run by our kernels: names, order and defaults are PyTorch's.

Values, gradients and result dtypes are PyTorch's too. Under autocast the dtypes are those of our
ops; wrong shapes and dtypes that PyTorch's own function does not see first raise our errors.
`with tilewise.backend(...)` says which kernels run.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tilewise.op import autocast_dtype, wide_dtype
from tilewise.ops import attention as _attention
from tilewise.ops import cross_entropy as _cross_entropy
from tilewise.ops import embed as _embed
from tilewise.ops import gelu as _gelu
from tilewise.ops import glu as _glu
from tilewise.ops import layer_norm as _layer_norm
from tilewise.ops import linear_cross_entropy as _linear_cross_entropy
from tilewise.ops import rms_norm as _rms_norm
from tilewise.ops import softmax as _softmax

_torch = torch.nn.functional


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Scale to unit root-mean-square over the last dimensions, as `torch.nn.functional.rms_norm`.

    Args:
        input: `[..., *normalized_shape]`, floating point.
        normalized_shape: The last dimensions, over which to normalise.
        weight: `normalized_shape`; fp32, or the dtype of `input`. None is all ones.
        eps: Added to the mean square. None is the machine epsilon of the arithmetic, fp32 or fp64.

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong.
        RuntimeError: If the devices differ.
    """
    rows, (flat_weight,) = _flattened("rms_norm", input, normalized_shape, weight=weight)
    if eps is None:
        eps = torch.finfo(wide_dtype(input.dtype)).eps
    return _rms_norm.rms_norm(rows, flat_weight, eps).reshape(input.shape)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Bring to mean 0 and variance 1 over the last dimensions, as `torch.nn.functional.layer_norm`.

    Args:
        input: `[..., *normalized_shape]`, floating point.
        normalized_shape: The last dimensions, over which to normalise.
        weight: `normalized_shape`; fp32, or the dtype of `input`. None is all ones.
        bias: As `weight`, and of its dtype. None is all zeros.
        eps: Added to the variance.

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong.
        RuntimeError: If the devices differ.
    """
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    rows, (flat_weight, flat_bias) = _flattened(
        "layer_norm", input, normalized_shape, weight=weight, bias=bias
    )
    return _layer_norm.layer_norm(rows, flat_weight, flat_bias, eps).reshape(input.shape)


def _flattened(
    name: str, x: Tensor, shape: list[int], **parameters: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """`x` with its last dimensions as one, and the parameters as vectors."""
    size = tuple(shape)
    if not size or x.shape[-len(size) :] != size:
        raise ValueError(
            f"{name}: input must be [..., *normalized_shape], got {list(x.shape)} and {list(size)}"
        )
    for word, parameter in parameters.items():
        if parameter is not None and parameter.shape != size:
            raise ValueError(
                f"{name}: {word} must be normalized_shape, "
                f"got {list(parameter.shape)} and {list(size)}"
            )
    vectors = [None if p is None else p.reshape(-1) for p in parameters.values()]
    return x.reshape(*x.shape[: -len(size)], math.prod(size)), vectors


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide exponentials by their sum over a dimension, as `torch.nn.functional.softmax`.

    PyTorch's own function runs for `dim=None`, which it deprecates, and for scalars.

    Args:
        input: `[...]`, floating point, or anything where there is a `dtype`.
        dim: The dimension along which the results sum to one. Copied where it is not the last.
        _stacklevel: For PyTorch's warning.
        dtype: To what `input` is cast first. None leaves it.

    Returns:
        The shape of `input`; `dtype`, or the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if dim is None or input.ndim == 0:
        return _torch.softmax(input, dim, _stacklevel + 1, dtype)
    x = input if dtype is None else input.to(dtype)
    return _softmax.softmax(x.movedim(dim, -1)).movedim(-1, dim)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Take the logarithm of the softmax over a dimension, as `torch.nn.functional.log_softmax`.

    PyTorch's own function runs for `dim=None`, which it deprecates, and for scalars.

    Args:
        input: `[...]`, floating point, or anything where there is a `dtype`.
        dim: The dimension along which the exponentials of the results sum to one. Copied where it
            is not the last.
        _stacklevel: For PyTorch's warning.
        dtype: To what `input` is cast first. None leaves it.

    Returns:
        The shape of `input`; `dtype`, or the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if dim is None or input.ndim == 0:
        return _torch.log_softmax(input, dim, _stacklevel + 1, dtype)
    x = input if dtype is None else input.to(dtype)
    return _softmax.log_softmax(x.movedim(dim, -1)).movedim(-1, dim)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compare the softmax of logits with their targets, as `torch.nn.functional.cross_entropy`.

    PyTorch's own function runs for probabilities as targets, for class weights with a gradient,
    and for the deprecated `size_average` and `reduce`. Otherwise a target that is no class is a
    loss of NaN, not an error.

    Args:
        input: `[classes]`, `[batch, classes]` or `[batch, classes, ...]`, floating point.
        target: Class indices, int64 or uint8, the shape of `input` without classes; or
            probabilities, the shape of `input`.
        weight: `[classes]`, a factor for each class, dtype of `input`.
        size_average: Deprecated by PyTorch.
        ignore_index: The target of what does not count.
        reduce: Deprecated by PyTorch.
        reduction: "mean", "sum" or "none".
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.

    Returns:
        A scalar, or the shape of the indices with "none"; the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or an option is wrong.
        RuntimeError: If the devices differ.
    """
    indices = target.dtype in (torch.int64, torch.uint8) and input.ndim > 0
    weighed = weight is None or (weight.dtype == input.dtype and not weight.requires_grad)
    if not indices or not weighed or size_average is not None or reduce is not None:
        return _torch.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    loss = _cross_entropy.cross_entropy(
        input if input.ndim == 1 else input.movedim(1, -1),
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss if autocast_dtype(input) is not None else loss.to(input.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Compare linear logits with their targets, as `torch.nn.functional.linear_cross_entropy`.

    PyTorch's `linear` and our `cross_entropy` run for probabilities as targets and for weights of
    more than two dimensions; else our own op, which keeps no logits.

    Args:
        input: `[in_features]` or `[batch, in_features]`, floating point.
        linear_weight: `[classes, in_features]` or `[classes, ..., in_features]`.
        target: Class indices, int64 or uint8, `[]`, `[batch]` or `[batch, ...]`; or probabilities,
            the shape of the logits.
        linear_bias: `linear_weight` without its last dimension, or None.
        weight: `[classes]`, a factor for each class.
        reduction: "mean", "sum" or "none".
        ignore_index: The target of what does not count. None is -100.
        label_smoothing: The part of the target that is spread evenly over all classes, 0 to 1.
        options: A `torch.nn.LinearCrossEntropyOptions`: then logits are made in parts, in as little
            memory as ours takes. None makes them all at once.

    Returns:
        A scalar, or the shape of the indices with "none"; the dtype of `input`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape or an option is wrong.
        RuntimeError: If the devices differ.
    """
    indices = target.dtype in (torch.int64, torch.uint8) and linear_weight.ndim == 2
    weighed = weight is None or not weight.requires_grad
    ignored = -100 if ignore_index is None else ignore_index
    if indices and weighed and target.shape == input.shape[:-1]:
        loss = _linear_cross_entropy.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            reduction=reduction,
            memory="fast" if options is None else "lean",
        )
        return loss if autocast_dtype(input) is not None else loss.to(input.dtype)
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    logits = _torch.linear(input, flat, bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    if target.shape == logits.shape and ignore_index is not None:
        raise ValueError(
            "linear_cross_entropy: ignore_index must be None for probabilities as targets, "
            f"got {ignore_index}"
        )
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows of a table, as `torch.nn.functional.embedding`.

    PyTorch's own function runs for `max_norm`, `scale_grad_by_freq`, `sparse`, and tables that are
    empty or not of floating point. Otherwise an index of no row is a row of NaN, not an error.

    Args:
        input: `[...]`, int64 or int32.
        weight: `[rows, cols]`.
        padding_idx: A row of `weight`, from the end if negative, that gets no gradient.
        max_norm: Scales rows down, in place, whose norm is larger.
        norm_type: Of that norm.
        scale_grad_by_freq: Divides gradients by how often a row is named.
        sparse: Whether the gradient of `weight` is a sparse tensor.

    Returns:
        `[..., cols]`, dtype of `weight`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong, or `padding_idx` is no row.
        RuntimeError: If the devices differ.
    """
    theirs = max_norm is not None or scale_grad_by_freq or sparse
    if theirs or weight.numel() == 0 or not weight.is_floating_point():
        return _torch.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return _embed.embed(input, weight, padding_idx=padding_idx)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Multiply by the normal distribution function, as `torch.nn.functional.gelu`.

    Args:
        input: `[...]`, floating point.
        approximate: "none" for the exact function, or "tanh".

    Returns:
        The shape and dtype of `input`.

    Raises:
        TypeError: If the dtype is wrong.
        ValueError: If `approximate` is unknown.
    """
    return _gelu.gelu(input, approximate)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Gate one half by the sigmoid of the other, as `torch.nn.functional.glu`.

    Args:
        input: `[...]`, floating point, of even size in `dim`: first what is gated, then the gate.
        dim: The dimension to halve.

    Returns:
        The shape of `input` with half the size in `dim`, its dtype.

    Raises:
        TypeError: If the dtype is wrong.
        IndexError: If there is no such dimension.
    """
    if input.ndim == 0 or input.shape[dim] % 2:
        return _torch.glu(input, dim)
    up, gate = input.chunk(2, dim)
    return _glu.glu(gate, up, "sigmoid")


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

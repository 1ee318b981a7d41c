"""Scaled dot-product attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762), tiled with
an online softmax (Dao et al., 2022, https://arxiv.org/abs/2205.14135)."""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.heads.checks import check_parts
from tilewise.heads.formula import Window, merged
from tilewise.heads.launch import BACKENDS, attend, reference_of
from tilewise.heads.sizes import (
    GPU_WORKLOADS,
    LSE_SIZES,
    SIZES,
    WORKLOADS,
    bytes_moved,
    flops,
    inputs,
)
from tilewise.op import Op, declare


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Average the rows of `v` by the softmax of the scores of `q` against `k`.

        s = scale * q k^T, or softcap * tanh(scale * q k^T / softcap)
        s_ij = s_ij + bias_ij - alibi_slope * |i + seq_k - seq_q - j|,
               or -inf where mask, causal or window hides key j from query i
        p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))
        out = dropout(p) v

    Where a query has nothing to attend to, out and its gradients are 0, also if there is a sink.
    Query head h reads key and value head h // (heads / kv_heads). Dropout zeroes a probability with
    probability `dropout_p` and divides the others by 1 - `dropout_p`; which, the seed says
    (`tilewise.rng.keep_mask` at row (batch * heads + head) * seq_q + query and column key), the
    same on every backend. Under autocast q, k and v are cast to its dtype.

    Args:
        q: `[batch, heads, seq_q, dim]`, floating point, any strides (a view of
            `[batch, seq, heads, dim]` is not copied).
        k: `[batch, kv_heads, seq_k, dim]`, dtype of `q`; kv_heads divides heads.
        v: `[batch, kv_heads, seq_k, v_dim]`, dtype of `q`.
        bias: Added to the scores, broadcastable to `[batch, heads, seq_q, seq_k]`, dtype of `q` or
            fp32. Its gradient is summed over what is broadcast.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        mask: Bool, True where a query attends to a key; broadcastable to `[batch, heads, seq_q,
            seq_k]`. Keys it hides from all queries alike, by a size of 1 for the queries, may hold
            NaN or infinity, and so may their bias; other keys must be finite.
        causal: Let query i attend only to keys j <= i + seq_k - seq_q: the last query sees all.
        window: (left, right): let query i attend only to keys j with i + seq_k - seq_q - left <= j
            <= i + seq_k - seq_q + right. None is no limit, of both or of either.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32, without gradient: what a key loses for
            each position that it is away.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        dropout_p: Probability of dropping a probability, from 0 to 1.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        seed: int64, or a tensor `[]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor `[]`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch, heads, seq_q, v_dim]`, dtype of `q`, its dims in memory in the order of those of
        `q`.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option, or cannot take so wide a head.
    """
    out: Tensor = attend(
        ATTENTION, q, k, v, bias, sinks, mask=mask, causal=causal, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, scale=scale, seed=seed,
        offset=offset, generator=generator, backend=backend, with_lse=False,
    )  # fmt: skip
    return out


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The formula of `attention`, in plain PyTorch; probabilities are rounded to the dtype of `q`
    before they multiply `v`, as in any tensor-core kernel."""
    return reference_of(q, k, v, bias, sinks, **options)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention`, and the logarithm of what its probabilities are divided by.

        lse_i = log(exp(sink) + sum_j exp(s_ij)), with the scores s and all options of `attention`

    Both have gradients. Dropout leaves lse as it is. With nothing to attend to lse is -inf, without
    a gradient; with only a sink it is the sink.

    Args:
        q: `[batch, heads, seq_q, dim]`, floating point, any strides.
        k: `[batch, kv_heads, seq_k, dim]`, dtype of `q`; kv_heads divides heads.
        v: `[batch, kv_heads, seq_k, v_dim]`, dtype of `q`.
        bias: Added to the scores, broadcastable to `[batch, heads, seq_q, seq_k]`, dtype of `q` or
            fp32.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        mask: Bool, True where a query attends to a key; broadcastable as `bias`.
        causal: Let query i attend only to keys j <= i + seq_k - seq_q.
        window: (left, right) of what a query sees beside its own position; None is no limit.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32, without gradient.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        dropout_p: Probability of dropping a probability, from 0 to 1.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        seed: int64, or a tensor `[]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor `[]`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        out, `[batch, heads, seq_q, v_dim]`, dtype of `q`; and lse, `[batch, heads, seq_q]`, fp32
        (fp64 for fp64).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: As `attention`.
    """
    both: tuple[Tensor, Tensor] = attend(
        WITH_LSE, q, k, v, bias, sinks, mask=mask, causal=causal, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, scale=scale, seed=seed,
        offset=offset, generator=generator, backend=backend, with_lse=True,
    )  # fmt: skip
    return both


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge what `attention_with_lse` gave of two parts of the keys into what it gives of all.

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    In plain PyTorch, differentiable. Where both lse are -inf, out is 0 and lse -inf, without a
    gradient. At most one of the parts may have had sinks.

    Args:
        out_a: `[batch, heads, seq_q, v_dim]`, floating point.
        lse_a: `[batch, heads, seq_q]`, fp32 (fp64 for fp64 `out_a`).
        out_b: Like `out_a`.
        lse_b: Like `lse_a`.

    Returns:
        out and lse, like `out_a` and `lse_a`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong.
        RuntimeError: If the devices differ.
    """
    check_parts(out_a, lse_a, out_b, lse_b)
    return merged(out_a, lse_a, out_b, lse_b)


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's own, which has no sinks; causal is the same for as many queries as keys."""
    assert sinks is None and (bias is None or mask is None)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if bias is None else bias, is_causal=causal, scale=scale,
        enable_gqa=True,
    )  # fmt: skip


ATTENTION = declare(
    Op(
        name="attention",
        call=attention,
        reference=attention_reference,
        backends=BACKENDS,
        inputs=inputs,
        sizes=SIZES,
        workloads=WORKLOADS,
        gpu_workloads=GPU_WORKLOADS,
        bytes_moved=bytes_moved,
        flops=flops,
        native=_native,
    )
)
WITH_LSE = declare(
    Op(
        name="attention_with_lse",
        call=attention_with_lse,
        reference=reference_of,
        backends=BACKENDS,
        inputs=inputs,
        sizes=LSE_SIZES,
        workloads=WORKLOADS[:1],
        bytes_moved=bytes_moved,
        flops=flops,
    )
)

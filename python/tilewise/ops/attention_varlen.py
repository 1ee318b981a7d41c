"""Attention of sequences of unlike lengths, packed one after the other without padding."""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.heads.formula import Window
from tilewise.heads.packed import packed_reference_of
from tilewise.heads.packed_launch import PACKED_BACKENDS, attend_packed
from tilewise.heads.packed_sizes import (
    PACKED_GPU_WORKLOADS,
    PACKED_LSE_SIZES,
    PACKED_SIZES,
    PACKED_WORKLOADS,
    packed_bytes_moved,
    packed_flops,
    packed_inputs,
)
from tilewise.op import Op, declare


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute `attention` of each of several sequences, packed one after the other.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 and the keys
    cu_seqlens_k[b] to cu_seqlens_k[b + 1] - 1, and attends to nothing else. Rows past the last
    sequence are 0, and may hold NaN or infinity. Positions, also those of causality, the window,
    the slopes and the bias, count from the beginning of a sequence. There is no mask: what a mask
    hides is not packed. Dropout draws at row (sequence * heads + head) * max_seqlen_q + position
    and column position of the key. Under autocast q, k and v are cast to its dtype.

    Args:
        q: `[total_q, heads, dim]`, floating point, any strides.
        k: `[total_k, kv_heads, dim]`, dtype of `q`; kv_heads divides heads.
        v: `[total_k, kv_heads, v_dim]`, dtype of `q`.
        cu_seqlens_q: `[batch + 1]`, int32: where the sequences of queries begin, 0 first, and where
            the last one ends.
        cu_seqlens_k: Like `cu_seqlens_q`, of the keys.
        max_seqlen_q: At least the queries of the longest sequence; of a longer one the rest of the
            rows count as past the last.
        max_seqlen_k: At least the keys of the longest sequence, alike.
        bias: `[1 or batch, 1 or heads, max_seqlen_q, max_seqlen_k]`, dtype of `q` or fp32: added to
            the scores, by position in the sequence. Its gradient is 0 beyond the sequences.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        causal: Let query i attend only to keys j <= i + seq_k - seq_q of its sequence.
        window: (left, right) of what a query sees beside its own position; None is no limit.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32, without gradient: what a key loses for
            each position that it is away.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        dropout_p: Probability of dropping a probability, from 0 to 1.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        seed: int64, or a tensor `[]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor `[]`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        check_inputs: Raise where the ends of sequences decrease, do not begin with 0, go past the
            end of q or k, or are further apart than the longest. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Returns:
        `[total_q, heads, v_dim]`, dtype of `q`, its dims in memory in the order of those of `q`.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option.
    """
    out: Tensor = attend_packed(
        VARLEN, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, sinks,
        causal=causal, window=window, alibi_slopes=alibi_slopes, softcap=softcap,
        dropout_p=dropout_p, scale=scale, seed=seed, offset=offset, generator=generator,
        check_inputs=check_inputs, backend=backend, with_lse=False,
    )  # fmt: skip
    return out


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_varlen`, and the logarithm of what its probabilities are divided by.

        lse_i = log(exp(sink) + sum_j exp(s_ij)), with the scores s of `attention_varlen`

    Both have gradients. With nothing to attend to, and past the last sequence, lse is -inf, without
    a gradient.

    Args:
        q: `[total_q, heads, dim]`, floating point, any strides.
        k: `[total_k, kv_heads, dim]`, dtype of `q`; kv_heads divides heads.
        v: `[total_k, kv_heads, v_dim]`, dtype of `q`.
        cu_seqlens_q: `[batch + 1]`, int32: where the sequences of queries begin, and the last ends.
        cu_seqlens_k: Like `cu_seqlens_q`, of the keys.
        max_seqlen_q: At least the queries of the longest sequence.
        max_seqlen_k: At least the keys of the longest sequence.
        bias: `[1 or batch, 1 or heads, max_seqlen_q, max_seqlen_k]`, dtype of `q` or fp32.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        causal: Let query i attend only to keys j <= i + seq_k - seq_q of its sequence.
        window: (left, right) of what a query sees beside its own position; None is no limit.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32, without gradient.
        softcap: Positive bound that the scores approach, before the bias. None is no bound.
        dropout_p: Probability of dropping a probability, from 0 to 1.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        seed: int64, or a tensor `[]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor `[]`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        check_inputs: Raise where the ends of sequences are wrong. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Returns:
        out, `[total_q, heads, v_dim]`, dtype of `q`; and lse, `[heads, total_q]`, fp32 (fp64 for
        fp64).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: As `attention_varlen`.
    """
    both: tuple[Tensor, Tensor] = attend_packed(
        VARLEN_WITH_LSE, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias,
        sinks, causal=causal, window=window, alibi_slopes=alibi_slopes, softcap=softcap,
        dropout_p=dropout_p, scale=scale, seed=seed, offset=offset, generator=generator,
        check_inputs=check_inputs, backend=backend, with_lse=True,
    )  # fmt: skip
    return both


def attention_varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The formula of `attention_varlen`, in plain PyTorch."""
    return packed_reference_of(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, sinks, **options)[0]


# The functions with their tensors first, as a declaration has them.


def _tensors_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    longest = options.pop("max_seqlen_q"), options.pop("max_seqlen_k")
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, bias, sinks, **options)


def _tensors_first_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    longest = options.pop("max_seqlen_q"), options.pop("max_seqlen_k")
    return attention_varlen_with_lse(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, bias, sinks, **options
    )


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    """PyTorch's own, one sequence after the other; causal is the same for as many keys as queries.

    No sequence is longer than the longest that is said, and there are no rows past the last.
    """
    assert bias is None and sinks is None
    sequences = zip(
        *(
            t.transpose(0, 1)[None].split(cu_seqlens.diff().tolist(), 2)
            for t, cu_seqlens in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        ),
        strict=True,
    )
    outs = [
        torch.nn.functional.scaled_dot_product_attention(
            own_q, own_k, own_v, is_causal=causal, enable_gqa=True
        )
        for own_q, own_k, own_v in sequences
    ]
    return torch.cat(outs, 2)[0].transpose(0, 1)


VARLEN = declare(
    Op(
        name="attention_varlen",
        call=_tensors_first,
        reference=attention_varlen_reference,
        backends=PACKED_BACKENDS,
        inputs=packed_inputs,
        sizes=PACKED_SIZES,
        workloads=PACKED_WORKLOADS,
        gpu_workloads=PACKED_GPU_WORKLOADS,
        bytes_moved=packed_bytes_moved,
        flops=packed_flops,
        native=_native,
    )
)
VARLEN_WITH_LSE = declare(
    Op(
        name="attention_varlen_with_lse",
        call=_tensors_first_with_lse,
        reference=packed_reference_of,
        backends=PACKED_BACKENDS,
        inputs=packed_inputs,
        sizes=PACKED_LSE_SIZES,
        workloads=PACKED_WORKLOADS[:1],
        bytes_moved=packed_bytes_moved,
        flops=packed_flops,
    )
)

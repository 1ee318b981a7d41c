"""Attention of new tokens to a cache (paged as in Kwon et al., 2023,
https://arxiv.org/abs/2309.06180; split over its keys as in Flash-Decoding, Dao et al., 2023), and
what appends to that cache."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.heads.cache import decoded
from tilewise.heads.cache_launch import CACHE_BACKENDS, append_, decode
from tilewise.heads.cache_sizes import (
    APPEND_SIZES,
    APPEND_WORKLOADS,
    CACHE_GPU_WORKLOADS,
    CACHE_LSE_SIZES,
    CACHE_SIZES,
    CACHE_WORKLOADS,
    append_bytes_moved,
    append_inputs,
    cache_bytes_moved,
    cache_flops,
    cache_inputs,
)
from tilewise.heads.formula import Window
from tilewise.op import Op, declare
from tilewise.plan import planned


@planned
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute `attention` of the last tokens of each sequence to all that is in its cache.

    Causal: token i of the q_len new ones, which are in the cache already, is at position
    seq_lens - q_len + i and sees what is there and before. What lies past seq_lens, in pages that
    a sequence does not have, or at a page that the cache does not have, is not there, and may hold
    NaN or infinity. Which keys are summed together depends on their positions alone: not on the
    rest of the batch, on the room of the cache or on its pages. There is no gradient, bias, mask
    or dropout. Under autocast q is cast to its dtype.

    Args:
        q: `[batch, heads, q_len, dim]`, floating point, any strides; q_len is 1 to 16.
        k_cache: `[batch, kv_heads, capacity, dim]`, or with `block_table`
            `[pages, page_size, kv_heads, dim]`; dtype of `q`, any strides, but copied unless its
            rows lie in one piece; kv_heads divides heads.
        v_cache: Like `k_cache`, with rows of v_dim.
        seq_lens: `[batch]`, int32: the tokens of each sequence, the new ones among them.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        block_table: `[batch, max_pages]`, int32: in which page of the caches are the tokens
            i * page_size and on of a sequence; -1 where there are none.
        window: (left, right): let a token see only that many before it. None is no limit.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32: what a key loses for each position that
            it is away.
        softcap: Positive bound that the scores approach. None is no bound.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        check_inputs: Raise where a sequence is longer than its cache or has a page that the cache
            does not have. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Returns:
        `[batch, heads, q_len, v_dim]`, dtype of `q`, its dims in memory in the order of those of
        `q`. 0 where there is nothing to attend to.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape, range or stride is wrong, a tensor requires a gradient, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option.
    """
    return decode(
        DECODE, q, k_cache, v_cache, seq_lens, sinks, block_table=block_table, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, scale=scale, check_inputs=check_inputs,
        backend=backend,
    )[0]  # fmt: skip


@planned
def attention_decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_decode`, and the logarithm of what its probabilities are divided by.

        lse_i = log(exp(sink) + sum_j exp(s_ij)), with the scores s of `attention`

    With nothing to attend to it is -inf. By lse, `merge_attention` puts together what a token sees
    in several caches.

    Args:
        q: `[batch, heads, q_len, dim]`, floating point, any strides; q_len is 1 to 16.
        k_cache: `[batch, kv_heads, capacity, dim]`, or with `block_table`
            `[pages, page_size, kv_heads, dim]`; dtype of `q`.
        v_cache: Like `k_cache`, with rows of v_dim.
        seq_lens: `[batch]`, int32: the tokens of each sequence, the new ones among them.
        sinks: `[heads]`, dtype of `q` or fp32: the score of a key without a value.
        block_table: `[batch, max_pages]`, int32: the pages of each sequence, -1 for none.
        window: (left, right): let a token see only that many before it. None is no limit.
        alibi_slopes: `[heads]` or `[batch, heads]`, fp32.
        softcap: Positive bound that the scores approach. None is no bound.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        check_inputs: Raise where a sequence has no such room or page. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Returns:
        out, `[batch, heads, q_len, v_dim]`, dtype of `q`; and lse, `[batch, heads, q_len]`, fp32
        (fp64 for fp64).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: As `attention_decode`.
    """
    return decode(
        DECODE_WITH_LSE, q, k_cache, v_cache, seq_lens, sinks, block_table=block_table,
        window=window, alibi_slopes=alibi_slopes, softcap=softcap, scale=scale,
        check_inputs=check_inputs, backend=backend,
    )  # fmt: skip


@planned
def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens_before: Tensor,
    *,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    check_inputs: bool = False,
    backend: str | None = None,
) -> None:
    """Write new keys and values into the caches, behind those that are there.

    Token i goes to position seq_lens_before + i, its key first turned by the angles of that
    position as in `rotary`, if tables are given. Positions for which there is no room or no page
    are not written; where the tables end before, the rotated dims are NaN. The caches of two
    sequences must not share what is written.

    Args:
        k_cache: `[batch, kv_heads, capacity, dim]`, or with `block_table`
            `[pages, page_size, kv_heads, dim]`; floating point, rows in one piece. Written to.
        v_cache: Like `k_cache`, with rows of v_dim. Written to.
        k: `[batch, kv_heads, new, dim]`, dtype of `k_cache`, any strides.
        v: `[batch, kv_heads, new, v_dim]`, alike.
        seq_lens_before: `[batch]`, int32: the tokens of each sequence before these.
        block_table: `[batch, max_pages]`, int32: the pages of each sequence, -1 for none.
        cos: `[positions, rotary_dim / 2]`, rotary_dim <= dim; fp32, or the dtype of `k`.
        sin: Like `cos`. `rotary_tables` makes both.
        interleaved: Whether the dims of a pair are neighbours.
        check_inputs: Raise where there is no room or no page. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape, range or stride is wrong, only one table is given, a tensor requires
            a gradient, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    append_(
        APPEND, k_cache, v_cache, k, v, seq_lens_before, block_table=block_table, cos=cos, sin=sin,
        interleaved=interleaved, check_inputs=check_inputs, backend=backend,
    )  # fmt: skip


def attention_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The formula of `attention_decode`, in plain PyTorch."""
    return decoded(q, k_cache, v_cache, seq_lens, sinks, **options)[0]


def _appended(
    k: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens_before: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Copies of the caches, to which `append_kv_` has appended."""
    caches = k_cache.clone(), v_cache.clone()
    append_kv_(*caches, k, v, seq_lens_before, cos=cos, sin=sin, **options)
    return caches


def _native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """PyTorch's own, of one new token and caches that are full: `seq_lens` are their capacity."""
    assert sinks is None and q.shape[2] == 1
    return torch.nn.functional.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)


_CONSTANTS = frozenset(range(5))  # none has a gradient

DECODE = declare(
    Op(
        name="attention_decode",
        call=attention_decode,
        reference=attention_decode_reference,
        backends=CACHE_BACKENDS,
        inputs=cache_inputs,
        sizes=CACHE_SIZES,
        workloads=CACHE_WORKLOADS,
        gpu_workloads=CACHE_GPU_WORKLOADS,
        bytes_moved=cache_bytes_moved,
        flops=cache_flops,
        native=_native,
        constants=_CONSTANTS,
    )
)
DECODE_WITH_LSE = declare(
    Op(
        name="attention_decode_with_lse",
        call=attention_decode_with_lse,
        reference=decoded,
        backends=CACHE_BACKENDS,
        inputs=cache_inputs,
        sizes=CACHE_LSE_SIZES,
        workloads=CACHE_WORKLOADS[:1],
        bytes_moved=cache_bytes_moved,
        flops=cache_flops,
        constants=_CONSTANTS,
    )
)
APPEND = declare(
    Op(
        name="append_kv_",
        call=_appended,
        reference=partial(_appended, backend="reference"),
        backends=CACHE_BACKENDS,
        inputs=append_inputs,
        sizes=APPEND_SIZES,
        workloads=APPEND_WORKLOADS,
        bytes_moved=append_bytes_moved,
        constants=frozenset(range(7)),
    )
)

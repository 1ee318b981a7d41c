"""Attention of others: PyTorch's cuDNN, FlexAttention and packed one, FlashAttention, FlashInfer.

What is made once for a size, a mask of blocks or a plan, is kept, so that no time counts it.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tilewise.heads.formula import Window, limits, scale_of
from tilewise.libraries.adapters import Adapters, without
from tilewise.op import OPS

# --- PyTorch's.


def _cudnn(backends: Any, *tensors: Tensor | None, op: str, **options: Any) -> Any:
    native = OPS[op].native
    assert native is not None
    with backends.sdpa_kernel(backends.SDPBackend.CUDNN_ATTENTION):
        return native(*tensors, **options)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as torch.compile has it, for each size by itself."""
    return torch.compile(function, dynamic=False)


def _flex(
    flex: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sinks: None = None, *,
    causal: bool = False, window: Window | None = None, alibi_slopes: Tensor | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(sinks=sinks)
    seq_q, seq_k, seen = q.shape[2], k.shape[2], limits(causal, window)
    blocks = None
    if seen != (-1, -1):
        blocks = _band(flex.create_block_mask, seq_q, seq_k, *seen, str(q.device))
    return compiled(flex.flex_attention)(
        q, k, v, score_mod=_score_mod(bias, alibi_slopes, softcap, seq_k - seq_q),
        block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _score_mod(
    bias: Tensor | None, alibi_slopes: Tensor | None, softcap: float | None, shift: int
) -> Callable[..., Tensor] | None:
    """What becomes of a scaled score, in the order of `attention`; None where nothing does."""
    if bias is None and alibi_slopes is None and not softcap:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            places = zip((b, h, i, j), bias.shape, strict=True)
            score = score + bias[tuple(place if size > 1 else 0 for place, size in places)]
        if alibi_slopes is not None:
            slope = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[b, h]
            score = score - slope * (i + shift - j).abs()
        return score

    return modified


def _within(left: int, right: int, own: Tensor, j: Tensor) -> Tensor:
    """Whether a query in the place `own` sees key j; one of both limits is there."""
    if left < 0:
        return j <= own + right
    near = j >= own - left
    return near if right < 0 else near & (j <= own + right)


@lru_cache(maxsize=4)
def _band(
    create_block_mask: Any, seq_q: int, seq_k: int, left: int, right: int, device: str
) -> Any:
    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _within(left, right, i + (seq_k - seq_q), j)

    return create_block_mask(seen, None, None, seq_q, seq_k, device=device)


def _flex_packed(
    flex: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    bias: None = None, sinks: None = None, *, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = False, window: Window | None = None, softcap: float | None = None,
    scale: float | None = None,
) -> Any:  # fmt: skip
    without(bias=bias, sinks=sinks)
    blocks = _documents(
        flex.create_block_mask, cu_seqlens_q, cu_seqlens_k, len(q), len(k), *limits(causal, window)
    )
    heads = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = compiled(flex.flex_attention)(
        *heads, score_mod=_score_mod(None, None, softcap, 0), block_mask=blocks, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


@lru_cache(maxsize=2)
def _documents(
    create_block_mask: Any, ends_q: Tensor, ends_k: Tensor, total_q: int, total_k: int, left: int,
    right: int,
) -> Any:  # fmt: skip
    (of_query, place_q), (of_key, place_k) = (
        _places(ends, total) for ends, total in ((ends_q, total_q), (ends_k, total_k))
    )
    longer = torch.cat([ends_k.diff() - ends_q.diff(), ends_q.new_zeros(1)])  # and past the last
    own = place_q + longer[of_query]
    inside = of_query < len(ends_q) - 1

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = inside[i] & (of_query[i] == of_key[j])
        if left < 0 and right < 0:
            return same
        return same & _within(left, right, own[i], place_k[j])

    return create_block_mask(seen, None, None, total_q, total_k, device=str(ends_q.device))


def _places(ends: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each row the sequence, and its place there."""
    rows = torch.arange(total, device=ends.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, rows, right=True) - 1
    return sequence, rows - ends[sequence]


def _varlen(
    varlen: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    bias: None = None, sinks: None = None, *, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = False, window: Window | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(bias=bias, sinks=sinks)
    # Not said where it is the rule: the older a PyTorch, the less it can be told.
    options: dict[str, Any] = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    options |= {} if scale is None else {"scale": scale}
    return varlen.varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        window_size=limits(causal, window), **options,
    )  # fmt: skip


def _recipe(
    plain: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, sinks: None = None,
    *, scale: float | None = None,
) -> Any:  # fmt: skip
    """The best that plain PyTorch does for a token and caches that are full: heads of a group are
    the rows of one product."""
    without(sinks=sinks)
    _check_one_token(q)
    rows = (scale_of(q, scale) * q).reshape(len(q), k_cache.shape[1], -1, q.shape[3])
    out = plain.softmax(rows @ k_cache.mT, -1) @ v_cache
    return out.reshape(*q.shape[:3], v_cache.shape[3])


def _check_one_token(q: Tensor) -> None:
    if q.shape[2] != 1:
        raise TypeError(f"has a single new token, got {q.shape[2]}")


# --- FlashAttention, whose heads lie behind the positions.


def _flash_options(
    causal: bool,
    window: Window | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> dict[str, Any]:
    """What both versions have; slopes are said only where there are some, for 3 has none."""
    slopes = {} if alibi_slopes is None else {"alibi_slopes": alibi_slopes}
    options = {"softmax_scale": scale, "causal": causal, "softcap": softcap or 0.0}
    return options | {"window_size": limits(causal, window)} | slopes


def _only_out(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result  # some versions give lse too


def _flash(
    flash: Any, q: Tensor, k: Tensor, v: Tensor, bias: None = None, sinks: None = None, *,
    causal: bool = False, window: Window | None = None, alibi_slopes: Tensor | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(bias=bias, sinks=sinks)
    options = _flash_options(causal, window, alibi_slopes, softcap, scale)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return _only_out(flash.flash_attn_func(*heads, **options)).transpose(1, 2)


def _flash_packed(
    flash: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    bias: None = None, sinks: None = None, *, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = False, window: Window | None = None, alibi_slopes: Tensor | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(bias=bias, sinks=sinks)
    options = _flash_options(causal, window, alibi_slopes, softcap, scale)
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _only_out(flash.flash_attn_varlen_func(q, k, v, *ends, **options))


def _flash_decode(
    flash: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, sinks: None = None,
    *, table: str, block_table: Tensor | None = None, window: Window | None = None,
    alibi_slopes: Tensor | None = None, softcap: float | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(sinks=sinks)
    options = _flash_options(True, window, alibi_slopes, softcap, scale)
    if block_table is None:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    else:
        options[table] = block_table
    out = flash.flash_attn_with_kvcache(
        q.transpose(1, 2), k_cache, v_cache, cache_seqlens=seq_lens, **options
    )
    return _only_out(out).transpose(1, 2)


# --- FlashInfer.

_WORKSPACE = 128 << 20  # bytes, what its manual asks for
_WIDE = 4  # heads of a group, from which on the tensor cores are worth it


def _flashinfer_decode(
    flashinfer: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
    sinks: None = None, *, block_table: Tensor | None = None, window: Window | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    without(sinks=sinks)
    _check_one_token(q)
    kv_heads = k_cache.shape[1 if block_table is None else 2]
    rules = (limits(True, window)[0], softcap, scale_of(q, scale))
    if block_table is None and len(q) == 1:
        named = dict(zip(("window_left", "logits_soft_cap", "sm_scale"), rules, strict=True))
        there = _length(seq_lens)
        out = flashinfer.single_decode_with_kv_cache(
            q[0, :, 0], k_cache[0, :, :there], v_cache[0, :, :there], kv_layout="HND",
            use_tensor_cores=q.shape[1] // kv_heads >= _WIDE, **named,
        )  # fmt: skip
        return out[None, :, None]
    wrapper = _planned(
        flashinfer.BatchDecodeWithPagedKVCacheWrapper, seq_lens, block_table, q.shape[1], kv_heads,
        q.shape[3], k_cache.shape[2 if block_table is None else 1], q.dtype, *rules,
    )  # fmt: skip
    return wrapper.run(q[:, :, 0], (k_cache, v_cache))[:, :, None]


@lru_cache(maxsize=2)
def _length(seq_lens: Tensor) -> int:
    return int(seq_lens[0])


@lru_cache(maxsize=2)
def _planned(
    wrapper: Any, seq_lens: Tensor, block_table: Tensor | None, heads: int, kv_heads: int,
    dim: int, page_size: int, dtype: torch.dtype, left: int, softcap: float | None, scale: float,
) -> Any:  # fmt: skip
    """Its plan for these sequences. Caches in one piece are as many pages, a sequence in each."""
    table, layout = block_table, "NHD"
    if table is None:
        table, layout = torch.arange(len(seq_lens), device=seq_lens.device).int()[:, None], "HND"
    pages = (seq_lens + page_size - 1) // page_size
    indptr = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
    used = torch.arange(table.shape[1], device=table.device) < pages[:, None]
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=seq_lens.device)
    made = wrapper(workspace, layout, use_tensor_cores=heads // kv_heads >= _WIDE)
    made.plan(
        indptr, table[used], (seq_lens - 1) % page_size + 1, heads, kv_heads, dim, page_size,
        window_left=left, logits_soft_cap=softcap, sm_scale=scale, q_data_type=dtype,
    )  # fmt: skip
    return made


_TORCH = "torch.nn.attention"
ADAPTERS: Adapters = {
    "attention": {
        "cudnn": (_TORCH, partial(_cudnn, op="attention")),
        "flex": (f"{_TORCH}.flex_attention", _flex),
        "flash": ("flash_attn", _flash),
        "flash3": ("flash_attn_interface", _flash),
    },
    "attention_varlen": {
        "flex": (f"{_TORCH}.flex_attention", _flex_packed),
        "varlen": (f"{_TORCH}.varlen", _varlen),
        "flash": ("flash_attn", _flash_packed),
        "flash3": ("flash_attn_interface", _flash_packed),
    },
    "attention_decode": {
        "cudnn": (_TORCH, partial(_cudnn, op="attention_decode")),
        "flash": ("flash_attn", partial(_flash_decode, table="block_table")),
        "flash3": ("flash_attn_interface", partial(_flash_decode, table="page_table")),
        "flashinfer": ("flashinfer", _flashinfer_decode),
        "recipe": ("torch", _recipe),
    },
}

"""Formulas of our own in the place of others' attention: by their names, layouts and arguments."""

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense(q, k, v, scale, seen, softcap=0.0, slopes=None):
    """Heads first, `[batch, heads, seq, dim]`; 0 where nothing is seen."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if slopes is not None:
        slopes = slopes if slopes.ndim == 2 else slopes[None]
        s = s - slopes[..., None, None] * distance(q, k).abs()
    s = s.masked_fill(~seen, float("-inf"))
    nothing = ~seen.any(-1, keepdim=True)
    return s.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0) @ v


def distance(q, k):
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    return torch.arange(seq_k) - torch.arange(seq_k - seq_q, seq_k)[:, None]


def banded(q, k, causal, window_size):
    left, right = window_size
    right = 0 if causal else right
    away = distance(q, k)
    return ((away >= -left) | (left < 0)) & ((away <= right) | (right < 0))


# --- PyTorch's.


CUDNN = SimpleNamespace(
    sdpa_kernel=sdpa_kernel, SDPBackend=SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH)
)


def create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device="cuda"):
    assert B is None and H is None
    return SimpleNamespace(mask_mod=mask_mod, lengths=(Q_LEN, KV_LEN))


def flex_attention(
    query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False
):
    """Unlike PyTorch's it has a gradient on a CPU."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    s = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    places = torch.meshgrid(*map(torch.arange, s.shape), indexing="ij")
    s = s if score_mod is None else score_mod(s, *places)
    if block_mask is None:
        return s.softmax(-1) @ value
    assert block_mask.lengths == s.shape[2:]
    seen = block_mask.mask_mod(*places)
    nothing = ~seen.any(-1, keepdim=True)
    s = s.masked_fill(~seen, float("-inf")).masked_fill(nothing, 0.0)
    return s.softmax(-1).masked_fill(nothing, 0.0) @ value


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    ends = (cu_seq_q, cu_seq_k, max_q, max_k)
    return packed(query, key, value, *ends, scale, False, window_size)


FLEX = SimpleNamespace(flex_attention=flex_attention, create_block_mask=create_block_mask)
VARLEN = SimpleNamespace(varlen_attn=varlen_attn)


# --- FlashAttention's.


def positions_first(q, k, v, scale, causal, window_size, softcap=0.0, slopes=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = banded(q, k, causal, window_size)
    return dense(q, k, v, scale, seen, softcap, slopes).transpose(1, 2)


def packed(q, k, v, ends_q, ends_k, max_q, max_k, scale, causal, window_size, *rest):
    outs = []
    ends = zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True)
    for i, ((begin_q, end_q), (begin_k, end_k)) in enumerate(ends):
        assert end_q - begin_q <= max_q and end_k - begin_k <= max_k
        own = q[begin_q:end_q], k[begin_k:end_k], v[begin_k:end_k]
        softcap, slopes = rest or (0.0, None)
        slopes = slopes if slopes is None or slopes.ndim == 1 else slopes[i]
        own = (t[None] for t in own)
        outs.append(positions_first(*own, scale, causal, window_size, softcap, slopes)[0])
    return torch.cat(outs)


def cached(q, k_cache, v_cache, lengths, table, scale, causal, window_size, softcap, slopes=None):
    """Each sequence by itself, of a cache `[batch or pages, positions, heads, dim]`."""
    outs = []
    for i, length in enumerate(lengths.tolist()):
        pages = [i] if table is None else [page for page in table[i].tolist() if page >= 0]
        k, v = (t[pages].flatten(0, 1)[None, :length] for t in (k_cache, v_cache))
        own = slopes if slopes is None or slopes.ndim == 1 else slopes[i]
        outs.append(positions_first(q[i : i + 1], k, v, scale, causal, window_size, softcap, own))
    return torch.cat(outs)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return positions_first(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rules = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    return packed(q, k, v, *ends, *rules)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    rules = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    return cached(q, k_cache, v_cache, cache_seqlens, block_table, *rules)


def flash3_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
):  # fmt: skip
    out = positions_first(q, k, v, softmax_scale, causal, window_size, softcap)
    return out, out.detach()[..., 0]  # as the first versions, which gave lse as well


def flash3_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
):  # fmt: skip
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return packed(q, k, v, *ends, softmax_scale, causal, window_size, softcap, None)


def flash3_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0,
):  # fmt: skip
    rules = (softmax_scale, causal, window_size, softcap)
    return cached(q, k_cache, v_cache, cache_seqlens, page_table, *rules)


FLASH = SimpleNamespace(
    flash_attn_func=flash_attn_func,
    flash_attn_varlen_func=flash_attn_varlen_func,
    flash_attn_with_kvcache=flash_attn_with_kvcache,
)
FLASH3 = SimpleNamespace(
    flash_attn_func=flash3_attn_func,
    flash_attn_varlen_func=flash3_attn_varlen_func,
    flash_attn_with_kvcache=flash3_attn_with_kvcache,
)


# --- FlashInfer's.


def single_decode_with_kv_cache(
    q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False, q_scale=None,
    k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None,
):  # fmt: skip
    k, v = (t if kv_layout == "HND" else t.transpose(0, 1) for t in (k, v))
    q, k, v = q[None, :, None], k[None], v[None]
    seen = banded(q, k, True, (window_left, 0))
    return dense(q, k, v, sm_scale, seen, logits_soft_cap or 0.0)[0, :, 0]


class BatchDecodeWithPagedKVCacheWrapper:
    plans = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False,
                 use_tensor_cores=False):  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8
        self.kv_layout = kv_layout

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
        kv_data_type=None, data_type=None, sm_scale=None,
    ):  # fmt: skip
        BatchDecodeWithPagedKVCacheWrapper.plans += 1
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        assert len(indptr) == len(last_page_len) + 1 and indptr[-1] == len(indices)
        assert last_page_len.min() >= 1 and last_page_len.max() <= page_size
        self.planned = indptr, indices, last_page_len
        self.sizes = num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type
        self.rules = {"window_left": window_left, "logits_soft_cap": logits_soft_cap,
                      "sm_scale": sm_scale}  # fmt: skip

    def run(self, q, paged_kv_cache):
        heads_behind = self.kv_layout == "NHD"
        k, v = (t if heads_behind else t.transpose(1, 2) for t in paged_kv_cache)
        sizes = (q.shape[1], k.shape[2], q.shape[2], k.shape[1], q.dtype)
        assert sizes == self.sizes
        indptr, indices, last = (t.tolist() for t in self.planned)
        outs = []
        for i, (begin, end) in enumerate(pairwise(indptr)):
            length = (end - begin - 1) * k.shape[1] + last[i]
            own = (t[indices[begin:end]].flatten(0, 1)[:length] for t in (k, v))
            outs.append(single_decode_with_kv_cache(q[i], *own, **self.rules))
        return torch.stack(outs)


FLASHINFER = SimpleNamespace(
    single_decode_with_kv_cache=single_decode_with_kv_cache,
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
)
STAND_INS = {
    "cudnn": CUDNN,
    "flex": FLEX,
    "varlen": VARLEN,
    "flash": FLASH,
    "flash3": FLASH3,
    "flashinfer": FLASHINFER,
    "recipe": torch,
}

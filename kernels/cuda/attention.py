"""Attention in CUDA C++ by the tensor cores of every GPU since Ampere, in fp16 and bf16."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._shared import DTYPES, address, broadcast_strides, draw, stream


def _laid_out(x: Tensor, cols: int) -> Tensor:
    """An empty [..., cols] whose other dims lie in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def _rows(*tensors: Tensor) -> tuple[int, ...]:
    """Of each its first three strides, 0 along a dim of 1, where any will do."""
    return tuple(stride for t in tensors for stride in broadcast_strides(t)[:3])


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, heads, seq_q, dim = q.shape
    _, kv_heads, seq_k, v_dim = v.shape
    return batch, heads, kv_heads, seq_q, seq_k, dim, v_dim


def _options(
    q: Tensor, mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, left: int, right: int, softcap: float, scale: float, dropout_p: float,
    seeds: Tensor | None, offsets: Tensor | None, seed: int, offset: int,
) -> tuple[int | float, ...]:  # fmt: skip
    """What follows the strides of q, k and v, up to the stream."""
    slopes = (0, 0) if alibi_slopes is None else alibi_slopes.stride()
    return (
        *broadcast_strides(mask), *broadcast_strides(bias), *slopes, left, right, softcap, scale,
        *draw(dropout_p, seeds, offsets, seed, offset), DTYPES[q.dtype],
        *(DTYPES[(q if t is None else t).dtype] for t in (bias, sinks)), stream(q),
    )  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, left: int, right: int, softcap: float,
    scale: float, dropout_p: float, seeds: Tensor | None, offsets: Tensor | None, seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [batch, heads, seq_q, dim], k, v [batch, kv_heads, seq_k, dim or v_dim], mask and bias
    broadcastable, alibi_slopes [batch, heads], sinks [heads]
    -> out [batch, heads, seq_q, v_dim] laid out as q; highest, total [batch, heads, seq_q]."""
    out = _laid_out(q, v.shape[-1])
    highest = q.new_empty(q.shape[:3], dtype=torch.float32)
    total = torch.empty_like(highest)
    tensors = out, highest, total, q, k, v, mask, bias, alibi_slopes, sinks
    _cuda.attention_forward(
        *map(address, tensors), *_sizes(q, v), *_rows(out, q, k, v),
        *_options(
            q, mask, bias, alibi_slopes, sinks, left, right, softcap, scale, dropout_p, seeds,
            offsets, seed, offset,
        ),
    )  # fmt: skip
    return out, highest, total

"""Caches of keys and values, in one piece or in pages: formula and refusals."""

from typing import Any

import torch
from torch import Tensor

from tilewise.heads.checks import check_options
from tilewise.heads.formula import Window, attended, limits, scale_of
from tilewise.op import needs_gradient
from tilewise.rotation import angles, check_tables, rotated

LONGEST = 16  # new tokens of a sequence

# --- The formula.


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """How many tokens of a sequence a cache has room for."""
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[1]


def _whole(cache: Tensor, block_table: Tensor | None, there: Tensor) -> Tensor:
    """`[batch, heads, capacity, dim]`, zeros where there is nothing, whatever lies there."""
    if block_table is not None:
        known = _known(block_table, len(cache))
        pages = cache[block_table.where(known, 0).long()]  # [batch, max_pages, page_size, ...]
        cache = pages.flatten(1, 2).transpose(1, 2)
    return torch.where(there[:, None, :, None], cache, 0)


def _known(block_table: Tensor, pages: int) -> Tensor:
    return (block_table >= 0) & (block_table < pages)


def decoded(
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
) -> tuple[Tensor, Tensor]:
    """out and lse: the whole caches, of which nothing is seen past `seq_lens`."""
    capacity, seq_q = capacity_of(k_cache, block_table), q.shape[2]
    lengths = seq_lens.long().clamp(0, capacity)
    there = torch.arange(capacity, device=q.device) < lengths[:, None]
    if block_table is not None:
        known = _known(block_table, len(k_cache))
        there = there & known.repeat_interleave(k_cache.shape[1], 1)
    k, v = (_whole(t, block_table, there) for t in (k_cache, v_cache))
    own = torch.arange(seq_q, device=q.device) + (lengths - seq_q)[:, None, None]
    return attended(
        q, k, v, there[:, None, None], None, alibi_slopes, sinks, *limits(True, window),
        softcap or 0.0, scale_of(q, scale), 0.0, 0, 0, own,
    )  # fmt: skip


def append_reference_(
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
) -> None:
    """The formula of `append_kv_`, in plain PyTorch."""
    new = torch.arange(k.shape[2], device=k.device)
    positions = seq_lens_before.long()[:, None] + new
    if cos is not None and sin is not None:
        turns = angles(cos, sin, k.shape[2], positions, 0, None)
        k = rotated(k, *turns, interleaved).to(k.dtype)
    there = (positions >= 0) & (positions < capacity_of(k_cache, block_table))
    batch = torch.arange(len(k), device=k.device)[:, None].expand_as(positions)
    if block_table is None:
        into, at = k_cache.transpose(1, 2), (batch, positions)
        values = v_cache.transpose(1, 2)
    else:
        into, values, page_size = k_cache, v_cache, k_cache.shape[1]
        positions = positions.where(there, 0)
        pages = block_table.long().gather(1, positions // page_size)
        there = there & _known(pages, len(k_cache))
        at = (pages, positions % page_size)
    places = tuple(i[there] for i in at)
    into[places] = k.transpose(1, 2)[there]
    values[places] = v.transpose(1, 2)[there]


# --- What is refused.


def check_caches(
    op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, name: str
) -> None:
    """Refuse what are no caches for the heads `q`, which the caller calls `name`."""
    if not q.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {q.dtype}")
    if q.ndim != 4:
        raise ValueError(f"{op}: {name} must be [batch, heads, seq, dim], got {list(q.shape)}")
    for which, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {which} must be {q.dtype} like {name}, got {t.dtype}")
        if t.ndim != 4:
            layout = "[pages, page_size, kv_heads, dim]"
            if block_table is None:
                layout = "[batch, kv_heads, capacity, dim]"
            raise ValueError(f"{op}: {which} must be {layout}, got {list(t.shape)}")
        if t.device != q.device:
            raise RuntimeError(f"{op}: {which} must be on {q.device}, got {t.device}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        sizes = ", ".join(map(str, k_cache.shape[:3]))
        raise ValueError(
            f"{op}: v_cache must be [{sizes}, v_dim] beside this k_cache, got {list(v_cache.shape)}"
        )
    batch = q.shape[0]
    if block_table is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"{op}: k_cache must be [{batch}, kv_heads, capacity, dim] for this {name}, "
            f"got {list(k_cache.shape)}"
        )
    if block_table is None:
        return
    if block_table.dtype != torch.int32:
        raise TypeError(f"{op}: block_table must be torch.int32, got {block_table.dtype}")
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"{op}: block_table must be [{batch}, max_pages], got {list(block_table.shape)}"
        )
    if block_table.device != q.device:
        raise RuntimeError(f"{op}: block_table must be on {q.device}, got {block_table.device}")


def check_lengths(op: str, name: str, lengths: Tensor, q: Tensor) -> None:
    """Refuse what are no numbers of tokens, one for each sequence."""
    if lengths.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be torch.int32, got {lengths.dtype}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"{op}: {name} must be [{q.shape[0]}], got {list(lengths.shape)}")
    if lengths.device != q.device:
        raise RuntimeError(f"{op}: {name} must be on {q.device}, got {lengths.device}")


def check_decode(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    block_table: Tensor | None,
    check_inputs: bool,
    **options: Any,
) -> None:
    """Refuse what is wrong with the arguments of decoding."""
    check_caches(op, q, k_cache, v_cache, block_table, "q")
    if not 1 <= q.shape[2] <= LONGEST:
        raise ValueError(f"{op}: q must have 1 to {LONGEST} tokens, got {q.shape[2]}")
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k_cache must have rows of {q.shape[3]} like q, got {k_cache.shape[3]}"
        )
    heads, kv_heads = q.shape[1], k_cache.shape[1 if block_table is None else 2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: heads of q must be a multiple of those of the caches, "
            f"got {heads} and {kv_heads}"
        )
    check_lengths(op, "seq_lens", seq_lens, q)
    check_options(
        op, q, q, None, sinks, mask=None, dropout_p=0.0, seed=None, offset=None, **options
    )
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("sinks", sinks)):
        if needs_gradient(t):
            raise ValueError(f"{op}: {name} must be without gradient, got requires_grad=True")
    if check_inputs:
        check_room(op, "seq_lens", seq_lens, 0, k_cache, block_table)


def check_room(
    op: str,
    name: str,
    lengths: Tensor,
    new: int,
    k_cache: Tensor,
    block_table: Tensor | None,
) -> None:
    """Refuse by the numbers themselves, which waits for the device: each sequence must have room
    for its `lengths` and `new` tokens, in pages that there are."""
    capacity = capacity_of(k_cache, block_table)
    for i, length in enumerate((lengths + 0).tolist()):
        if not 0 <= length <= capacity - new:
            raise ValueError(
                f"{op}: {name} must be from 0 to {capacity - new}, got {length} at {i}"
            )
        if block_table is None:
            continue
        used = block_table[i, : -(-(length + new) // k_cache.shape[1])].tolist()
        for page in used:
            if not 0 <= page < len(k_cache):
                raise ValueError(
                    f"{op}: block_table must name pages from 0 to {len(k_cache) - 1}, "
                    f"got {page} for sequence {i}"
                )


def check_append(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens_before: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    check_inputs: bool,
) -> None:
    """Refuse what is wrong with the arguments of appending."""
    check_caches(op, k, k_cache, v_cache, block_table, "k")
    if v.dtype != k.dtype:
        raise TypeError(f"{op}: v must be {k.dtype} like k, got {v.dtype}")
    kv_heads = k_cache.shape[1 if block_table is None else 2]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        twice = any(n > 1 and s == 0 for n, s in zip(cache.shape, cache.stride(), strict=True))
        if twice or (cache.shape[3] > 1 and cache.stride(3) != 1):
            raise ValueError(
                f"{op}: {name} must have rows in one piece and no element twice, "
                f"got {list(cache.shape)} with strides {list(cache.stride())}"
            )
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = [k.shape[0], kv_heads, k.shape[2], cache.shape[3]]
        if list(t.shape) != wanted:
            raise ValueError(f"{op}: {name} must be {wanted}, got {list(t.shape)}")
        if t.device != k_cache.device:
            raise RuntimeError(f"{op}: {name} must be on {k_cache.device}, got {t.device}")
    check_lengths(op, "seq_lens_before", seq_lens_before, k)
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin must be given together, got one")
    if cos is not None and sin is not None:
        check_tables(op, k, cos, sin)
        for name, t in (("cos", cos), ("sin", sin)):
            if t.device != k.device:
                raise RuntimeError(f"{op}: {name} must be on {k.device}, got {t.device}")
    given = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cos": cos, "sin": sin}
    for name, x in given.items():
        if needs_gradient(x):
            raise ValueError(f"{op}: {name} must be without gradient, got requires_grad=True")
    if check_inputs:
        check_room(op, "seq_lens_before", seq_lens_before, k.shape[2], k_cache, block_table)

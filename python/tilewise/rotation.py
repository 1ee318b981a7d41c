"""Turning heads by their positions, in plain PyTorch: tables, positions, and what is refused."""

import math
from typing import Any

import torch
from torch import Tensor

from tilewise.op import Inputs, wide_dtype


def check_rotation(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse what is wrong with the arguments of the op named `op`."""
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must be floating point, got {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must be {q.dtype}, got {k.dtype}")
    packed = cu_seqlens is not None
    same = slice(0, None, 2) if q.ndim == 3 else slice(0, None, 1)
    if packed and (q.ndim != 3 or k.ndim != 3 or q.shape[same] != k.shape[same]):
        raise ValueError(
            f"{op}: with cu_seqlens q must be [total, heads, dim] and k [total, kv_heads, dim], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if not packed and (
        q.ndim != 4 or k.ndim != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"{op}: q must be [batch, heads, seq, dim] and k [batch, kv_heads, seq, dim], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    check_tables(op, q, cos, sin)
    if packed:
        _check_sequences(op, position_ids, cu_seqlens)
    elif position_ids is not None:
        _check_positions(op, position_ids, q)
    elif offset < 0 or offset + q.shape[2] > cos.shape[0]:
        raise ValueError(
            f"{op}: positions must be from 0 to {cos.shape[0] - 1}, "
            f"got {offset} to {offset + q.shape[2] - 1}"
        )
    if packed and offset < 0:
        raise ValueError(f"{op}: offset must be at least 0, got {offset}")
    given = {"k": k, "cos": cos, "sin": sin, "position_ids": position_ids, "cu_seqlens": cu_seqlens}
    for name, t in given.items():
        if t is not None and t.device != q.device:
            raise RuntimeError(f"{op}: {name} must be on {q.device}, got {t.device}")


def check_tables(op: str, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse what are no tables of angles for heads like these."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{op}: {name} must be {q.dtype} or torch.float32, got {table.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"{op}: sin must be {cos.dtype} like cos, got {sin.dtype}")
    if cos.ndim != 2 or sin.shape != cos.shape or cos.numel() == 0:
        raise ValueError(
            f"{op}: cos and sin must be [positions, rotary_dim / 2], not empty, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"{op}: rotary_dim must be at most dim = {q.shape[-1]}, got {2 * cos.shape[1]}"
        )


def _check_positions(op: str, position_ids: Tensor, q: Tensor) -> None:
    batch, _, seq, _ = q.shape
    if position_ids.dtype != torch.int64:
        raise TypeError(f"{op}: position_ids must be torch.int64, got {position_ids.dtype}")
    if position_ids.shape not in ((seq,), (1, seq), (batch, seq)):
        raise ValueError(
            f"{op}: position_ids must be [{seq}] or [{batch}, {seq}], "
            f"got {list(position_ids.shape)}"
        )


def _check_sequences(op: str, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> None:
    assert cu_seqlens is not None
    if position_ids is not None:
        raise ValueError(f"{op}: must be given position_ids or cu_seqlens, got both")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{op}: cu_seqlens must be [batch + 1], got {list(cu_seqlens.shape)}")


def side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only if the elements of its last dimension do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_heads(x: Tensor, packed: bool) -> Tensor:
    """`[batch, heads, seq, dim]`; of packed sequences `[1, heads, total, dim]`, without a copy."""
    return x.transpose(0, 1).unsqueeze(0) if packed else x


def as_given(x: Tensor, packed: bool) -> Tensor:
    """What `as_heads` was given."""
    return x.squeeze(0).transpose(0, 1) if packed else x


def angles(
    cos: Tensor,
    sin: Tensor,
    seq: int,
    position_ids: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of both tables for each position, and which rows belong to a sequence.

    Returns:
        cos and sin, to be broadcast to `[batch, heads, seq, half]`, NaN where the tables have no
        such position; `[seq, 1]`, bool, or None if all rows belong to one.
    """
    if position_ids is None and cu_seqlens is None:
        return cos[offset : offset + seq], sin[offset : offset + seq], None
    inside = None
    if cu_seqlens is not None:
        rows = torch.arange(seq, device=cos.device)
        sequence = torch.searchsorted(cu_seqlens, rows.int(), right=True) - 1
        inside = (sequence < len(cu_seqlens) - 1).unsqueeze(-1)
        position_ids = (rows - cu_seqlens[sequence.clamp(min=0)]).unsqueeze(0)
    assert position_ids is not None
    positions = position_ids + offset
    known = (positions >= 0) & (positions < len(cos))
    cos, sin = (  # [batch, seq] -> [batch, 1, seq, half]
        t[positions.where(known, 0)].where(known.unsqueeze(-1), math.nan).unsqueeze(-3)
        for t in (cos, sin)
    )
    return cos, sin, inside


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, inside: Tensor | None, interleaved: bool
) -> Tensor:
    """`x` in the dtype of the arithmetic, turned; 0 where there is no sequence."""
    wide, half = x.to(wide_dtype(x.dtype)), cos.shape[-1]
    turning, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    y = torch.cat([turned, rest], -1)
    return y if inside is None else torch.where(inside, y, 0)


def rotary_tables(
    positions: int,
    dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Make the tables for `rotary`.

        angle = position / base^(2 i / dim), for i from 0 to dim / 2 - 1

    Computed in fp64 and rounded once, so that late positions are as right as early ones.

    Args:
        positions: How many: 0 to `positions` - 1.
        dim: The dimensions that are rotated, an even number.
        base: The longest wavelength is nearly 2 pi times this.
        device: Where the tables lie.
        dtype: Floating point.

    Returns:
        cos and sin, each `[positions, dim / 2]`.

    Raises:
        TypeError: If `dtype` is not floating point.
        ValueError: If a number is out of range.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"rotary_tables: dtype must be floating point, got {dtype}")
    if positions < 1:
        raise ValueError(f"rotary_tables: positions must be at least 1, got {positions}")
    if dim < 2 or dim % 2:
        raise ValueError(f"rotary_tables: dim must be even and at least 2, got {dim}")
    if base <= 0:
        raise ValueError(f"rotary_tables: base must be positive, got {base}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponents)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotation_inputs(
    batch: int,
    heads: int,
    seq: int,
    dim: int,
    kv_heads: int | None = None,
    rotary_dim: int | None = None,
    table: str = "like q",
    order: str = "batch, heads, seq, dim",
    positions: str = "consecutive",
    lengths: tuple[int, ...] | None = None,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    """q, k, cos and sin, and options, for the sizes that the ops declare."""

    def make(heads: int) -> Tensor:
        if lengths is not None:
            return torch.randn(seq, heads, dim, device=device, dtype=dtype)
        if order == "batch, heads, seq, dim":
            return torch.randn(batch, heads, seq, dim, device=device, dtype=dtype)
        return torch.randn(batch, seq, heads, dim, device=device, dtype=dtype).transpose(1, 2)

    tables = rotary_tables(
        seq + 5, rotary_dim or dim, 100.0, device, dtype if table == "like q" else torch.float32
    )
    if positions == "a row for each sequence":
        options["position_ids"] = torch.randint(seq + 3, (batch, seq), device=device)
    if positions == "a row for all":
        options["position_ids"] = torch.arange(seq, device=device).flip(0)
    if lengths is not None:
        ends = torch.tensor((0, *lengths), device=device).cumsum(0)
        options["cu_seqlens"] = ends.to(torch.int32)
    q, k = make(heads), make(heads if kv_heads is None else kv_heads)
    return (q, k, *tables), {"offset": 2} | options

"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of dimensions of `q` and `k` by the angles of their positions.

        (a, b) -> (a * cos - b * sin, b * cos + a * sin)

    Pair i is dimensions i and i + rotary_dim / 2, or 2i and 2i + 1 if `interleaved`. Dimensions
    from rotary_dim on pass through. Computed in fp32 (fp64 for fp64 `q`) and rounded once. Where
    `position_ids` names a position that the tables do not have, the rotated dimensions are NaN.

    Args:
        q: `[batch, heads, seq, dim]`, floating point. Any strides: copied only if the dimensions of
            a head do not lie side by side.
        k: `[batch, kv_heads, seq, dim]`, dtype and device of `q`.
        cos: `[positions, rotary_dim / 2]`, rotary_dim <= dim; fp32, or the dtype of `q`. A table
            that requires a gradient is served by the reference.
        sin: Like `cos`. `rotary_tables` makes both.
        interleaved: Whether the dimensions of a pair are neighbours.
        position_ids: `[seq]` or `[batch, seq]`, int64. None is 0, 1, ..., seq - 1.
        offset: Added to every position.
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The rotated q and k, each with the shape, dtype and order in memory it came with.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong, `backend` is unknown, or without `position_ids` the tables
            end before `offset + seq`.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check(q, k, cos, sin, position_ids, offset)
    options: dict[str, Any] = {
        "interleaved": interleaved, "position_ids": position_ids, "offset": offset
    }  # fmt: skip
    chosen = choose(ROTARY, backend, q, k, cos, sin, **options)
    plain = chosen == "reference" or q.numel() == 0 or k.numel() == 0 or transforming()
    if plain or needs_gradient(cos, sin):
        return rotary_reference(q, k, cos, sin, **options)

    ids = position_ids if position_ids is None else position_ids.expand(q.shape[0], q.shape[2])
    tensors = (_side_by_side(q), _side_by_side(k), _side_by_side(cos), _side_by_side(sin))
    rotate = _Rotary.apply if needs_gradient(q, k) else _forward
    turned: tuple[Tensor, Tensor] = rotate(  # type: ignore[no-untyped-call]
        *tensors, ids, offset, interleaved, chosen
    )
    return turned


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, offset: int
) -> None:
    if not q.is_floating_point():
        raise TypeError(f"rotary: q must be floating point, got {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"rotary: k must be {q.dtype}, got {k.dtype}")
    if q.ndim != 4 or k.ndim != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"rotary: q must be [batch, heads, seq, dim] and k [batch, kv_heads, seq, dim], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"rotary: {name} must be {q.dtype} or torch.float32, got {table.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"rotary: sin must be {cos.dtype} like cos, got {sin.dtype}")
    if cos.ndim != 2 or sin.shape != cos.shape or cos.numel() == 0:
        raise ValueError(
            f"rotary: cos and sin must be [positions, rotary_dim / 2], not empty, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary: rotary_dim must be at most dim = {q.shape[3]}, got {2 * cos.shape[1]}"
        )
    if position_ids is not None:
        _check_positions(position_ids, q)
    elif offset < 0 or offset + q.shape[2] > cos.shape[0]:
        raise ValueError(
            f"rotary: positions must be from 0 to {cos.shape[0] - 1}, "
            f"got {offset} to {offset + q.shape[2] - 1}"
        )
    for name, t in (("k", k), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if t is not None and t.device != q.device:
            raise RuntimeError(f"rotary: {name} must be on {q.device}, got {t.device}")


def _check_positions(position_ids: Tensor, q: Tensor) -> None:
    batch, _, seq, _ = q.shape
    if position_ids.dtype != torch.int64:
        raise TypeError(f"rotary: position_ids must be torch.int64, got {position_ids.dtype}")
    if position_ids.shape not in ((seq,), (1, seq), (batch, seq)):
        raise ValueError(
            f"rotary: position_ids must be [{seq}] or [{batch}, {seq}], "
            f"got {list(position_ids.shape)}"
        )


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


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The formula of `rotary`, in plain PyTorch."""
    if position_ids is None:
        cos, sin = (t[offset : offset + q.shape[-2]] for t in (cos, sin))
    else:  # [batch, seq] -> [batch, 1, seq, half]
        positions = position_ids + offset
        known = (positions >= 0) & (positions < len(cos))
        cos, sin = (
            t[positions.where(known, 0)].where(known.unsqueeze(-1), math.nan).unsqueeze(-3)
            for t in (cos, sin)
        )
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide, half = x.to(wide_dtype(x.dtype)), cos.shape[-1]
    turning, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        offset: int,
        interleaved: bool,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, cos, sin, position_ids)
        ctx.offset, ctx.interleaved, ctx.chosen = offset, interleaved, chosen
        turned: tuple[Tensor, Tensor] = _forward(
            q, k, cos, sin, position_ids, offset, interleaved, chosen
        )
        return turned

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, cos, sin, ids = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = partial(
                rotary_reference, interleaved=ctx.interleaved, position_ids=ids, offset=ctx.offset
            )
            tables = cos.detach(), sin.detach()
            grads = differentiable_gradients(
                lambda q, k: reference(q, k, *tables), (dq, dk), (q, k)
            )
        else:
            dq, dk = _side_by_side(dq), _side_by_side(dk)
            grads = _backward(dq, dk, cos, sin, ids, ctx.offset, ctx.interleaved, ctx.chosen)
        return *grads, None, None, None, None, None, None


def _side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only if the elements of its last dimension do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


BACKENDS = backends_of("rotary", numba=takes_all, triton=takes_all)

_forward = register(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids,"
    " SymInt offset, bool interleaved, str backend) -> (Tensor q_turned, Tensor k_turned)",
    BACKENDS,
    fake=lambda q, k, *rest: (torch.empty_like(q), torch.empty_like(k)),
)
_backward = register(
    "rotary_backward(Tensor dq_turned, Tensor dk_turned, Tensor cos, Tensor sin,"
    " Tensor? position_ids, SymInt offset, bool interleaved, str backend)"
    " -> (Tensor dq, Tensor dk)",
    BACKENDS,
    fake=lambda dq, dk, *rest: (torch.empty_like(dq), torch.empty_like(dk)),
)


def _inputs(
    batch: int,
    heads: int,
    seq: int,
    dim: int,
    kv_heads: int | None = None,
    rotary_dim: int | None = None,
    table: str = "like q",
    order: str = "batch, heads, seq, dim",
    positions: str = "consecutive",
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    def make(heads: int) -> Tensor:
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
    q, k = make(heads), make(heads if kv_heads is None else kv_heads)
    return (q, k, *tables), {"offset": 2} | options


ROTARY = declare(
    Op(
        name="rotary",
        call=rotary,
        reference=rotary_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 2, "heads": 2, "seq": 3, "dim": 4},
            {"batch": 0, "heads": 2, "seq": 3, "dim": 4},  # empty batch
            {"batch": 2, "heads": 2, "seq": 0, "dim": 4},
            {"batch": 1, "heads": 1, "seq": 1, "dim": 2},
            {"batch": 2, "heads": 3, "seq": 5, "dim": 2, "interleaved": True},
            {"batch": 2, "heads": 4, "seq": 17, "dim": 64, "kv_heads": 2, "table": "float32"},
            {
                "batch": 3, "heads": 5, "seq": 7, "dim": 13, "rotary_dim": 6, "kv_heads": 1,
                "order": "batch, seq, heads, dim",
            },
            {
                "batch": 2, "heads": 9, "seq": 33, "dim": 80, "rotary_dim": 22, "kv_heads": 3,
                "interleaved": True, "positions": "a row for each sequence",
            },
            {
                "batch": 2, "heads": 4, "seq": 67, "dim": 128, "kv_heads": 1,
                "order": "batch, seq, heads, dim", "positions": "a row for all",
            },
        ],
        workloads=[
            {"batch": 1, "heads": 16, "seq": 4096, "dim": 64},
            {
                "batch": 2, "heads": 32, "seq": 4096, "dim": 128, "kv_heads": 8,
                "order": "batch, seq, heads, dim", "table": "float32",
            },
        ],
        bytes_moved=lambda q, k, *tables, **options: 2 * (q.nbytes + k.nbytes),
        constants=frozenset({2, 3}),
    )
)  # fmt: skip

"""Normalisation of queries and keys (Henry et al., 2020, https://arxiv.org/abs/2010.04245) by root
mean square, and rotary position embedding (https://arxiv.org/abs/2104.09864), in one pass.
"""

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
from tilewise.plan import planned
from tilewise.rotation import (
    angles,
    as_given,
    as_heads,
    check_rotation,
    rotated,
    rotation_inputs,
    side_by_side,
)


@planned
def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of `q` and `k`, then rotate it by the angle of its position.

        q = rotary(q * rsqrt(mean(q^2) + eps) * (weight_offset + q_weight)), and k alike

    `rotary` says how. Computed in fp32 (fp64 for fp64 `q`) and rounded once; kept for the gradients
    is one number a head besides the arguments.

    Args:
        q: `[batch, heads, seq, dim]`, floating point, or packed, `[total, heads, dim]`. Any
            strides: copied only if the dimensions of a head do not lie side by side.
        k: `[batch, kv_heads, seq, dim]` or `[total, kv_heads, dim]`, dtype and device of `q`.
        q_weight: `[dim]`; fp32, or the dtype of `q`.
        k_weight: `[dim]`, dtype of `q_weight`.
        cos: `[positions, rotary_dim / 2]`, rotary_dim <= dim; fp32, or the dtype of `q`. A table
            that requires a gradient is served by the reference.
        sin: Like `cos`. `rotary_tables` makes both.
        eps: Added to the mean square.
        interleaved: Whether the dimensions of a pair are neighbours.
        position_ids: `[seq]` or `[batch, seq]`, int64. None is 0, 1, ..., seq - 1.
        offset: Added to every position.
        cu_seqlens: `[batch + 1]`, int32: where the packed sequences begin, 0 first, and where the
            last one ends. Positions count from the beginning of each; rows past the last are 0.
        weight_offset: Added to both weights.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The rotated q and k, each with the shape, dtype and order in memory it came with.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong, `backend` is unknown, or without `position_ids` the tables
            end before `offset + seq`.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    check_rotation("qk_norm_rotary", q, k, cos, sin, position_ids, offset, cu_seqlens)
    _check_weights(q, q_weight, k_weight)
    options: dict[str, Any] = {
        "eps": eps, "interleaved": interleaved, "position_ids": position_ids, "offset": offset,
        "cu_seqlens": cu_seqlens, "weight_offset": weight_offset,
    }  # fmt: skip
    tensors = (q, k, q_weight, k_weight, cos, sin)
    chosen = choose(QK_NORM_ROTARY, backend, *tensors, **options)
    plain = chosen == "reference" or q.numel() == 0 or k.numel() == 0 or transforming()
    if plain or needs_gradient(cos, sin):
        return qk_norm_rotary_reference(*tensors, **options)

    packed = cu_seqlens is not None
    heads = (as_heads(side_by_side(q), packed), as_heads(side_by_side(k), packed))
    ids = position_ids if position_ids is None else position_ids.expand(q.shape[0], q.shape[2])
    arguments = (
        *heads, q_weight.contiguous(), k_weight.contiguous(), side_by_side(cos), side_by_side(sin),
        ids, cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
        eps, weight_offset, offset, interleaved, chosen,
    )  # fmt: skip
    if needs_gradient(q, k, q_weight, k_weight):
        q_turned, k_turned = _QKNormRotary.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        q_turned, k_turned, *_ = _forward(*arguments)
    return as_given(q_turned, packed), as_given(k_turned, packed)


def _check_weights(q: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dtype not in (q.dtype, torch.float32):
            raise TypeError(
                f"qk_norm_rotary: {name} must be {q.dtype} or torch.float32, got {weight.dtype}"
            )
        if weight.shape != q.shape[-1:]:
            raise ValueError(
                f"qk_norm_rotary: {name} must be [{q.shape[-1]}], got {list(weight.shape)}"
            )
        if weight.device != q.device:
            raise RuntimeError(f"qk_norm_rotary: {name} must be on {q.device}, got {weight.device}")
    if k_weight.dtype != q_weight.dtype:
        raise TypeError(
            f"qk_norm_rotary: k_weight must be {q_weight.dtype} like q_weight, got {k_weight.dtype}"
        )


def qk_norm_rotary_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The formula of `qk_norm_rotary`, in plain PyTorch."""
    packed, dtype = cu_seqlens is not None, q.dtype
    q, k = as_heads(q, packed), as_heads(k, packed)
    turns = angles(cos, sin, q.shape[2], position_ids, offset, cu_seqlens)

    def of(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(wide_dtype(dtype))
        if turns[2] is not None:  # what belongs to no sequence may be anything
            wide = torch.where(turns[2], wide, 0)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        weight = weight.to(wide.dtype)
        y = rotated(wide * (weight + weight_offset), *turns, interleaved)
        return as_given(y.to(dtype), packed)

    return of(q, q_weight), of(k, k_weight)


class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
        weight_offset: float,
        offset: int,
        interleaved: bool,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
        q_turned, k_turned, *rstd = _forward(
            *tensors, eps, weight_offset, offset, interleaved, chosen
        )
        ctx.save_for_backward(*tensors, *rstd)
        ctx.options = (eps, weight_offset, offset, interleaved)
        ctx.chosen = chosen
        return q_turned, k_turned

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, cos, sin, ids, ends, q_rstd, k_rstd = ctx.saved_tensors
        eps, weight_offset, offset, interleaved = ctx.options
        unused = (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True
            tables = cos.detach(), sin.detach()

            def reference(
                q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor
            ) -> tuple[Tensor, Tensor]:
                packed = ends is not None
                q, k = qk_norm_rotary_reference(
                    as_given(q, packed), as_given(k, packed), q_weight, k_weight, *tables,
                    eps=eps, interleaved=interleaved, position_ids=ids, offset=offset,
                    cu_seqlens=ends, weight_offset=weight_offset,
                )  # fmt: skip
                return as_heads(q, packed), as_heads(k, packed)

            return *differentiable_gradients(reference, (dq, dk), tensors), *unused
        wanted = ctx.needs_input_grad[:4]
        grads = _backward(
            side_by_side(dq), side_by_side(dk), *tensors, cos, sin, ids, ends, q_rstd, k_rstd,
            weight_offset, offset, interleaved, *wanted, ctx.chosen,
        )  # fmt: skip
        only = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return *only, *unused


BACKENDS = backends_of("qk_norm_rotary", cuda=takes_all, numba=takes_all, triton=takes_all)


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=wide_dtype(x.dtype))


_TENSORS = (
    "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor? position_ids, Tensor? cu_seqlens"
)
_forward = register(
    f"qk_norm_rotary_forward({_TENSORS}, float eps, float weight_offset, SymInt offset,"
    " bool interleaved, str backend)"
    " -> (Tensor q_turned, Tensor k_turned, Tensor q_rstd, Tensor k_rstd)",
    BACKENDS,
    fake=lambda q, k, *rest: (
        torch.empty_like(q),
        torch.empty_like(k),
        _rstd_like(q),
        _rstd_like(k),
    ),
)
_backward = register(
    f"qk_norm_rotary_backward(Tensor dq_turned, Tensor dk_turned, {_TENSORS}, Tensor q_rstd,"
    " Tensor k_rstd, float weight_offset, SymInt offset, bool interleaved, bool want_dq,"
    " bool want_dk, bool want_dq_weight, bool want_dk_weight, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
    BACKENDS,
    fake=lambda dq, dk, q, k, *rest: tuple(
        torch.empty_like(t) if want else t.new_empty(0)
        for t, want in zip((q, k, *rest[:2]), rest[-5:-1], strict=True)
    ),
)


def _inputs(
    batch: int,
    heads: int,
    seq: int,
    dim: int,
    weight: str = "like q",
    *,
    device: str,
    dtype: torch.dtype,
    **size: Any,
) -> Inputs:
    (q, k, *tables), options = rotation_inputs(
        batch, heads, seq, dim, device=device, dtype=dtype, **size
    )
    kind = dtype if weight == "like q" else torch.float32
    # Small ones: a second derivative goes with the fourth power, and so does its rounding.
    weights = (0.5 * torch.randn(2, dim, device=device, dtype=kind)).unbind()
    return (q, k, *weights, *tables), {"eps": 0.1} | options


QK_NORM_ROTARY = declare(
    Op(
        name="qk_norm_rotary",
        call=qk_norm_rotary,
        reference=qk_norm_rotary_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 2, "heads": 2, "seq": 3, "dim": 4},
            {"batch": 0, "heads": 2, "seq": 3, "dim": 4},  # empty batch
            {"batch": 1, "heads": 1, "seq": 1, "dim": 2, "interleaved": True},
            {
                "batch": 2, "heads": 4, "seq": 17, "dim": 64, "kv_heads": 2, "table": "float32",
                "weight": "float32", "weight_offset": 1.0,
            },
            {  # odd width, strided heads, one kv head
                "batch": 3, "heads": 5, "seq": 7, "dim": 13, "rotary_dim": 6, "kv_heads": 1,
                "order": "batch, seq, heads, dim",
            },
            {  # several rows in a part
                "batch": 2, "heads": 9, "seq": 33, "dim": 80, "rotary_dim": 48, "kv_heads": 3,
                "interleaved": True, "positions": "a row for each sequence",
            },
            {  # packed: an empty sequence, a last one of one row, and rows past it
                "batch": 1, "heads": 3, "seq": 41, "dim": 128, "kv_heads": 1,
                "lengths": (17, 0, 19, 1),
            },
        ],
        workloads=[
            {"batch": 1, "heads": 16, "seq": 4096, "dim": 64},
            {
                "batch": 2, "heads": 32, "seq": 4096, "dim": 128, "kv_heads": 8,
                "order": "batch, seq, heads, dim", "table": "float32",
            },
        ],
        bytes_moved=lambda q, k, *rest, **options: 2 * (q.nbytes + k.nbytes),
        constants=frozenset({4, 5}),
    )
)  # fmt: skip

"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Op,
    backends_of,
    declare,
    needs_gradient,
    register,
    takes_all,
    transforming,
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
from tilewise.rotation import rotary_tables as rotary_tables


@planned
def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of dimensions of `q` and `k` by the angles of their positions.

        (a, b) -> (a * cos - b * sin, b * cos + a * sin)

    Pair i is dimensions i and i + rotary_dim / 2, or 2i and 2i + 1 if `interleaved`. Dimensions
    from rotary_dim on pass through. Computed in fp32 (fp64 for fp64 `q`) and rounded once. Where
    `position_ids` names a position that the tables do not have, the rotated dimensions are NaN.

    Args:
        q: `[batch, heads, seq, dim]`, floating point, or packed, `[total, heads, dim]`. Any
            strides: copied only if the dimensions of a head do not lie side by side.
        k: `[batch, kv_heads, seq, dim]` or `[total, kv_heads, dim]`, dtype and device of `q`.
        cos: `[positions, rotary_dim / 2]`, rotary_dim <= dim; fp32, or the dtype of `q`. A table
            that requires a gradient is served by the reference.
        sin: Like `cos`. `rotary_tables` makes both.
        interleaved: Whether the dimensions of a pair are neighbours.
        position_ids: `[seq]` or `[batch, seq]`, int64. None is 0, 1, ..., seq - 1.
        offset: Added to every position.
        cu_seqlens: `[batch + 1]`, int32: where the packed sequences begin, 0 first, and where the
            last one ends. Positions count from the beginning of each; rows past the last are 0.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        The rotated q and k, each with the shape, dtype and order in memory it came with.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong, `backend` is unknown, or without `position_ids` the tables
            end before `offset + seq`.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    check_rotation("rotary", q, k, cos, sin, position_ids, offset, cu_seqlens)
    options: dict[str, Any] = {
        "interleaved": interleaved, "position_ids": position_ids, "offset": offset,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    chosen = choose(ROTARY, backend, q, k, cos, sin, **options)
    plain = chosen == "reference" or q.numel() == 0 or k.numel() == 0 or transforming()
    if plain or needs_gradient(cos, sin):
        return rotary_reference(q, k, cos, sin, **options)

    packed = cu_seqlens is not None
    heads = (as_heads(side_by_side(q), packed), as_heads(side_by_side(k), packed))
    ids = position_ids if position_ids is None else position_ids.expand(q.shape[0], q.shape[2])
    ends = cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    rotate = _Rotary.apply if needs_gradient(q, k) else _forward
    q_turned, k_turned = rotate(  # type: ignore[no-untyped-call]
        *heads, side_by_side(cos), side_by_side(sin), ids, ends, offset, interleaved, chosen
    )
    return as_given(q_turned, packed), as_given(k_turned, packed)


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula of `rotary`, in plain PyTorch."""
    packed, dtype = cu_seqlens is not None, q.dtype
    q, k = as_heads(q, packed), as_heads(k, packed)
    turns = angles(cos, sin, q.shape[2], position_ids, offset, cu_seqlens)
    q, k = (rotated(x, *turns, interleaved).to(dtype) for x in (q, k))
    return as_given(q, packed), as_given(k, packed)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        offset: int,
        interleaved: bool,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.offset, ctx.interleaved, ctx.chosen = offset, interleaved, chosen
        ctx.set_materialize_grads(False)
        turned: tuple[Tensor, Tensor] = _forward(
            q, k, cos, sin, position_ids, cu_seqlens, offset, interleaved, chosen
        )
        return turned

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, ids, ends = ctx.saved_tensors
        unused = (None,) * 7
        grads = [
            d if want else None for d, want in zip((dq, dk), ctx.needs_input_grad, strict=False)
        ]
        if torch.is_grad_enabled():  # create_graph=True: the inverse turns the other way
            tables = cos.detach(), -sin.detach()
            return *(
                None
                if d is None
                else rotated(
                    d, *angles(*tables, d.shape[2], ids, ctx.offset, ends), ctx.interleaved
                ).to(d.dtype)
                for d in grads
            ), *unused
        given = [side_by_side(d) for d in grads if d is not None]
        if not given:
            return None, None, *unused
        if len(given) == 1:  # the other has no heads
            given.append(given[0][:, :0])
            back = _backward(*given, cos, sin, ids, ends, ctx.offset, ctx.interleaved, ctx.chosen)
            return *(None if d is None else back[0] for d in grads), *unused
        return *_backward(
            *given, cos, sin, ids, ends, ctx.offset, ctx.interleaved, ctx.chosen
        ), *unused


BACKENDS = backends_of("rotary", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids,"
    " Tensor? cu_seqlens, SymInt offset, bool interleaved, str backend)"
    " -> (Tensor q_turned, Tensor k_turned)",
    BACKENDS,
    fake=lambda q, k, *rest: (torch.empty_like(q), torch.empty_like(k)),
)
_backward = register(
    "rotary_backward(Tensor dq_turned, Tensor dk_turned, Tensor cos, Tensor sin,"
    " Tensor? position_ids, Tensor? cu_seqlens, SymInt offset, bool interleaved, str backend)"
    " -> (Tensor dq, Tensor dk)",
    BACKENDS,
    fake=lambda dq, dk, *rest: (torch.empty_like(dq), torch.empty_like(dk)),
)


ROTARY = declare(
    Op(
        name="rotary",
        call=rotary,
        reference=rotary_reference,
        backends=BACKENDS,
        inputs=rotation_inputs,
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
            {  # packed: an empty sequence, a last one of one row, and rows past it
                "batch": 1, "heads": 3, "seq": 41, "dim": 48, "rotary_dim": 32, "kv_heads": 1,
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
        bytes_moved=lambda q, k, *tables, **options: 2 * (q.nbytes + k.nbytes),
        constants=frozenset({2, 3}),
    )
)  # fmt: skip

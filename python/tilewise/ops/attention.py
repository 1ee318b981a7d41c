"""Scaled dot-product attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762), tiled with
an online softmax (Dao et al., 2022, https://arxiv.org/abs/2205.14135)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    autocast_dtype,
    backends_of,
    declare,
    differentiable_gradients,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.scores import check_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Average the rows of `v` by the softmax of the scores of `q` against `k`.

        out = softmax(scale * q k^T) v

    Where a query has nothing to attend to, out and its gradients are 0. Query head h reads key and
    value head h // (heads / kv_heads). Under autocast q, k and v are cast to its dtype.

    Args:
        q: `[batch, heads, seq_q, dim]`, floating point, any strides (a view of
            `[batch, seq, heads, dim]` is not copied).
        k: `[batch, kv_heads, seq_k, dim]`, dtype of `q`; kv_heads divides heads.
        v: `[batch, kv_heads, seq_k, v_dim]`, dtype of `q`.
        mask: Bool, True where a query attends to a key; broadcastable to `[batch, heads, seq_q,
            seq_k]`. Keys it hides from all queries alike, by a size of 1 for the queries, may hold
            NaN or infinity; other keys must be finite.
        causal: Let query i attend only to keys j <= i + seq_k - seq_q: the last query sees all.
        scale: Multiplies the scores. None is 1 / sqrt(dim).
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch, heads, seq_q, v_dim]`, dtype of `q`, its dims in memory in the order of those of
        `q`.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` cannot take so wide a head.
    """
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = (_lowered(t, dtype) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):  # for the products of the reference
            return attention(q, k, v, mask=mask, causal=causal, scale=scale, backend=backend)
    _check(q, k, v, mask)
    scale = _scale(q, scale)
    chosen = choose(ATTENTION, backend, q, k, v, mask=mask, causal=causal, scale=scale)
    if chosen == "reference" or transforming() or 0 in (q.numel(), k.numel(), v.numel()):
        return attention_reference(q, k, v, mask=mask, causal=causal, scale=scale)

    q, k, v = (_rows(t) for t in (q, k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    out: Tensor
    if needs_gradient(q, k, v):
        out = _Attention.apply(q, k, v, mask, causal, scale, chosen)  # type: ignore[no-untyped-call]
    else:
        out, _, _ = _forward(q, k, v, mask, causal, scale, chosen)
    return out


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The formula of `attention`, in plain PyTorch; probabilities are rounded to the dtype of `q`
    before they multiply `v`, as in any tensor-core kernel."""
    wide, groups = wide_dtype(q.dtype), q.shape[1] // max(k.shape[1], 1)
    keys, values = (t.to(wide).repeat_interleave(groups, 1) for t in (k, v))
    if mask is not None and mask.ndim and (mask.ndim == 1 or mask.shape[-2] == 1):
        hidden = ~(mask[None] if mask.ndim == 1 else mask).mT  # a NaN here must meet no product
        keys, values = (t.masked_fill(hidden, 0.0) for t in (keys, values))
    score = _scale(q, scale) * (q.to(wide) @ keys.mT)
    seq_q, seq_k = score.shape[-2:]
    allowed = torch.ones(seq_q, seq_k, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(seq_k - seq_q)
    if mask is not None:
        allowed = allowed & mask
    score = score.masked_fill(~allowed, float("-inf"))
    nothing = ~allowed.any(-1, keepdim=True)
    p = torch.softmax(score.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return (p.to(q.dtype).to(wide) @ values).to(q.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        chosen: str,
    ) -> Tensor:
        out: Tensor
        out, highest, total = _forward(q, k, v, mask, causal, scale, chosen)
        ctx.save_for_backward(q, k, v, mask, out, highest, total)
        ctx.causal, ctx.scale, ctx.chosen = causal, scale, chosen
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            reference = partial(attention_reference, mask=mask, causal=ctx.causal, scale=ctx.scale)
            return *differentiable_gradients(reference, dout, (q, k, v)), None, None, None, None
        grads = _backward(
            _rows(dout), q, k, v, mask, *rest, ctx.causal, ctx.scale, ctx.chosen
        )  # fmt: skip
        return *grads, None, None, None, None


def _lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _scale(q: Tensor, scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def _rows(t: Tensor) -> Tensor:
    """Any strides, but each row in one piece."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if not q.is_floating_point():
        raise TypeError(f"attention: q must be floating point, got {q.dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise TypeError(f"attention: {name} must be {q.dtype} like q, got {t.dtype}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"attention: q, k and v must be [batch, heads, seq, dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: k must be [{q.shape[0]}, kv_heads, seq_k, {q.shape[3]}] for this q, "
            f"got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        sizes = ", ".join(map(str, k.shape[:3]))
        raise ValueError(f"attention: v must be [{sizes}, v_dim] for this k, got {list(v.shape)}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"attention: heads of q must be a multiple of those of k, got {heads} and {kv_heads}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.device != q.device:
            raise RuntimeError(f"attention: {name} must be on {q.device}, got {t.device}")
    check_mask("attention", mask, (*q.shape[:3], k.shape[2]), q)


def _too_wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    widest, limit = max(q.shape[-1], v.shape[-1]), 256  # a tile in registers
    return f"takes heads up to {limit} wide, got {widest}" if widest > limit else None


BACKENDS = backends_of("attention", numba=takes_all, triton=_too_wide)


def _same_layout(x: Tensor, cols: int) -> Tensor:
    """What the kernels allocate: the dims in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


# What a row keeps of its softmax is the highest score, in units of log 2, and the sum of the powers
# of two: lse = ln 2 highest + ln total. Lse alone, rounded to fp32, would make every probability of
# the backward pass wrong by 2 eps or more.
_forward = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale,"
    " str backend) -> (Tensor out, Tensor highest, Tensor total)",
    BACKENDS,
    fake=lambda q, k, v, mask, causal, scale, backend: (
        _same_layout(q, v.shape[-1]),
        q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype)),
        q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype)),
    ),
)
_backward = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out,"
    " Tensor highest, Tensor total, bool causal, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    BACKENDS,
    fake=lambda dout, q, k, v, mask, out, highest, total, causal, scale, backend: tuple(
        _same_layout(t, t.shape[-1]) for t in (q, k, v)
    ),
)


def _inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    seq_q: int,
    seq_k: int,
    dim: int,
    v_dim: int | None = None,
    mask: str | None = None,
    causal: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    """`mask` names the dims along which it varies, of "bhqk"; its first query attends to nothing,
    or, where it is the same for all queries, not to the second half of the keys."""

    def normal(heads: int, seq: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, seq, dim, device=device, dtype=dtype)

    q, k = normal(heads, seq_q, dim), normal(kv_heads, seq_k, dim)
    v = normal(kv_heads, seq_k, dim if v_dim is None else v_dim)
    options: dict[str, Any] = {"causal": causal}
    if mask is not None:
        full = zip("bhqk", (batch, heads, seq_q, seq_k), strict=True)
        allowed = torch.rand([n if name in mask else 1 for name, n in full], device=device) < 0.7
        if "q" in mask:
            allowed[:, :, 0] = False
        else:
            allowed[..., (seq_k + 1) // 2 :] = False
        options["mask"] = allowed
    return (q, k, v), options


def _flops(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **options: Any) -> int:
    seq_q, seq_k = q.shape[2], k.shape[2]
    hidden = sum(min(i, seq_k) for i in range(seq_q)) if causal else 0
    pairs = q.shape[0] * q.shape[1] * (seq_q * seq_k - hidden)
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


_TINY = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 3, "seq_k": 4, "dim": 5}

ATTENTION = declare(
    Op(
        name="attention",
        call=attention,
        reference=attention_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            _TINY,
            _TINY | {"batch": 0},
            _TINY | {"seq_k": 0},  # nothing to attend to
            _TINY | {"seq_q": 1, "seq_k": 1, "dim": 1},
            _TINY | {"heads": 6, "seq_q": 1, "seq_k": 79, "dim": 16},  # heads share the lanes
            _TINY | {"seq_q": 64, "seq_k": 64, "dim": 64, "causal": True},  # whole blocks
            _TINY | {"seq_q": 67, "seq_k": 131, "dim": 40, "v_dim": 16, "causal": True},
            _TINY | {"seq_q": 131, "seq_k": 67, "dim": 24, "v_dim": 40, "causal": True},
            _TINY | {"seq_q": 33, "seq_k": 65, "dim": 128},
            _TINY | {"seq_q": 18, "seq_k": 33, "dim": 256},
            _TINY | {"seq_q": 20, "seq_k": 40, "dim": 192, "v_dim": 128, "causal": True},
            _TINY | {"batch": 2, "seq_q": 17, "seq_k": 135, "dim": 16, "mask": "bk"},  # padding
            _TINY | {"batch": 2, "seq_q": 5, "seq_k": 20, "dim": 8, "mask": "hk"},
            _TINY | {"batch": 2, "seq_q": 20, "seq_k": 33, "dim": 8, "mask": "bhqk"},
            _TINY | {"seq_q": 20, "seq_k": 33, "dim": 8, "mask": "qk", "causal": True},
            _TINY | {"batch": 2, "seq_q": 20, "seq_k": 33, "dim": 8, "mask": "bq"},
        ],
        workloads=[
            {"batch": 1, "heads": 16, "kv_heads": 16, "seq_q": n, "seq_k": n, "dim": d, "causal": c}
            for n, d, c in ((1024, 64, True), (1024, 128, True), (1024, 64, False))
        ],
        bytes_moved=lambda q, k, v, **options: (
            q.nbytes + k.nbytes + v.nbytes + q.nbytes // q.shape[-1] * v.shape[-1]
        ),
        flops=_flops,
        native=lambda q, k, v, mask=None, causal=False, scale=None: (
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        ),
    )
)

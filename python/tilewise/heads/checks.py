"""What the front doors of attention refuse, in the caller's words."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise.heads.formula import Window
from tilewise.op import needs_gradient, wide_dtype
from tilewise.scores import check_bias, check_dtype, check_mask, check_softcap


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what are no queries, keys and values, `[batch, heads, seq, dim]`."""
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must be floating point, got {q.dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype} like q, got {t.dtype}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"{op}: q, k and v must be [batch, heads, seq, dim], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k must be [{q.shape[0]}, kv_heads, seq_k, {q.shape[3]}] for this q, "
            f"got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        sizes = ", ".join(map(str, k.shape[:3]))
        raise ValueError(f"{op}: v must be [{sizes}, v_dim] for this k, got {list(v.shape)}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{op}: heads of q must be a multiple of those of k, got {heads} and {kv_heads}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.device != q.device:
            raise RuntimeError(f"{op}: {name} must be on {q.device}, got {t.device}")


def check_options(
    op: str,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    mask: Tensor | None,
    window: Window | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    dropout_p: float,
    seed: Tensor | int | None,
    offset: Tensor | int | None,
    **unchecked: Any,
) -> None:
    """Refuse what is wrong with the options of attention of these queries and keys."""
    shape = (*q.shape[:3], k.shape[2])
    check_mask(op, mask, shape, q)
    check_bias(op, bias, shape, q)
    check_softcap(op, softcap)
    if window is not None:
        _check_window(op, window)
    if alibi_slopes is not None:
        _check_slopes(op, alibi_slopes, q)
    if sinks is not None:
        _check_sinks(op, sinks, q)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, got {dropout_p}")
    for name, number in (("seed", seed), ("offset", offset)):
        if isinstance(number, Tensor) and number.ndim:
            raise ValueError(f"{op}: {name} must be an int or [], got {list(number.shape)}")


def _check_window(op: str, window: Window) -> None:
    whole = isinstance(window, tuple | list) and len(window) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int | None) for n in window):
        raise TypeError(f"{op}: window must be (left, right), ints or None, got {window!r}")
    if any(n is not None and n < 0 for n in window):
        raise ValueError(f"{op}: window must be at least 0 to each side, got {window!r}")


def _check_slopes(op: str, alibi_slopes: Tensor, q: Tensor) -> None:
    batch, heads = q.shape[:2]
    if alibi_slopes.dtype != torch.float32:
        raise TypeError(f"{op}: alibi_slopes must be torch.float32, got {alibi_slopes.dtype}")
    if alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must be [{heads}] or [{batch}, {heads}] for this q, "
            f"got {list(alibi_slopes.shape)}"
        )
    if needs_gradient(alibi_slopes):
        raise ValueError(f"{op}: alibi_slopes must be without gradient, got requires_grad=True")
    if alibi_slopes.device != q.device:
        raise RuntimeError(f"{op}: alibi_slopes must be on {q.device}, got {alibi_slopes.device}")


def _check_sinks(op: str, sinks: Tensor, q: Tensor) -> None:
    check_dtype(op, "sinks", sinks, q)
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"{op}: sinks must be [{q.shape[1]}] for this q, got {list(sinks.shape)}")
    if sinks.device != q.device:
        raise RuntimeError(f"{op}: sinks must be on {q.device}, got {sinks.device}")


def check_parts(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Refuse what `attention_with_lse` cannot have given of two parts of the keys."""
    op, dtype, rows = "merge_attention", out_a.dtype, out_a.shape[:-1]
    if not out_a.is_floating_point():
        raise TypeError(f"{op}: out_a must be floating point, got {dtype}")
    wide = wide_dtype(dtype)
    parts = (
        ("lse_a", lse_a, wide, rows), ("out_b", out_b, dtype, out_a.shape),
        ("lse_b", lse_b, wide, rows),
    )  # fmt: skip
    for name, t, kind, shape in parts:
        if t.dtype != kind:
            raise TypeError(f"{op}: {name} must be {kind} beside this out_a, got {t.dtype}")
        if t.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} beside this out_a, got {list(t.shape)}"
            )
        if t.device != out_a.device:
            raise RuntimeError(f"{op}: {name} must be on {out_a.device}, got {t.device}")


def up_to(widest: int, longest: int | None = None) -> Callable[..., str | None]:
    """The `refuses` of a backend whose heads are at most so wide, and whose sequences so long."""

    def refuses(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> str | None:
        wide, length = max(q.shape[-1], v.shape[-1]), max(q.shape[-2], k.shape[-2])
        if "max_seqlen_q" in options:  # packed
            length = max(options["max_seqlen_q"], options["max_seqlen_k"])
        if wide > widest:
            return f"takes heads up to {widest} wide, got {wide}"
        if longest is not None and length > longest:
            return f"takes up to {longest} queries and keys, got {length}"
        return None

    return refuses

"""Scores, as a softmax takes them: with a bias, a mask, a cap, and none from the future."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _check_spread(op: str, name: str, t: Tensor, shape: Sequence[int], like: Tensor) -> None:
    pairs = zip(t.shape[::-1], shape[::-1], strict=False)
    if t.ndim > len(shape) or any(size not in (1, whole) for size, whole in pairs):
        raise ValueError(
            f"{op}: {name} must be broadcastable to {list(shape)}, got {list(t.shape)}"
        )
    if t.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on {like.device}, got {t.device}")


def check_mask(op: str, mask: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Refuse what is no mask of scores of this shape, which lie where `like` does."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be torch.bool, got {mask.dtype}")
    _check_spread(op, "mask", mask, shape, like)


def check_dtype(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """Refuse what neither has the dtype of `like` nor is fp32."""
    allowed = dict.fromkeys((like.dtype, torch.float32))
    if t.dtype not in allowed:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {t.dtype}")


def check_bias(op: str, bias: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Refuse what is no bias of scores of this shape, which lie where `like` does."""
    if bias is None:
        return
    check_dtype(op, "bias", bias, like)
    _check_spread(op, "bias", bias, shape, like)


def check_softcap(op: str, softcap: float | None) -> None:
    """Refuse a bound that is not above 0."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")


def check_scores(
    op: str,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    causal: bool,
    fully_masked: str,
) -> None:
    """Refuse what is wrong with what becomes of the scores `x` of the op named `op`."""
    check_bias(op, bias, x.shape, x)
    check_mask(op, mask, x.shape, x)
    check_softcap(op, softcap)
    if causal and x.ndim < 2:
        raise ValueError(f"{op}: x must be [..., queries, cols] if causal, got {list(x.shape)}")
    if fully_masked not in ("nan", "zero"):
        raise ValueError(f"{op}: fully_masked must be nan or zero, got {fully_masked!r}")


def spread(t: Tensor, x: Tensor) -> Tensor:
    """`t` as `[batch, heads, queries, cols]` whose first three may be 1: all that kernels know.

    Its columns are neighbours, or one and the same.

    Only of more than four dimensions may it have to be copied, where some of the outer ones vary
    and others do not.
    """
    t = t[(None,) * (max(x.ndim, 4) - t.ndim)]
    if x.ndim > 4:
        outer = x.shape[:-3] if t.shape[:-3].numel() > 1 else t.shape[:-3]
        t = t.expand(*outer, *t.shape[-3:]).flatten(0, -4)
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        t = t.contiguous()
    return t.expand(*t.shape[:-1], x.shape[-1])

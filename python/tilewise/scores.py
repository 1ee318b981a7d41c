"""Scores, as a softmax takes them: with a bias, a mask, a cap, and none from the future."""

import torch
from torch import Tensor


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
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: bias must be {x.dtype} or torch.float32, got {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be torch.bool, got {mask.dtype}")
    for name, t in (("bias", bias), ("mask", mask)):
        if t is None:
            continue
        pairs = zip(t.shape[::-1], x.shape[::-1], strict=False)
        if t.ndim > x.ndim or any(size not in (1, whole) for size, whole in pairs):
            raise ValueError(
                f"{op}: {name} must be broadcastable to {list(x.shape)}, got {list(t.shape)}"
            )
        if t.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device}, got {t.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
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

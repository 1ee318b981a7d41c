"""Liger's and QuACK's kernels of rows and losses. Some write over their inputs."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tilewise.libraries.adapters import Adapters, without

_LIGER = "liger_kernel.transformers.functional"
_LIGER_CASTING = {"torch": "gemma", "llama": "llama"}


def _liger_rms_norm(
    liger: Any, x: Tensor, weight: Tensor, bias: None, *, eps: float, weight_offset: float = 0.0,
    casting: str = "torch",
) -> Any:  # fmt: skip
    without(bias=bias)
    return liger.liger_rms_norm(x, weight, eps, weight_offset, _LIGER_CASTING[casting], False)


def _liger_add_rms_norm(
    liger: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: None, *, eps: float,
    weight_offset: float = 0.0, casting: str = "torch",
) -> Any:  # fmt: skip
    without(bias=bias)
    casting = _LIGER_CASTING[casting]
    return liger.liger_fused_add_rms_norm(x, residual, weight, eps, weight_offset, casting, False)


def _liger_layer_norm(liger: Any, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Any:
    return liger.liger_layer_norm(x, weight, bias, eps)


def _liger_softmax(liger: Any, x: Tensor, bias: None = None) -> Any:
    without(bias=bias)
    return liger.liger_softmax(x)


def _liger_cross_entropy(
    liger: Any, logits: Tensor, target: Tensor, *, z_loss: float = 0.0, **options: Any
) -> Any:
    return liger.liger_cross_entropy(logits, target, lse_square_scale=z_loss, **options)


def _liger_linear_cross_entropy(
    liger: Any, hidden: Tensor, linear_weight: Tensor, target: Tensor, *, memory: str = "fast",
    linear_bias: Tensor | None = None, z_loss: float = 0.0, **options: Any,
) -> Any:  # fmt: skip
    return liger.liger_fused_linear_cross_entropy(
        hidden, linear_weight, target, linear_bias, lse_square_scale=z_loss, **options
    )


def _liger_glu(liger: Any, gate: Tensor, up: Tensor, *, activation: str) -> Any:
    if activation == "silu":
        return liger.liger_swiglu(gate, up)
    if activation == "gelu_tanh":
        return liger.liger_geglu(gate, up)
    raise TypeError(f"has no activation {activation!r}")


def _liger_rotary(
    liger: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, offset: int = 0
) -> Any:
    wide = (_twice_as_wide(t, offset, q.shape[2], q.dtype) for t in (cos, sin))
    return liger.liger_rope(q, k, *wide)


@lru_cache(maxsize=2)  # a model makes its tables once
def _twice_as_wide(table: Tensor, offset: int, seq: int, dtype: torch.dtype) -> Tensor:
    return table[offset : offset + seq].repeat(1, 2)[None].to(dtype)


def _quack_rms_norm(
    quack: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
    weight_offset: float = 0.0,
) -> Any:  # fmt: skip
    return quack.rmsnorm(x, weight, bias, eps=eps, weight_offset=weight_offset)


def _quack_add_rms_norm(
    quack: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float,
    weight_offset: float = 0.0,
) -> Any:  # fmt: skip
    options = {"eps": eps, "weight_offset": weight_offset}
    return quack.rmsnorm(x, weight, bias, residual, prenorm=True, **options)


def _quack_softmax(quack: Any, x: Tensor, bias: None = None) -> Any:
    without(bias=bias)
    return quack.softmax(x)


def _quack_cross_entropy(quack: Any, logits: Tensor, target: Tensor, **options: Any) -> Any:
    return quack.cross_entropy(logits, target, **options)


def _quack_linear_cross_entropy(
    quack: Any, hidden: Tensor, linear_weight: Tensor, target: Tensor, *, memory: str = "fast",
    **options: Any,
) -> Any:  # fmt: skip
    function = "linear_cross_entropy_func" if memory == "fast" else "chunked_linear_cross_entropy"
    bias = (None,) if memory == "fast" else ()
    return getattr(quack, function)(hidden, linear_weight, *bias, target, **options)


ADAPTERS: Adapters = {
    "rms_norm": {"liger": (_LIGER, _liger_rms_norm), "quack": ("quack", _quack_rms_norm)},
    "add_rms_norm": {
        "liger": (_LIGER, _liger_add_rms_norm),
        "quack": ("quack", _quack_add_rms_norm),
    },
    "layer_norm": {"liger": (_LIGER, _liger_layer_norm)},
    "softmax": {"liger": (_LIGER, _liger_softmax), "quack": ("quack", _quack_softmax)},
    "cross_entropy": {
        "liger": (_LIGER, _liger_cross_entropy),
        "quack": ("quack", _quack_cross_entropy),
    },
    "linear_cross_entropy": {
        "liger": (_LIGER, _liger_linear_cross_entropy),
        "quack": ("quack.linear_cross_entropy", _quack_linear_cross_entropy),
    },
    "glu": {"liger": (_LIGER, _liger_glu)},
    "rotary": {"liger": (_LIGER, _liger_rotary)},
}

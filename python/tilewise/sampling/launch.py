"""How options come to a kernel: each of NUMBERS a tensor `[batch]` or a number, in this order."""

from typing import Any

import torch
from torch import Tensor

from tilewise.op import Inputs, wide_dtype
from tilewise.sampling.options import NUMBERS

# The part of a schema that `as_options` fills: tensors, then what counts where there is none.
OPTIONS = (
    "Tensor? each_top_k, "
    + "".join(f"Tensor? each_{name}, " for name in NUMBERS)
    + "Tensor? history, Tensor? logit_bias, Tensor? mask, SymInt top_k, "
    + ", ".join(f"float {name}" for name in NUMBERS)
)


def rows_of(logits: Tensor) -> Tensor:
    """What a kernel reads: each row without gaps, and nothing for autograd to follow."""
    rows = logits.detach() if logits.requires_grad else logits
    return rows if rows.stride(1) == 1 else rows.contiguous()


def as_options(logits: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of OPTIONS."""
    wide, vocab = wide_dtype(logits.dtype), logits.shape[1]
    each_top_k, top_k = _apart(options["top_k"], 0, torch.int64)
    pairs = [_apart(options[name], number.off, wide) for name, number in NUMBERS.items()]
    bias = options["logit_bias"]
    return (
        each_top_k, *(tensor for tensor, _ in pairs),
        _contiguous(options["history"]),
        None if bias is None else rows_of(bias.to(wide).expand(logits.shape)),
        _contiguous(options["mask"]),
        min(top_k, vocab), *(float(value) for _, value in pairs),
    )  # fmt: skip


def as_floats(value: Tensor | float, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """A tensor of `dtype` and 0, or None and the number."""
    tensor, number = _apart(value, 0, dtype)
    return tensor, float(number)


def _apart(value: Any, off: float, dtype: torch.dtype) -> tuple[Tensor | None, Any]:
    if isinstance(value, Tensor):
        return value.detach().to(dtype).contiguous(), 0
    return None, off if value is None else value


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def filters_inputs(
    batch: int,
    vocab: int,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    each: bool = False,
    adjust: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    """Logits and options; `each` gives a row its own, `adjust` penalties, a bias and a mask."""
    logits = 3 * torch.randn(batch, vocab, device=device, dtype=dtype)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = torch.arange(batch, device=device)
    if each:
        options |= {
            "temperature": rows.to(dtype) / 4,
            "top_k": rows % 8 * 5,
            "top_p": 1 - rows.to(dtype) / (2 * batch),
        }
    if adjust:
        history = torch.randint(-2, vocab + 2, (batch, 3 + vocab // 3), device=device)
        words = torch.randint(-(2**31), 2**31, (batch, -(-vocab // 32)), device=device)
        options |= {
            "history": torch.where(history % 3 == 0, history // 2, history),  # some of them often
            "repetition_penalty": 1 + rows.to(dtype) / 8 if each else 1.3,
            "presence_penalty": rows.to(dtype) / 8 if each else 0.5,
            "frequency_penalty": 0.25,
            "logit_bias": torch.randn(*[batch] * each, vocab, device=device, dtype=dtype),
            "mask": words.int() | 1,
        }
    return (logits,), options

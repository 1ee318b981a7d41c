"""The options of what draws tokens, and what is refused about them.

Each of NUMBERS is a number for all rows or a tensor `[batch]`. None is off.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewise.op import needs_gradient
from tilewise.sampling.formula import adjusted

LARGEST = sys.float_info.max
SMALLEST = sys.float_info.min


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most`, in words, and what it is where it is off."""

    wanted: str
    least: float
    most: float
    off: float

    def takes(self, value: float) -> bool:
        """Whether it is in the range; NaN is not."""
        return self.least <= value <= self.most


NUMBERS = {
    "temperature": Number("at least 0 and finite", 0.0, LARGEST, 1.0),
    "top_p": Number("from 0 to 1", 0.0, 1.0, 1.0),
    "min_p": Number("from 0 to 1", 0.0, 1.0, 0.0),
    "repetition_penalty": Number("above 0 and finite", SMALLEST, LARGEST, 1.0),
    "presence_penalty": Number("finite", -LARGEST, LARGEST, 0.0),
    "frequency_penalty": Number("finite", -LARGEST, LARGEST, 0.0),
}
TOP_K = Number("at least 0", 0, math.inf, 0)
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def check_logits(op: str, logits: Tensor, name: str = "logits") -> None:
    """Refuse what is not floating point or not `[batch, vocab]`."""
    if not logits.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {logits.dtype}")
    if logits.ndim != 2:
        raise ValueError(f"{op}: {name} must be [batch, vocab], got {list(logits.shape)}")


def checked(op: str, logits: Tensor, check_inputs: bool, **options: Any) -> dict[str, Any]:
    """The options of `op`, once they are known to be right; those that are off are None.

    Raises:
        TypeError: If a kind or dtype is wrong.
        ValueError: If a shape or range is wrong, or a penalty has no history; with `check_inputs`
            if a row cannot be drawn.
        RuntimeError: If the devices differ.
    """
    for name in NUMBERS:
        if (value := options.get(name)) is not None:
            _check_number(op, name, value, logits)
    if options.get("top_k") is not None:
        _check_top_k(op, options["top_k"], logits)
    for name in PENALTIES:
        if options.get(name) is not None and options.get("history") is None:
            raise ValueError(f"{op}: {name} must come with history, got none")
    batch, vocab = logits.shape
    if (history := options.get("history")) is not None:
        _check_dtype(op, "history", history, torch.int64)
        if history.ndim != 2 or len(history) != batch:
            raise ValueError(f"{op}: history must be [{batch}, length], got {list(history.shape)}")
        _check_device(op, "history", history, logits)
    if (bias := options.get("logit_bias")) is not None:
        _check_bias(op, bias, logits)
    if (mask := options.get("mask")) is not None:
        _check_dtype(op, "mask", mask, torch.int32)
        _check_shape(op, "mask", mask, [batch, -(-vocab // 32)])
        _check_device(op, "mask", mask, logits)
    if check_inputs:
        refuse_bad_rows(op, logits, options)
    return options


def _check_number(op: str, name: str, value: Any, logits: Tensor) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
        _check_row_each(op, name, value, logits)
    elif not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    else:
        refuse_number(op, name, value)


def refuse_number(op: str, name: str, value: float) -> None:
    """Refuse one of NUMBERS, or a top_k, that is out of range."""
    number = TOP_K if name == "top_k" else NUMBERS[name]
    if not number.takes(value):
        raise ValueError(f"{op}: {name} must be {number.wanted}, got {value}")


def _check_top_k(op: str, value: Any, logits: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: top_k must be torch.int64 or torch.int32, got {value.dtype}")
        _check_row_each(op, "top_k", value, logits)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: top_k must be an int or a tensor, got {type(value).__name__}")
    else:
        refuse_number(op, "top_k", value)


def _check_row_each(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: {name} must be a number or [{logits.shape[0]}], got {list(value.shape)}"
        )
    _check_device(op, name, value, logits)


def _check_bias(op: str, bias: Tensor, logits: Tensor) -> None:
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{op}: logit_bias must be floating point, got {got}")
    batch, vocab = logits.shape
    if bias.shape not in (logits.shape, logits.shape[1:]):
        raise ValueError(
            f"{op}: logit_bias must be [{vocab}] or [{batch}, {vocab}], got {list(bias.shape)}"
        )
    _check_device(op, "logit_bias", bias, logits)


def _check_dtype(op: str, name: str, value: Any, dtype: torch.dtype) -> None:
    got = value.dtype if isinstance(value, Tensor) else type(value).__name__
    if got != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {got}")


def _check_shape(op: str, name: str, value: Tensor, shape: list[int]) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {list(value.shape)}")


def _check_device(op: str, name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise RuntimeError(f"{op}: {name} must be on {logits.device}, got {value.device}")


def refuse_gradient(op: str, name: str, value: Tensor) -> None:
    """Refuse what autograd would have to look through."""
    if needs_gradient(value):
        raise ValueError(f"{op}: {name} must be without gradient, got requires_grad=True")


def refuse_bad_rows(op: str, logits: Tensor, options: dict[str, Any]) -> None:
    """Refuse, by its number and value, the first row that would give token -1; waits for it."""
    for name, number in NUMBERS.items():
        value = options.get(name)
        if isinstance(value, Tensor):
            good = (value.double() >= number.least) & (value.double() <= number.most)
            _refuse_row(op, name, number.wanted, good, value)
    if isinstance(value := options.get("top_k"), Tensor):
        _refuse_row(op, "top_k", TOP_K.wanted, value >= TOP_K.least, value)
    if logits.numel() == 0:
        return
    rows = adjusted(logits, **options)
    refuse_nan(op, "logits", rows)
    top = rows.amax(1)
    _refuse_row(op, "logits", "above -inf for some token that is allowed", top > -math.inf, top)


def refuse_nan(op: str, name: str, rows: Tensor) -> None:
    """Refuse the first row with NaN; waits for it."""
    bad = rows.isnan().any(1)
    _refuse_row(op, name, "without NaN", ~bad, torch.where(bad, math.nan, 0.0))


def _refuse_row(op: str, name: str, wanted: str, good: Tensor, values: Tensor) -> None:
    if not bool(good.all()):
        row = int((~good).int().argmax())
        raise ValueError(f"{op}: {name} must be {wanted}, got {values[row].item()} in row {row}")

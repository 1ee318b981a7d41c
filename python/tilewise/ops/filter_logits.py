"""What `tilewise.sample` draws from, by itself: for draws of one's own, or for a softmax."""

import math
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Op,
    Size,
    backends_of,
    declare,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.sampling import (
    OPTIONS,
    as_options,
    check_logits,
    checked,
    filtered,
    filters_inputs,
    ranked,
    refuse_gradient,
    rows_of,
)


def filter_logits(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    repetition_penalty: Tensor | float | None = None,
    presence_penalty: Tensor | float | None = None,
    frequency_penalty: Tensor | float | None = None,
    history: Tensor | None = None,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Keep the logits that `tilewise.sample` would draw from, adjusted, over the temperature.

        logit / temperature where the token is left, -inf elsewhere

    The one that temperature 0 leaves is not divided. A row of which nothing is left is -inf
    throughout; one with NaN or with an option of its own that is out of range is NaN throughout.
    There is no gradient.

    Args:
        logits: `[batch, vocab]`, floating point.
        temperature: As of `tilewise.sample`, like all that follow.
        top_k: The first of them in rank.
        top_p: Of these the shortest prefix of this probability.
        min_p: Of these those at least so many times as likely as the first.
        repetition_penalty: Of the tokens of `history`.
        presence_penalty: Of the tokens of `history`.
        frequency_penalty: Of the tokens of `history`.
        history: `[batch, length]`, int64.
        logit_bias: `[vocab]` or `[batch, vocab]`, floating point.
        mask: `[batch, ceil(vocab / 32)]`, int32.
        check_inputs: Raise where a row would have no token. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch, vocab]`, the dtype of the logits.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, a penalty has no history, the logits require a
            gradient, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    return _filter(
        FILTER_LOGITS, logits, check_inputs, backend, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, history=history,
        logit_bias=logit_bias, mask=mask,
    )  # fmt: skip


def filter_logits_reference(logits: Tensor, **options: Any) -> Tensor:
    """The rule of `filter_logits`, in plain PyTorch."""
    if logits.numel() == 0:
        return torch.empty_like(logits)
    found = ranked(logits, **options)
    scaled = torch.where(found.temperature > 0, found.logits / found.temperature, found.logits)
    kept = found.at(torch.where(found.left, scaled, -math.inf))
    good = found.good & ~found.logits[:, :1].isnan()
    return torch.where(good, kept, math.nan).to(logits.dtype)


def filtered_probs(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    repetition_penalty: Tensor | float | None = None,
    presence_penalty: Tensor | float | None = None,
    frequency_penalty: Tensor | float | None = None,
    history: Tensor | None = None,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Give the probability with which `tilewise.sample` draws each token.

        softmax of `tilewise.filter_logits`

    Where some logits are +inf, those share it. A row that would be drawn as -1 is NaN throughout.
    There is no gradient.

    Args:
        logits: `[batch, vocab]`, floating point.
        temperature: As of `tilewise.sample`, like all that follow.
        top_k: The first of them in rank.
        top_p: Of these the shortest prefix of this probability.
        min_p: Of these those at least so many times as likely as the first.
        repetition_penalty: Of the tokens of `history`.
        presence_penalty: Of the tokens of `history`.
        frequency_penalty: Of the tokens of `history`.
        history: `[batch, length]`, int64.
        logit_bias: `[vocab]` or `[batch, vocab]`, floating point.
        mask: `[batch, ceil(vocab / 32)]`, int32.
        check_inputs: Raise where a row would have no token. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch, vocab]`, fp32, or fp64 for fp64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, a penalty has no history, the logits require a
            gradient, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    return _filter(
        FILTERED_PROBS, logits, check_inputs, backend, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, history=history,
        logit_bias=logit_bias, mask=mask,
    )  # fmt: skip


def filtered_probs_reference(logits: Tensor, **options: Any) -> Tensor:
    """The rule of `filtered_probs`, in plain PyTorch."""
    return filtered(logits, **options)


def _filter(
    op: Op, logits: Tensor, check_inputs: bool, backend: str | None, **options: Any
) -> Tensor:
    check_logits(op.name, logits)
    refuse_gradient(op.name, "logits", logits)
    options = checked(op.name, logits, check_inputs, **options)
    chosen = choose(op, backend, logits, **options)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        out: Tensor = op.reference(logits, **options)
        return out
    rows = rows_of(logits)
    out = _forward(rows, *as_options(rows, options), op is FILTERED_PROBS, chosen)
    return out


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all)


def _fake(logits: Tensor, *options: Any) -> Tensor:
    dtype = wide_dtype(logits.dtype) if options[-2] else logits.dtype
    return logits.new_empty(logits.shape, dtype=dtype)


_forward = register(
    f"filter_logits_forward(Tensor logits, {OPTIONS}, bool as_probabilities, str backend)"
    " -> Tensor",
    BACKENDS,
    fake=_fake,
)

_SIZES: list[Size] = [
    {"batch": 3, "vocab": 8},
    {"batch": 0, "vocab": 64},  # empty batch
    {"batch": 3, "vocab": 0},  # no token at all
    {"batch": 2, "vocab": 1},
    {"batch": 37, "vocab": 127, "top_k": 50},  # one short of a block, rows misaligned
    {"batch": 3, "vocab": 4099, "top_p": 0.9},  # several blocks
    {"batch": 2, "vocab": 3001, "top_k": 300, "top_p": 0.7},
    {"batch": 5, "vocab": 1000, "min_p": 0.02},
    {"batch": 9, "vocab": 129, "each": True, "adjust": True, "min_p": 0.05},
]
_WORKLOADS: list[Size] = [
    {"batch": batch, "vocab": 128256, **options}
    for batch in (1, 64)
    for options in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05})
]

FILTER_LOGITS = declare(
    Op(
        name="filter_logits",
        call=filter_logits,
        reference=filter_logits_reference,
        backends=BACKENDS,
        inputs=filters_inputs,
        sizes=_SIZES,
        workloads=_WORKLOADS,
        bytes_moved=lambda logits, **options: 2 * logits.nbytes,
        constants=frozenset({0}),
    )
)

FILTERED_PROBS = declare(
    Op(
        name="filtered_probs",
        call=filtered_probs,
        reference=filtered_probs_reference,
        backends=BACKENDS,
        inputs=filters_inputs,
        sizes=_SIZES,
        workloads=_WORKLOADS,
        bytes_moved=lambda logits, **options: logits.nbytes + 4 * logits.numel(),
        constants=frozenset({0}),
    )
)

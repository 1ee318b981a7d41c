"""Draws from weights, with or without replacement: without it, those with the largest sums of
log(weight) and Gumbel noise (Kool et al., 2019, https://arxiv.org/abs/1903.06059).
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    backends_of,
    declare,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.rng import as_arguments, seed_and_offset
from tilewise.sampling import check_logits, noise_of, rows_of


def multinomial(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Draw places of each row of weights, as likely as they weigh.

        without replacement: the num_samples largest of log(weight) + gumbel, the largest first
        with replacement: draw s is the largest of log(weight) + gumbel at offset + s

    The weights need not sum to one. Without replacement the order is that of draws one after the
    other. The noise lies where that of `tilewise.sample` does. Places that weigh nothing are never
    drawn; where there are no more others, the rest is -1. A row with a weight that is negative,
    infinite or NaN is -1 throughout.

    Args:
        probs: `[batch, vocab]` or `[vocab]`, floating point.
        num_samples: At least 1, without replacement at most vocab.
        replacement: Whether a place may come twice.
        seed: As of `tilewise.sample`.
        offset: As of `tilewise.sample`.
        generator: As of `tilewise.sample`.
        check_inputs: Raise where a row weighs nothing or has a bad weight. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch, num_samples]` or `[num_samples]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    rows = probs.unsqueeze(0) if probs.ndim == 1 else probs
    check_logits("multinomial", rows, "probs")
    if not isinstance(num_samples, int) or isinstance(num_samples, bool):
        got = type(num_samples).__name__
        raise TypeError(f"multinomial: num_samples must be an int, got {got}")
    most = rows.shape[1]
    if num_samples < 1 or (num_samples > most and not replacement):
        wanted = "at least 1" if replacement else f"from 1 to {most}, without replacement"
        raise ValueError(f"multinomial: num_samples must be {wanted}, got {num_samples}")
    if check_inputs:
        _refuse_weights(rows)
    seed, offset = seed_and_offset(
        "multinomial", rows.shape[0], rows.device, seed, offset, generator
    )
    options: dict[str, Any] = {"replacement": replacement, "seed": seed, "offset": offset}
    chosen = choose(MULTINOMIAL, backend, rows, num_samples=num_samples, **options)
    if chosen == "reference" or rows.numel() == 0 or transforming():
        drawn = multinomial_reference(rows, num_samples, **options)
    else:
        arguments = as_arguments(seed, offset)
        drawn = _forward(rows_of(rows), num_samples, replacement, True, *arguments, chosen)
    return drawn[0] if probs.ndim == 1 else drawn


def multinomial_reference(
    probs: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The rule of `multinomial`, in plain PyTorch."""
    batch, vocab = probs.shape
    seed, offset = seed_and_offset("multinomial", batch, probs.device, seed, offset, generator)
    if vocab == 0:
        return torch.full((batch, num_samples), -1, device=probs.device)
    rows = probs.to(wide_dtype(probs.dtype))
    can = ((rows >= 0) & (rows < math.inf)).all(-1, keepdim=True)
    logs = rows.log()
    if replacement:
        scores = [logs + noise_of(rows, seed, offset + s) for s in range(num_samples)]
        best, places = (t.squeeze(-1) for t in torch.stack(scores, 1).max(-1, keepdim=True))
    else:
        scored = logs + noise_of(rows, seed, offset)
        best, places = scored.sort(dim=-1, descending=True, stable=True)
        best, places = best[:, :num_samples], places[:, :num_samples]
    return torch.where(can & (best > -math.inf), places, -1)


def gumbel_argmax(
    logits: Tensor,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw one token a row from the softmax of logits, without temperature or filters.

        token = argmax of (logit + gumbel)

    The token is that of `tilewise.sample` without options.

    Args:
        logits: `[..., vocab]`, floating point.
        seed: As of `tilewise.sample`, a row being one of the flattened `[rows, vocab]`.
        offset: As of `tilewise.sample`.
        generator: As of `tilewise.sample`.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[...]`, int64.

    Raises:
        TypeError, ValueError, RuntimeError: As `tilewise.sample`.
    """
    if not logits.is_floating_point():
        raise TypeError(f"gumbel_argmax: logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError("gumbel_argmax: logits must be [..., vocab], got []")
    count = math.prod(logits.shape[:-1])
    rows = logits.reshape(count, logits.shape[-1])
    seed, offset = seed_and_offset("gumbel_argmax", count, rows.device, seed, offset, generator)
    chosen = choose(MULTINOMIAL, backend, rows, num_samples=1)
    if chosen == "reference" or rows.numel() == 0 or transforming():
        tokens = _argmax_reference(rows, seed, offset)
    else:
        tokens = _forward(rows_of(rows), 1, False, False, *as_arguments(seed, offset), chosen)
    return tokens.view(logits.shape[:-1])


def _argmax_reference(logits: Tensor, seed: Tensor | int, offset: Tensor | int) -> Tensor:
    if logits.shape[1] == 0:
        return torch.full(logits.shape[:1], -1, device=logits.device)
    rows = logits.to(wide_dtype(logits.dtype))
    top = rows.amax(-1, keepdim=True)  # NaN, if there is one
    scores = torch.where(rows == top, 0.0, rows - top) + noise_of(rows, seed, offset)
    return torch.where(top.squeeze(-1) > -math.inf, scores.argmax(-1), -1)


def _refuse_weights(rows: Tensor) -> None:
    bad = ~((rows >= 0) & (rows < math.inf))
    if bool(bad.any()):
        row, place = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            "multinomial: probs must be at least 0 and finite, "
            f"got {rows[row, place].item()} in row {row}"
        )
    nothing = ~(rows > 0).any(-1)
    if bool(nothing.any()):
        row = int(nothing.int().argmax())
        raise ValueError(f"multinomial: probs must be above 0 somewhere, got none in row {row}")


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "multinomial_forward(Tensor x, SymInt num_samples, bool replacement, bool weights,"
    " Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset, str backend) -> Tensor",
    BACKENDS,
    fake=lambda x, count, *options: x.new_empty(x.shape[0], count, dtype=torch.int64),
)


def _inputs(
    batch: int,
    vocab: int,
    num_samples: int = 1,
    replacement: bool = False,
    each: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    probs = (2 * torch.randn(batch, vocab, device=device)).exp().to(dtype)
    probs[:, ::3] = 0  # never drawn
    options: dict[str, Any] = {"num_samples": num_samples, "replacement": replacement, "seed": 1}
    if each:
        rows = torch.arange(batch, device=device)
        options |= {"seed": rows * 2**40, "offset": rows}
    return (probs,), options


MULTINOMIAL = declare(
    Op(
        name="multinomial",
        call=multinomial,
        reference=multinomial_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "vocab": 8, "num_samples": 2},
            {"batch": 0, "vocab": 64},  # empty batch
            {"batch": 2, "vocab": 1, "num_samples": 3, "replacement": True},
            {"batch": 5, "vocab": 127, "num_samples": 127},  # more than weigh anything
            {"batch": 3, "vocab": 4099, "num_samples": 20},
            {"batch": 9, "vocab": 300, "num_samples": 5, "replacement": True, "each": True},
            {"batch": 9, "vocab": 300, "num_samples": 5, "each": True},
        ],
        workloads=[
            {"batch": batch, "vocab": 128256, "num_samples": 16, "replacement": replacement}
            for batch in (1, 64)
            for replacement in (False, True)
        ],
        bytes_moved=lambda probs, num_samples, **options: (
            probs.nbytes + 8 * probs.shape[0] * num_samples
        ),
        native=lambda probs, num_samples, replacement, **places: torch.multinomial(
            probs, num_samples, replacement
        ),
        constants=frozenset({0}),
    )
)

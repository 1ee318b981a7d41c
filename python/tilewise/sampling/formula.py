"""What is left of rows of logits, in plain PyTorch: penalties, bias and mask, then the filters."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewise.op import wide_dtype
from tilewise.rng import counter_rows, gumbel


@dataclass(frozen=True)
class Ranked:
    """The tokens of each row by logit, then by index, lowest first.

    Attributes:
        tokens: `[batch, vocab]`, int64.
        logits: Theirs, adjusted, fp32 or fp64.
        scores: Less that of the first, over the temperature.
        left: Whether a token is, after all filters.
        good: `[batch, 1]`, whether the row's options are in their ranges.
        can: `[batch, 1]`, whether they are, and there is one that is left.
        temperature: `[batch, 1]` or `[1, 1]`.
    """

    tokens: Tensor
    logits: Tensor
    scores: Tensor
    left: Tensor
    good: Tensor
    can: Tensor
    temperature: Tensor

    def at(self, values: Tensor) -> Tensor:
        """Values in rank, each at its token."""
        return torch.zeros_like(values).scatter(-1, self.tokens, values)

    def probabilities(self) -> Tensor:
        """In rank, of what is left; 0 where nothing is."""
        masses = torch.where(self.left, self.scores.exp(), 0.0)
        return torch.where(self.left, masses / masses.sum(-1, keepdim=True), 0.0)


def counts_of(history: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """How often each token is in each row of `history`, `[batch, vocab]`."""
    known = (history >= 0) & (history < vocab)
    ids = torch.where(known, history, vocab)
    zeros = torch.zeros(len(history), vocab + 1, dtype=dtype, device=history.device)
    return zeros.scatter_add(1, ids, torch.ones_like(ids, dtype=dtype))[:, :vocab]


def adjusted(
    logits: Tensor,
    *,
    repetition_penalty: Tensor | float | None = None,
    presence_penalty: Tensor | float | None = None,
    frequency_penalty: Tensor | float | None = None,
    history: Tensor | None = None,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    **filters: Any,
) -> Tensor:
    """The logits in fp32, or fp64, with penalties and bias, -inf where the mask forbids."""
    dtype, vocab = wide_dtype(logits.dtype), logits.shape[1]
    logits = logits.to(dtype)
    if history is not None:
        counts = counts_of(history, vocab, dtype)
        if repetition_penalty is not None:
            r = columns(repetition_penalty, logits)
            repeated = torch.where(logits > 0, logits / r, logits * r)
            logits = torch.where(counts > 0, repeated, logits)
        if frequency_penalty is not None:
            logits = logits - columns(frequency_penalty, logits) * counts
        if presence_penalty is not None:
            logits = logits - columns(presence_penalty, logits) * (counts > 0).to(dtype)
    if logit_bias is not None:
        logits = logits + logit_bias.to(dtype)
    if mask is not None:
        bits = mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=mask.device)
        allowed = (bits & 1).flatten(1)[:, :vocab] > 0
        logits = torch.where(allowed, logits, -math.inf)
    return logits


def ranked(
    logits: Tensor,
    *,
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    **adjustments: Any,
) -> Ranked:
    """Rank the tokens of rows of at least one logit, and say which are left."""
    rows = adjusted(logits, **adjustments)
    t, p = (columns(1.0 if v is None else v, rows) for v in (temperature, top_p))
    m = columns(0.0 if min_p is None else min_p, rows)
    k = columns(0 if top_k is None else top_k, rows, torch.int64)

    rows, tokens = rows.sort(dim=-1, descending=True, stable=True)
    first = rows[:, :1]  # NaN, if there is one
    rank = torch.arange(rows.shape[1], device=rows.device)
    scores = torch.where(rows == first, 0.0, (rows - first) / t)
    left = (k == 0) | (rank < k)
    mass = torch.where(left, scores.exp(), 0.0).cumsum(-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    left = left & ((p >= 1) | (before < p * mass[:, -1:]))
    left = left & ((m <= 0) | (rows >= first + t * m.log()))
    left = (left & (t > 0)) | (rank == 0)
    left = left & (rows > -math.inf) & ((rows == first) | (first < math.inf))

    good = (t >= 0) & (t < math.inf) & (k >= 0) & (p >= 0) & (p <= 1) & (m >= 0) & (m <= 1)
    good = good & _penalties_are_good(rows, **adjustments)
    return Ranked(tokens, rows, scores, left, good, good & (first > -math.inf), t)


def filtered(logits: Tensor, **options: Any) -> Tensor:
    """The probability with which each token is drawn; NaN in a row that has none."""
    if logits.numel() == 0:
        return logits.new_empty(logits.shape, dtype=wide_dtype(logits.dtype))
    found = ranked(logits, **options)
    return torch.where(found.can, found.at(found.probabilities()), math.nan)


def _penalties_are_good(rows: Tensor, **adjustments: Any) -> Tensor:
    good = torch.ones(1, 1, dtype=torch.bool, device=rows.device)
    for name in ("presence_penalty", "frequency_penalty"):
        if adjustments.get(name) is not None:
            good = good & columns(adjustments[name], rows).isfinite()
    if adjustments.get("repetition_penalty") is not None:
        r = columns(adjustments["repetition_penalty"], rows)
        good = good & (r > 0) & (r < math.inf)
    return good


def columns(value: Tensor | float, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A number for all rows, or one a row, as a column."""
    dtype = like.dtype if dtype is None else dtype
    if isinstance(value, Tensor):
        return value.to(dtype).unsqueeze(-1)
    return torch.full((1, 1), value, device=like.device, dtype=dtype)


def noise_of(like: Tensor, seed: Tensor | int, offset: Tensor | int) -> Tensor:
    """The Gumbel noise of `[batch, vocab]`."""
    batch, vocab = like.shape
    rows = counter_rows(seed, batch, like.device)
    return gumbel(seed, offset, rows, vocab, like.dtype)

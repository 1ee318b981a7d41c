"""Drawing tokens from logits: top-k (Fan et al., 2018, https://arxiv.org/abs/1805.04833), top-p
(Holtzman et al., 2019, https://arxiv.org/abs/1904.09751), min-p (Nguyen et al., 2024,
https://arxiv.org/abs/2407.01082) and the repetition penalty of Keskar et al. (2019,
https://arxiv.org/abs/1909.05858), by the Gumbel-max rule (https://arxiv.org/abs/1411.0030).
"""

import math
from functools import partial
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
from tilewise.plan import planned
from tilewise.rng import as_arguments, seed_and_offset, seeded
from tilewise.sampling import (
    OPTIONS,
    as_options,
    check_logits,
    checked,
    filters_inputs,
    noise_of,
    ranked,
    refuse_gradient,
    rows_of,
)


@seeded
@partial(planned, varying=("seed", "offset"))
def sample(
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
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Draw one token a row, from the softmax of `logits / temperature` cut to its likeliest tokens.

        token = argmax over the tokens left of (logit / temperature + gumbel)

    First the logits are adjusted. Of a token that is in the row's history `count` times, at least
    once,

        logit = (logit / repetition if logit > 0 else logit * repetition)
                - frequency * count - presence

    then the bias is added to every logit, and those that the mask forbids become -inf.

    Tokens are ranked by logit, then by index, lowest first. Left are the first `top_k` of them, of
    these the shortest prefix whose probability, within the `top_k`, reaches `top_p`, and of these
    those at least `min_p` times as likely as the first one; the first one always. Temperature 0
    takes the first one. The noise is that of `tilewise.rng.gumbel` at column = token and row =
    place in the batch, or row 0 with one seed a row. All backends draw the same tokens, but where
    two scores are as near as rounding.

    A row with NaN, with every logit -inf, or with an option of its own that is out of range gives
    -1. Tokens of logit -inf are never drawn. Where some are +inf, those share the draw.

    Args:
        logits: `[batch, vocab]`, floating point.
        temperature: At least 0 and finite; or `[batch]`, floating point.
        top_k: At least 0, where 0 is off; or `[batch]`, int64 or int32. None is off.
        top_p: From 0 to 1, where 1 is off; or `[batch]`, floating point. None is off.
        min_p: From 0 to 1, where 0 is off; or `[batch]`, floating point. None is off.
        repetition_penalty: Above 0, where 1 is off; or `[batch]`, floating point. None is off.
        presence_penalty: Finite, where 0 is off; or `[batch]`, floating point. None is off.
        frequency_penalty: Finite, where 0 is off; or `[batch]`, floating point. None is off.
        history: `[batch, length]`, int64, the tokens that penalties are for; what is no token, as
            the padding -1, is ignored.
        logit_bias: `[vocab]` or `[batch, vocab]`, floating point.
        mask: `[batch, ceil(vocab / 32)]`, int32: bit i of word w, the lowest first, allows token
            32 w + i.
        seed: int64; or a tensor `[]` or, one a row, `[batch]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        check_inputs: Raise where a row would give -1. Waits for the device.
        backend: "cuda", "numba", "triton" or "reference". None picks the first that can run.

    Returns:
        `[batch]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, a penalty has no history, seed and generator are
            both given, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
        NotImplementedError: If `backend` lacks an option.
    """
    check_logits("sample", logits)
    options = checked(
        "sample", logits, check_inputs, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, history=history, logit_bias=logit_bias, mask=mask,
    )  # fmt: skip
    seed, offset = seed_and_offset(
        "sample", logits.shape[0], logits.device, seed, offset, generator
    )
    chosen = choose(SAMPLE, backend, logits, **options, seed=seed, offset=offset)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        return sample_reference(logits, **options, seed=seed, offset=offset)
    rows = rows_of(logits)
    arguments = as_options(rows, options)
    tokens: Tensor = _forward(rows, *arguments, *as_arguments(seed, offset), chosen)
    return tokens


def sample_reference(
    logits: Tensor,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    **options: Any,
) -> Tensor:
    """The rule of `sample`, in plain PyTorch."""
    batch, vocab = logits.shape
    seed, offset = seed_and_offset("sample", batch, logits.device, seed, offset, generator)
    if vocab == 0:
        return torch.full((batch,), -1, device=logits.device)
    found = ranked(logits, **options)
    noise = noise_of(found.logits, seed, offset).gather(-1, found.tokens)
    scores = torch.where(found.left, found.scores + noise, -math.inf)
    best = scores.argmax(-1, keepdim=True)
    return torch.where(found.can, found.tokens.gather(-1, best), -1).squeeze(-1)


def sample_with_logprobs(
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
    top_logprobs: int = 0,
    processed: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw as `tilewise.sample`, and say how likely the token was, and which tokens were likeliest.

        logprob = log_softmax(logits)[token]

    of the logits as they were given; with `processed` as they were drawn from, adjusted, over the
    temperature and filtered. The likeliest come in rank; where there are no more of a probability
    above 0 they are -1, of log -inf. Where the token is -1, or logits as they were given have NaN
    or +inf, all of them are -1 and all logs NaN. There is no gradient.

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
        top_logprobs: How many of the likeliest, from 0 to vocab.
        processed: Whether after all filters.
        seed: As of `tilewise.sample`.
        offset: As of `tilewise.sample`.
        generator: As of `tilewise.sample`.
        check_inputs: Raise where a row would give -1. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        Tokens, `[batch]`, int64, those of `sample`; their logs, `[batch]`, fp32, or fp64 for fp64;
        logs and tokens of the likeliest, `[batch, top_logprobs]`.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, a penalty has no history, seed and generator are
            both given, the logits require a gradient, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    name = "sample_with_logprobs"
    check_logits(name, logits)
    refuse_gradient(name, "logits", logits)
    if not isinstance(top_logprobs, int) or isinstance(top_logprobs, bool):
        got = type(top_logprobs).__name__
        raise TypeError(f"{name}: top_logprobs must be an int, got {got}")
    if not 0 <= top_logprobs <= logits.shape[1]:
        raise ValueError(
            f"{name}: top_logprobs must be from 0 to {logits.shape[1]}, got {top_logprobs}"
        )
    options = checked(
        name, logits, check_inputs, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, history=history, logit_bias=logit_bias, mask=mask,
    )  # fmt: skip
    seed, offset = seed_and_offset(name, logits.shape[0], logits.device, seed, offset, generator)
    more: dict[str, Any] = {
        "top_logprobs": top_logprobs,
        "processed": processed,
        "seed": seed,
        "offset": offset,
    }
    chosen = choose(SAMPLE_WITH_LOGPROBS, backend, logits, **options, **more)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        return sample_with_logprobs_reference(logits, **options, **more)
    rows = rows_of(logits)
    arguments = (*as_options(rows, options), top_logprobs, bool(processed))
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = _forward_with_logprobs(rows, *arguments, *as_arguments(seed, offset), chosen)
    return found


def sample_with_logprobs_reference(
    logits: Tensor,
    *,
    top_logprobs: int = 0,
    processed: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rule of `sample_with_logprobs`, in plain PyTorch."""
    tokens = sample_reference(logits, seed=seed, offset=offset, generator=generator, **options)
    rows = logits.to(wide_dtype(logits.dtype))
    if logits.numel() == 0:
        nothing = rows.new_empty(len(tokens), 0)
        return tokens, rows.new_full(tokens.shape, math.nan), nothing, nothing.long()
    known = (tokens >= 0).unsqueeze(-1)
    if processed:
        found = ranked(logits, **options)
        logs, order = torch.where(found.left, found.scores, -math.inf), found.tokens
        logs = logs - logs.exp().sum(-1, keepdim=True).log()
    else:
        rows, order = rows.sort(dim=-1, descending=True, stable=True)
        logs, known = rows.log_softmax(-1), known & (rows[:, :1] < math.inf)
    logs = torch.where(known, logs, math.nan)
    ranks = (order == tokens.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    first = logs[:, :top_logprobs]
    named = torch.where(first > -math.inf, order[:, :top_logprobs], -1)
    return tokens, logs.gather(-1, ranks).squeeze(-1), first.contiguous(), named


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    f"sample_forward(Tensor logits, {OPTIONS}, Tensor? seeds, Tensor? offsets, SymInt seed,"
    " SymInt offset, str backend) -> Tensor",
    BACKENDS,
    fake=lambda logits, *options: logits.new_empty(logits.shape[0], dtype=torch.int64),
)

_forward_with_logprobs = register(
    f"sample_with_logprobs_forward(Tensor logits, {OPTIONS}, SymInt top_logprobs, bool processed,"
    " Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    BACKENDS,
    fake=lambda logits, *options: _with_logprobs(logits, options[-7]),
)


def _with_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, wide = logits.shape[0], wide_dtype(logits.dtype)
    tokens, logs = logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=wide)
    named = logits.new_empty(batch, count, dtype=torch.int64)
    return tokens, logs, logits.new_empty(batch, count, dtype=wide), named


def _inputs(
    batch: int,
    vocab: int,
    top_logprobs: int = -1,
    processed: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
    **filters: Any,
) -> Inputs:
    tensors, options = filters_inputs(batch, vocab, device=device, dtype=dtype, **filters)
    options["seed"] = 1
    if top_logprobs >= 0:
        options |= {"top_logprobs": top_logprobs, "processed": processed}
    if filters.get("each"):
        rows = torch.arange(batch, device=device)
        options |= {"seed": rows * 2**40, "offset": rows}
    return tensors, options


SAMPLE = declare(
    Op(
        name="sample",
        call=sample,
        reference=sample_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "vocab": 8},
            {"batch": 0, "vocab": 64},  # empty batch
            {"batch": 3, "vocab": 0},  # no token at all
            {"batch": 2, "vocab": 1},
            {"batch": 5, "vocab": 127, "top_k": 50},  # one short of a block, rows misaligned
            {"batch": 3, "vocab": 4099, "top_p": 0.9},  # several blocks
            {"batch": 2, "vocab": 3001, "top_k": 300, "top_p": 0.7},
            {"batch": 9, "vocab": 129, "each": True},
            {"batch": 5, "vocab": 1000, "min_p": 0.02},
            {"batch": 2, "vocab": 9001, "min_p": 0.02},  # a row in parts
            {"batch": 2, "vocab": 8200, "top_k": 50, "top_p": 0.9},  # and its cuts on a list
            {"batch": 1, "vocab": 8200, "top_k": 600, "top_p": 0.7},
            {"batch": 4, "vocab": 515, "adjust": True},
            {"batch": 9, "vocab": 129, "each": True, "adjust": True, "min_p": 0.05},
        ],
        workloads=[
            {"batch": batch, "vocab": vocab, **options}
            for batch in (1, 8, 64)
            for vocab in (32000, 128256)
            for options in (
                {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {},
                {"min_p": 0.05, "top_p": 0.95, "adjust": True},
            )
        ],
        bytes_moved=lambda logits, **options: logits.nbytes + 8 * logits.shape[0],
    )
)  # fmt: skip

SAMPLE_WITH_LOGPROBS = declare(
    Op(
        name="sample_with_logprobs",
        call=sample_with_logprobs,
        reference=sample_with_logprobs_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "vocab": 8, "top_logprobs": 2},
            {"batch": 0, "vocab": 64, "top_logprobs": 0},  # empty batch
            {"batch": 3, "vocab": 0, "top_logprobs": 0},  # no token at all
            {"batch": 2, "vocab": 1, "top_logprobs": 1},
            {"batch": 5, "vocab": 127, "top_k": 50, "top_logprobs": 5},
            {"batch": 3, "vocab": 4099, "top_p": 0.9, "top_logprobs": 20, "processed": True},
            {"batch": 9, "vocab": 129, "each": True, "adjust": True, "top_logprobs": 129},
            {"batch": 4, "vocab": 515, "top_k": 30, "adjust": True, "top_logprobs": 7,
             "processed": True},
        ],
        workloads=[
            {"batch": batch, "vocab": 128256, "top_p": 0.9, "top_logprobs": count}
            for batch in (1, 64)
            for count in (0, 20)
        ],
        bytes_moved=lambda logits, **options: 2 * logits.nbytes,
        constants=frozenset({0}),
    )
)  # fmt: skip

"""Speculative decoding: which drafted tokens stand, and the one after them (Leviathan et al., 2022,
https://arxiv.org/abs/2211.17192).
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
from tilewise.rng import as_arguments, counter_rows, gumbel, seed_and_offset, uniform
from tilewise.sampling import (
    OPTIONS,
    as_options,
    checked,
    filtered,
    filters_inputs,
    refuse_gradient,
    rows_of,
)

# Columns past those of any token: of the number that decides on a draft, and of the noise of what
# takes its place. So a draft may be drawn by `sample` from the same seed and offsets.
ACCEPTANCE, REPLACEMENT = 1 << 32, 1 << 33


def verify_draft(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_logits: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens so that what comes out is distributed as draws from the target.

        p = tilewise.filtered_probs(target_logits), q = draft_probs
        token i stands if those before it do and u < p_i(token) / q_i(token)
        the one after them is drawn from max(p_i - q_i, 0), and after the last one from p_n

    The options filter the target alone, at each position; of a token that was drafted before that
    position the penalties know too. What a draft was filtered by must be in `draft_probs`. A token
    of -1, or none of the vocabulary, is no draft: what comes there is drawn from p. Where the
    target's row has no token there is -1.

    Position i takes the numbers of `tilewise.rng` at offset + i: u at column 2^32, Gumbel noise at
    column 2^33 + token. So drafts may be drawn by `sample` from the same seed and offsets.

    Args:
        draft_tokens: `[batch, draft]`, int64.
        draft_probs: `[batch, draft, vocab]`, floating point: what each was drawn from.
        target_logits: `[batch, draft + 1, vocab]`, floating point.
        temperature: As of `tilewise.sample`, one a sequence or for all, like all that follow.
        top_k: The first of them in rank.
        top_p: Of these the shortest prefix of this probability.
        min_p: Of these those at least so many times as likely as the first.
        repetition_penalty: Of the tokens of `history` and of the draft.
        presence_penalty: Of the tokens of `history` and of the draft.
        frequency_penalty: Of the tokens of `history` and of the draft.
        history: `[batch, length]`, int64; may be of length 0.
        logit_bias: `[vocab]` or `[batch, vocab]`, floating point.
        mask: `[batch, ceil(vocab / 32)]`, or `[batch, draft + 1, ceil(vocab / 32)]`, int32.
        seed: int64; or a tensor `[]` or, one a sequence, `[batch]`. None draws one on the device.
        offset: int64, or a tensor like that of `seed`: of position 0. None is 0.
        generator: Draws the seed, where none is given.
        check_inputs: Raise where a row of the target has no token. Waits for the device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        How many stand, `[batch]`, int64; and they, the one after them, and -1 from there on,
        `[batch, draft + 1]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, a penalty has no history, seed and generator are
            both given, a gradient is required, or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    _check(draft_tokens, draft_probs, target_logits)
    given: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "history": history, "logit_bias": logit_bias,
    }  # fmt: skip
    sequences = target_logits[:, 0]
    spread = mask is not None and mask.ndim == 3
    checked("verify_draft", sequences, False, **given, mask=None if spread else mask)
    options = _of_positions(draft_tokens, given | {"mask": mask})
    rows = target_logits.flatten(0, 1)
    checked("verify_draft", rows, check_inputs, **options)
    seed, offset = seed_and_offset(
        "verify_draft", len(sequences), sequences.device, seed, offset, generator
    )
    tensors, places = (draft_tokens, draft_probs, target_logits), (seed, offset)
    chosen = choose(VERIFY_DRAFT, backend, *tensors, **given, mask=mask, seed=seed, offset=offset)
    if chosen == "reference" or rows.numel() == 0 or transforming():
        probs = filtered(rows, **options)
        return _verify(draft_tokens, draft_probs, target_logits.shape, probs, *places)
    rows = rows_of(rows)
    q = draft_probs.to(wide_dtype(rows.dtype)).contiguous()
    arguments = (*as_options(rows, options), *as_arguments(*places), chosen)
    found: tuple[Tensor, Tensor] = _forward(draft_tokens.contiguous(), q, rows, *arguments)
    return found


def verify_draft_reference(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_logits: Tensor,
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """The rule of `verify_draft`, in plain PyTorch."""
    batch = len(draft_tokens)
    places = seed_and_offset("verify_draft", batch, target_logits.device, seed, offset, generator)
    rows = target_logits.flatten(0, 1)
    probs = filtered(rows, **_of_positions(draft_tokens, given))
    return _verify(draft_tokens, draft_probs, target_logits.shape, probs, *places)


def _verify(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    shape: torch.Size,
    probs: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
) -> tuple[Tensor, Tensor]:
    batch, positions, vocab = shape
    place = torch.arange(positions, device=probs.device)
    if vocab == 0:
        return place.new_zeros(batch), place.new_full((batch, positions), -1)
    p, q = probs.view(shape), draft_probs.to(probs.dtype)
    known = (draft_tokens >= 0) & (draft_tokens < vocab)
    tokens = torch.where(known, draft_tokens, 0).unsqueeze(-1)
    row = counter_rows(seed, batch, probs.device)
    row = row.unsqueeze(-1) if isinstance(row, Tensor) else row
    seed = seed.unsqueeze(-1) if isinstance(seed, Tensor) and seed.ndim else seed
    offset = offset.unsqueeze(-1) if isinstance(offset, Tensor) and offset.ndim else offset
    offset = (offset + place).expand(batch, -1)

    u = uniform(seed, offset, row, 1, torch.float64, ACCEPTANCE)[:, :-1, 0]
    p_drafted, q_drafted = (t.gather(-1, tokens).squeeze(-1).double() for t in (p[:, :-1], q))
    stands = known & (u * q_drafted < p_drafted)
    accepted = stands.long().cumprod(-1).sum(-1)

    at = accepted.view(-1, 1, 1)
    q = torch.where(known.unsqueeze(-1), q, 0.0)
    q = torch.nn.functional.pad(q, (0, 0, 0, 1)).gather(1, at.expand(-1, 1, vocab)).squeeze(1)
    p = p.gather(1, at.expand(-1, 1, vocab)).squeeze(1)
    rest = (p - q).clamp(min=0)
    rest = torch.where((rest > 0).any(-1, keepdim=True), rest, p)  # there is none but by rounding
    noise = gumbel(seed, offset, row, vocab, p.dtype, REPLACEMENT).gather(
        1, at.expand(-1, 1, vocab)
    )
    scores = torch.where(rest > 0, rest.log() + noise.squeeze(1), -math.inf)
    last = torch.where(p.isnan().any(-1), -1, scores.argmax(-1))
    drafted = torch.nn.functional.pad(draft_tokens, (0, 1), value=-1)
    here = accepted.unsqueeze(-1)
    drafted = torch.where(place < here, drafted, torch.where(place == here, last.unsqueeze(-1), -1))
    return accepted, drafted


def _of_positions(draft_tokens: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Options of sequences as those of `[batch * (draft + 1)]` rows."""
    draft = draft_tokens.shape[1]
    positions = draft + 1
    options = {
        name: value.repeat_interleave(positions, 0)
        if isinstance(value, Tensor) and (value.ndim > 1 or name != "logit_bias")
        else value
        for name, value in given.items()
        if name not in ("history", "mask")
    }
    history, mask = given.get("history"), given.get("mask")
    if history is not None:
        place = torch.arange(positions, device=history.device).unsqueeze(-1)
        before = torch.arange(draft, device=history.device) < place
        known = torch.where(before, draft_tokens.unsqueeze(1), -1)
        past = history.unsqueeze(1).expand(-1, positions, -1)
        history = torch.cat([past, known], -1).flatten(0, 1)
    if mask is not None:
        mask = mask.unsqueeze(1).expand(-1, positions, -1) if mask.ndim == 2 else mask
        mask = mask.flatten(0, 1)
    return options | {"history": history, "mask": mask}


def _check(draft_tokens: Tensor, draft_probs: Tensor, target_logits: Tensor) -> None:
    op = "verify_draft"
    if draft_tokens.dtype != torch.int64:
        raise TypeError(f"{op}: draft_tokens must be torch.int64, got {draft_tokens.dtype}")
    if draft_tokens.ndim != 2:
        raise ValueError(
            f"{op}: draft_tokens must be [batch, draft], got {list(draft_tokens.shape)}"
        )
    batch, draft = draft_tokens.shape
    vocab = target_logits.shape[-1] if target_logits.ndim == 3 else "vocab"
    wanted = {"target_logits": [batch, draft + 1, vocab], "draft_probs": [batch, draft, vocab]}
    for name, x in {"target_logits": target_logits, "draft_probs": draft_probs}.items():
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
        if list(x.shape) != wanted[name]:
            said = ", ".join(map(str, wanted[name]))
            raise ValueError(f"{op}: {name} must be [{said}], got {list(x.shape)}")
        if x.device != draft_tokens.device:
            raise RuntimeError(f"{op}: {name} must be on {draft_tokens.device}, got {x.device}")
        refuse_gradient(op, name, x)


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all, leading=2)

_forward = register(
    "verify_draft_forward(Tensor draft_tokens, Tensor draft_probs, Tensor target_logits,"
    f" {OPTIONS}, Tensor? seeds, Tensor? offsets, SymInt seed, SymInt offset, str backend)"
    " -> (Tensor, Tensor)",
    BACKENDS,
    fake=lambda draft_tokens, *rest: (
        draft_tokens.new_empty(draft_tokens.shape[0]),
        draft_tokens.new_empty(draft_tokens.shape[0], draft_tokens.shape[1] + 1),
    ),
)


def _inputs(
    batch: int, draft: int, vocab: int, *, device: str, dtype: torch.dtype, **filters: Any
) -> Inputs:
    rows = batch * (draft + 1)
    (logits,), options = filters_inputs(rows, vocab, device=device, dtype=dtype, **filters)
    assert logits is not None
    logits = logits.view(batch, draft + 1, vocab)
    near = logits[:, :-1].float() + torch.randn(batch, draft, vocab, device=device)
    draft_probs = near.softmax(-1).to(dtype)
    draft_tokens = near.argmax(-1)
    return (draft_tokens, draft_probs, logits), options | {"seed": 1}


VERIFY_DRAFT = declare(
    Op(
        name="verify_draft",
        call=verify_draft,
        reference=verify_draft_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "draft": 2, "vocab": 8},
            {"batch": 0, "draft": 2, "vocab": 64},  # empty batch
            {"batch": 2, "draft": 3, "vocab": 1},
            {"batch": 3, "draft": 4, "vocab": 127, "top_k": 50},
            {"batch": 3, "draft": 5, "vocab": 4099, "top_p": 0.9},
            {"batch": 4, "draft": 0, "vocab": 300, "min_p": 0.05},  # nothing is drafted
        ],
        workloads=[
            {"batch": batch, "draft": 5, "vocab": 128256, "top_p": 0.9} for batch in (1, 16)
        ],
        bytes_moved=lambda draft_tokens, draft_probs, target_logits, **options: (
            target_logits.nbytes + draft_probs.nbytes
        ),
        constants=frozenset({0, 1, 2}),
    )
)

"""Texts that are continued together, each by options of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tilewise.models.decoder import Decoder
from tilewise.models.generation import generate
from tilewise.models.text import encode, end_token, last_piece, text_writer
from tilewise.sampling import NUMBERS, refuse_number

OFF = {"top_k": 0} | {name: number.off for name, number in NUMBERS.items()}


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it; numbers are those of `tilewise.sample`.

    Attributes:
        prompt: May be empty: the text then begins a document.
        max_tokens: How many tokens to draw, at most.
        stop: Texts before which the continuation ends.
        seed: With it the continuation does not depend on the other requests, but for rounding.
            None takes one from torch's generator.
        logit_bias: What is added to the logits of some tokens; -inf forbids one.
    """

    prompt: str
    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None


def complete(
    model: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], *, together: int = 32
) -> Iterator[tuple[int, str]]:
    """Continue texts, yielding each piece as soon as it is sure, with the number of its request.

    Those with the shortest prompts come first.

    Args:
        model: A decoder.
        tokenizer: That it was trained with.
        requests: What to continue.
        together: How many are drawn at a time, at most: each of them has room in the cache.

    Returns:
        An iterator of (number, piece). The pieces of a number, joined, are its continuation.

    Raises:
        ValueError: If `together` is below 1; as `generate` and `tilewise.sample`, before the first
            piece of its batch.
    """
    if together < 1:
        raise ValueError(f"complete: together must be at least 1, got {together}")
    prompts = [encode(tokenizer, request.prompt) or [end_token(tokenizer)] for request in requests]
    order = sorted(range(len(requests)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(order), together):
        numbers = order[begin : begin + together]
        batch = [requests[i] for i in numbers]
        tokens = [prompts[i] for i in numbers]
        for place, piece in _complete_batch(model, tokenizer, batch, tokens):
            yield numbers[place], piece


def _complete_batch(
    model: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], prompts: list[list[int]]
) -> Iterator[tuple[int, str]]:
    device = next(model.parameters()).device
    writers = [text_writer(tokenizer, request.stop) for request in requests]
    for writer in writers:
        next(writer)
    going = [request.max_tokens > 0 for request in requests]
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    drawn = generate(
        model,
        pad_sequence(rows, batch_first=True),
        prompt_lengths=torch.tensor([len(row) for row in rows], device=device),
        max_tokens=max(request.max_tokens for request in requests),
        **_options(requests, model.config.vocab_size, device),
    )
    for step, tokens in enumerate(drawn, 1):
        for i, token in enumerate(tokens.tolist()):
            if not going[i]:
                continue
            try:
                piece = writers[i].send(token)  # -1, of a full context, is its last
            except StopIteration as over:
                piece, going[i] = over.value, False
            else:
                if step == requests[i].max_tokens:
                    piece, going[i] = piece + last_piece(writers[i]), False
            if piece:
                yield i, piece
        if not any(going):
            return
    for i, writer in enumerate(writers):  # the context of the shortest is full
        if going[i] and (piece := last_piece(writer)):
            yield i, piece


def _options(requests: Sequence[Request], vocab: int, device: torch.device) -> dict[str, Any]:
    """The options of all, one a row; those that nobody has are left out."""
    options: dict[str, Any] = {
        "seed": torch.tensor(
            [int(torch.randint(2**63 - 1, ())) if r.seed is None else r.seed for r in requests],
            device=device,
        ),
    }
    for name, off in OFF.items():
        values = [getattr(request, name) for request in requests]
        if any(value is not None for value in values):
            given = [off if value is None else value for value in values]
            for value in given:
                refuse_number("sample", name, value)
            options[name] = torch.tensor(given, device=device)
    if any(request.logit_bias for request in requests):
        options["logit_bias"] = torch.stack([bias_of(r.logit_bias, vocab) for r in requests]).to(
            device
        )
    return options


def bias_of(pairs: Sequence[tuple[int, float]], vocab: int) -> Tensor:
    """The bias, `[vocab]`, that adds to the logits of some tokens.

    Raises:
        ValueError: If one is no token.
    """
    bias = torch.zeros(vocab)
    for token, value in pairs:
        if not 0 <= token < vocab:
            raise ValueError(f"logit_bias: must be of tokens from 0 to {vocab - 1}, got {token}")
        bias[token] = value
    return bias

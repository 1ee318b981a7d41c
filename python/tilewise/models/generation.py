"""Sequences from a model, a token at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilewise.models.decoder import Decoder
from tilewise.models.encoder_decoder import EncoderDecoder
from tilewise.ops.sample import sample


def generate(
    model: Decoder,
    prompt_tokens: Tensor,
    *,
    max_tokens: int,
    prompt_lengths: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    stop_token: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Continue a batch of prompts, yielding the next token of each as soon as it is drawn.

    The model is in evaluation mode until the iterator ends: after `max_tokens`, when every sequence
    has met `stop_token`, or when the context is full.

    Args:
        model: A decoder.
        prompt_tokens: `[batch, seq]`, int64, on the device of the model, at least one each.
        max_tokens: How many tokens to draw for each prompt, at most.
        prompt_lengths: `[batch]`, int64: how many tokens of each row are its prompt, at least one;
            what stands behind them does not count. None is all.
        temperature: Divides the logits; 0 takes the likeliest token. A number, or one a sequence,
            `[batch]`, like all options.
        top_k: Draw only from so many likeliest tokens.
        top_p: Draw only from the likeliest tokens that make up this probability.
        seed: The same seed draws the same tokens; with one a sequence, whatever the others are.
            None takes one from torch's generator.
        stop_token: The token after which a sequence is over; from then on it yields this token, as
            does one whose context is full while a shorter one goes on, or -1 without one.
        options: What else `tilewise.sample` knows: min_p, penalties, of the tokens of the sequence
            so far, logit_bias and mask.

    Returns:
        An iterator of tokens, `[batch]`, int64.

    Raises:
        TypeError: If the prompt is not int64.
        ValueError: If the prompt is not `[batch, seq]`, is empty or longer than the context, a
            length is not of a prompt, or `max_tokens` is negative; at the first token if an option
            of `sample` is out of range.
    """
    context, lengths = model.config.context, prompt_lengths
    count = _count("generate", "prompt_tokens", prompt_tokens, context, max_tokens)
    room = None  # in the context, for what is drawn
    if lengths is not None:
        _require_lengths(prompt_tokens, lengths)
        behind = torch.arange(prompt_tokens.shape[1], device=lengths.device) >= lengths[:, None]
        prompt_tokens, room = prompt_tokens.masked_fill(behind, 0), context + 1 - lengths
        count = min(max_tokens, max(room.tolist(), default=0))

    def start() -> Callable[[Tensor], Tensor]:
        capacity = min(prompt_tokens.shape[1] + count, context)
        cache = model.make_cache(prompt_tokens.shape[0], capacity)

        def read(tokens: Tensor) -> Tensor:
            is_prompt = not cache[0].length
            y = model.features(tokens, cache=cache)
            if lengths is None or not is_prompt:
                return y[:, -1]
            for layer in cache:
                layer.keep(lengths)
            return y[torch.arange(len(y), device=y.device), lengths - 1]

        return read

    known = prompt_tokens if lengths is None else prompt_tokens.masked_fill(behind, -1)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": _seed(seed)}
    return _stream(model, start, prompt_tokens, known, count, room, stop_token, options)


def translate(
    model: EncoderDecoder,
    source: Tensor,
    start_tokens: Tensor,
    *,
    max_tokens: int,
    source_mask: Tensor | None = None,
    temperature: Tensor | float = 0.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    stop_token: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Write the targets of a batch of sources, yielding the next token of each as it is drawn.

    Args:
        model: An encoder and decoder.
        source: `[batch, source_seq]`, int64.
        start_tokens: `[batch, seq]`, int64: how each target begins, such as a start token each.
        max_tokens: As in `generate`.
        source_mask: `[batch, source_seq]`, bool, False where there is only padding.
        temperature: As in `generate`, but by default the likeliest token is taken.
        top_k: As in `generate`.
        top_p: As in `generate`.
        seed: As in `generate`.
        stop_token: As in `generate`.
        options: As in `generate`; penalties are of the tokens of the target so far.

    Returns:
        An iterator of tokens, `[batch]`, int64.

    Raises:
        TypeError, ValueError: As `generate`, and at the first token as `EncoderDecoder.encode`.
    """
    context = model.config.context
    count = _count("translate", "start_tokens", start_tokens, context, max_tokens)

    def start() -> Callable[[Tensor], Tensor]:
        memory = model.encode(source, source_mask)
        cache = model.make_cache(memory, start_tokens.shape[1] + count)

        def read(tokens: Tensor) -> Tensor:
            return model.decode(tokens, memory, source_mask=source_mask, cache=cache)[:, -1]

        return read

    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": _seed(seed)}
    return _stream(model, start, start_tokens, start_tokens, count, None, stop_token, options)


def _count(function: str, name: str, tokens: Tensor, context: int, max_tokens: int) -> int:
    """How many tokens there is room for after `tokens`; the last one need not be read."""
    if tokens.dtype != torch.int64:
        raise TypeError(f"{function}: {name} must be torch.int64, got {tokens.dtype}")
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(
            f"{function}: {name} must be [batch, seq] with at least one token, "
            f"got {list(tokens.shape)}"
        )
    if tokens.shape[1] > context:
        raise ValueError(
            f"{function}: {name} must have at most {context} positions, the context of the model, "
            f"got {tokens.shape[1]}"
        )
    if max_tokens < 0:
        raise ValueError(f"{function}: max_tokens must be at least 0, got {max_tokens}")
    return min(max_tokens, context - tokens.shape[1] + 1)


def _require_lengths(prompt_tokens: Tensor, lengths: Tensor) -> None:
    batch, seq = prompt_tokens.shape
    if lengths.dtype != torch.int64:
        raise TypeError(f"generate: prompt_lengths must be torch.int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"generate: prompt_lengths must be [batch] = [{batch}], got {list(lengths.shape)}"
        )
    given = lengths.tolist()
    if min(given, default=1) < 1 or max(given, default=1) > seq:
        raise ValueError(f"generate: prompt_lengths must be from 1 to {seq}, got {given}")


def _seed(seed: Tensor | int | None) -> Tensor | int:
    return int(torch.randint(2**63 - 1, ())) if seed is None else seed


@torch.no_grad()
def _stream(
    model: Decoder | EncoderDecoder,
    start: Callable[[], Callable[[Tensor], Tensor]],
    tokens: Tensor,
    known: Tensor,
    count: int,
    room: Tensor | None,
    stop_token: int | None,
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """Read what there is, then each token drawn; what step n draws depends on the seed and n.

    `known`: the tokens that penalties know, -1 where there is none. `room`: for how many tokens
    there is room in each sequence; None is for `count`.
    """
    training = model.training
    penalised = any(name.endswith("_penalty") and x is not None for name, x in options.items())
    history = torch.nn.functional.pad(known, (0, count), value=-1) if penalised else None
    ending = -1 if stop_token is None else stop_token
    model.eval()
    try:
        read = start()
        over = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for step in range(count):
            logits = model.head(read(tokens))
            if history is not None:
                options["history"] = history[:, : known.shape[1] + step]
            drawn = sample(logits, **options, offset=step)
            if room is not None:
                over |= step >= room
            if stop_token is not None or room is not None:
                drawn = drawn.masked_fill(over, ending)
            if stop_token is not None:
                over |= drawn == stop_token
            yield drawn
            if stop_token is not None and bool(over.all()):
                return
            if history is not None:
                history[:, known.shape[1] + step] = drawn
            tokens = drawn[:, None]
    finally:
        model.train(training)

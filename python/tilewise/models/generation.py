"""Text from a decoder, a token at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

import tilewise
from tilewise.models.decoder import Decoder


def generate(
    model: Decoder,
    prompt_tokens: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue a batch of prompts, yielding the next token of each as soon as it is drawn.

    The model is in evaluation mode until the iterator ends. It ends after `max_tokens`, when every
    sequence has met `stop_token`, or when the context is full.

    Args:
        model: A decoder.
        prompt_tokens: `[batch, seq]`, int64, on the device of the model, at least one each.
        max_tokens: How many tokens to draw for each prompt, at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw only from so many likeliest tokens.
        top_p: Draw only from the likeliest tokens that make up this probability.
        seed: The same seed draws the same tokens. None takes one from torch's generator.
        stop_token: The token after which a sequence is over; from then on it yields this token.

    Returns:
        An iterator of tokens, `[batch]`, int64.

    Raises:
        TypeError: If the prompt is not int64.
        ValueError: If the prompt is not `[batch, seq]`, empty, or longer than the context, or an
            option is out of range.
    """
    if prompt_tokens.dtype != torch.int64:
        raise TypeError(f"generate: prompt must be torch.int64, got {prompt_tokens.dtype}")
    if prompt_tokens.ndim != 2 or not prompt_tokens.shape[1]:
        raise ValueError(
            "generate: prompt must be [batch, seq] with at least one token, "
            f"got {list(prompt_tokens.shape)}"
        )
    context, length = model.config.context, prompt_tokens.shape[1]
    if length > context:
        raise ValueError(
            f"generate: prompt must have at most {context} tokens, the context of the model, "
            f"got {length}"
        )
    if max_tokens < 0:
        raise ValueError(f"generate: max_tokens must be at least 0, got {max_tokens}")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    count = min(max_tokens, context - length + 1)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return _stream(model, prompt_tokens, count, options, stop_token)


@torch.no_grad()
def _stream(
    model: Decoder,
    tokens: Tensor,
    count: int,
    options: dict[str, float | int | None],
    stop_token: int | None,
) -> Iterator[Tensor]:
    """Feed the prompt, then each token drawn; the drawing of step n depends on the seed and n."""
    training = model.training
    model.eval()
    try:
        cache = model.make_cache(tokens.shape[0], tokens.shape[1] + count)
        over = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for step in range(count):
            logits = model.head(model.features(tokens, cache=cache)[:, -1])
            drawn = tilewise.sample(logits, **options, offset=step)  # type: ignore[attr-defined]
            if stop_token is not None:
                drawn = drawn.masked_fill(over, stop_token)
                over |= drawn == stop_token
            yield drawn
            if stop_token is not None and bool(over.all()):
                return
            tokens = drawn[:, None]
    finally:
        model.train(training)

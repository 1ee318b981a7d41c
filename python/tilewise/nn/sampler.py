"""Drawing tokens as a module, and as what the generation of Hugging Face calls."""

from typing import Any

import torch
from torch import Tensor

from tilewise.ops.filter_logits import filter_logits
from tilewise.ops.sample import sample


class Sampler(torch.nn.Module):
    """`tilewise.sample` with its options kept.

    Args:
        options: Of `tilewise.sample`, but for history, mask, seed, offset and generator.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, logits: Tensor, history: Tensor | None = None, **places: Any) -> Tensor:
        """Draw a token a row.

        Args:
            logits: `[batch, vocab]`.
            history: `[batch, length]`, int64; nothing is done with it without a penalty.
            places: mask, seed, offset or generator, as of `tilewise.sample`.

        Returns:
            `[batch]`, int64.
        """
        return sample(logits, history=_needed(history, self.options), **self.options, **places)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LogitsFilter:
    """`tilewise.filter_logits` with the face of a `LogitsProcessor` of Hugging Face.

    One in the place of a list of them, whose softmax the model then draws from.

    Args:
        options: Of `tilewise.filter_logits`, but for history.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Filter scores, `[batch, vocab]`, after the tokens `input_ids`, `[batch, length]`."""
        history = _needed(input_ids, self.options)
        return filter_logits(scores.detach(), history=history, **self.options)


class LogitsSampler:
    """`tilewise.sample` with the same face: of the scores it leaves only that of the token it drew.

        model.generate(tokens, logits_processor=[LogitsSampler(top_p=0.9, seed=1)], do_sample=False)

    A token counts at the offset of its place in the sequence, so a seed replays.

    Args:
        seed: As of `tilewise.sample`; None draws one, for all calls.
        options: Of `tilewise.sample`, but for history, offset and generator.
    """

    def __init__(self, *, seed: Tensor | int | None = None, **options: Any) -> None:
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.options = options

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw from scores, `[batch, vocab]`; where nothing can be drawn they stay as they are."""
        history, place = _needed(input_ids, self.options), input_ids.shape[1]
        tokens = sample(scores, history=history, seed=self.seed, offset=place, **self.options)
        drawn = torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(min=0)[:, None], 0.0)
        return torch.where(tokens[:, None] >= 0, drawn, scores)


class SampledGeneration:
    """The same as a `custom_generate` of Hugging Face, after the model's own processors of logits.

        model.generate(tokens, custom_generate=SampledGeneration(top_p=0.9, seed=1))

    Args:
        options: Of `LogitsSampler`.
    """

    def __init__(self, **options: Any) -> None:
        self.sampler = LogitsSampler(**options)

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: Any, **options: Any) -> Any:
        """What the model's own loop returns, with the sampler as the last of its processors."""
        processors = type(logits_processor)([*logits_processor, self.sampler])
        return model._sample(input_ids, logits_processor=processors, **options)


def _needed(history: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """The history where a penalty counts its tokens."""
    return history if any(name.endswith("_penalty") for name in options) else None

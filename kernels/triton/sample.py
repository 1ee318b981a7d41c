"""Sampling on the GPU: integers decide what is left of a row, noise which of it is drawn."""

from torch import Tensor

from tilewise.kernels.triton._filter import filter_logits_forward
from tilewise.kernels.triton._gumbel import draw_tokens
from tilewise.kernels.triton._linear_sample import linear_sample_forward
from tilewise.kernels.triton._logprobs import sample_with_logprobs_forward
from tilewise.kernels.triton._multinomial import multinomial_forward
from tilewise.kernels.triton._options import COUNT, adjusted, filters
from tilewise.kernels.triton._top_k import top_k_forward
from tilewise.kernels.triton._verify_draft import verify_draft_forward

__all__ = [
    "filter_logits_forward",
    "linear_sample_forward",
    "multinomial_forward",
    "sample_forward",
    "sample_with_logprobs_forward",
    "top_k_forward",
    "verify_draft_forward",
]


def sample_forward(logits: Tensor, *arguments) -> Tensor:
    """logits [batch, vocab]; OPTIONS, each [batch] or a number; seeds and offsets [batch] or [], or
    numbers -> [batch]."""
    rows = adjusted(logits, arguments)
    return draw_tokens(rows, filters(arguments), 1, arguments[COUNT:])

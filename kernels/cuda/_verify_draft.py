"""Which drafted tokens stand, and the one after them, in CUDA C++: a cluster of blocks for each
draft, then one for each sequence. No probabilities are written."""

import torch
from torch import Tensor

from tilewise import _cuda
from tilewise.kernels.cuda._options import COUNT, packed, packed_draws
from tilewise.kernels.cuda._shared import DTYPES, address, stream


def verify_draft_forward(
    draft_tokens: Tensor, draft_probs: Tensor, target_logits: Tensor, *arguments
) -> tuple[Tensor, Tensor]:
    """draft_tokens [batch, draft], draft_probs [batch, draft, vocab] in fp32, target_logits
    [batch * (draft + 1), vocab], options as `_options.packed`, seeds and offsets
    -> accepted [batch], tokens [batch, draft + 1]."""
    batch, draft = draft_tokens.shape
    accepted, tokens = draft_tokens.new_empty(batch), draft_tokens.new_empty(batch, draft + 1)
    stands = draft_tokens.new_empty(batch, draft, dtype=torch.int32)
    (logits, at, _, vocab, stride), options = packed(target_logits, arguments[:COUNT])
    _cuda.sample_verify(
        *map(address, (accepted, tokens, stands, draft_tokens, draft_probs)),
        at, batch, draft, vocab, stride, *options, *packed_draws(*arguments[COUNT:]),
        DTYPES[logits.dtype], stream(logits),
    )  # fmt: skip
    return accepted, tokens

"""The noise that Triton adds to logits, where it is rarest too: a draw seldom asks for that."""

from itertools import pairwise

import pytest
import torch
from cases import DEVICE

from tilewise.check import compare
from tilewise.op import INTERPRETED

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language
from tilewise.kernels.triton._gumbel import gumbel  # noqa: E402

# The first and the last of all words, and between them as many at the ends as in the middle.
EDGES = [0, 1, 2**24, 2**28, 2**32 - 2**28, 2**32 - 2**24, 2**32 - 1]
WORDS = torch.cat([torch.linspace(*ends, 512, dtype=torch.float64) for ends in pairwise(EDGES)])


@triton.jit
def _noise(out, words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, gumbel(tl.load(words + i).to(tl.uint32)))


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton needs TRITON_INTERPRET=1")
def test_gumbel_of_triton_is_exact_to_its_ends():
    words = WORDS.round().to(torch.int64)
    ours = torch.empty(len(words), device=DEVICE)
    _noise[(len(words) // 512,)](ours, words.to(DEVICE), BLOCK=512)
    inner = -((words.double() + 0.5) / 2**32).log()
    # Each logarithm rounded to fp32 is what is to be expected of it.
    error, allowed = compare(ours.cpu(), -inner.float().double().log().float(), -inner.log())
    assert error <= allowed

"""What the tests of sampling share: backends, an oracle in Python's own fp64, tests of counts."""

import math
from collections import Counter

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip
from scipy import stats

from tilewise import native
from tilewise.op import INTERPRETED, OPS

MINE = [p.values[1] for p in BACKENDS if p.values[0].name == "sample"] + ["reference"]


def backends_that(op):
    """A fixture of what samples; what does not know `op` is skipped aloud."""

    @pytest.fixture(params=MINE)
    def backend(request):
        if request.param == "reference":
            return request.param
        if request.param not in OPS[op].backends:
            pytest.skip(f"{request.param}: has no {op}")
        case_or_skip(OPS[op], request.param)
        return request.param

    return backend


backend = backends_that("sample")


def many(backend):
    """How many draws are not too slow: the interpreter takes a tenth of a second for each, the
    emulator half a millisecond."""
    if backend == "reference":
        return 4000
    if backend == "cuda" and native.EMULATED:
        return 1000
    return 8 if backend == "triton" and INTERPRETED else 20_000


def float64_or_skip(backend, dtype=torch.float64):
    """Say aloud of a case in fp64 that a backend has no such kernel."""
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip(f"{backend}: takes no float64")


def enough_or_skip(backend):
    """As many draws as say something about frequencies."""
    if many(backend) < 100:
        pytest.skip("triton: interpreted, too slow for frequencies; its tokens are compared above")
    return many(backend)


def row_of_logits(vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(vocab, generator=generator)).to(DEVICE)


def adjusted(
    logits, repetition=1.0, presence=0.0, frequency=0.0, history=(), bias=None, allowed=None
):
    """One row, token by token, with penalties, a bias and only the `allowed` left."""
    row = list(logits)
    for token, count in Counter(history).items():
        if 0 <= token < len(row):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
            row[token] -= frequency * count + presence
    for j in range(len(row)):
        row[j] += 0.0 if bias is None else bias[j]
        if allowed is not None and j not in allowed:
            row[j] = -math.inf
    return row


def likelihoods(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The filtered softmax of one row, token by token."""
    ranked = sorted(range(len(logits)), key=lambda j: (-logits[j], j))[: top_k or None]
    if temperature == 0:
        return {ranked[0]: 1.0}
    masses = [math.exp((logits[j] - logits[ranked[0]]) / temperature) for j in ranked]
    kept, total, before = {}, math.fsum(masses), 0.0
    for j, mass in zip(ranked, masses, strict=True):
        if mass == 0 or (kept and before >= top_p * total):
            break
        if mass >= min_p:
            kept[j] = mass
        before += mass
    whole = math.fsum(kept.values())
    return {j: mass / whole for j, mass in kept.items()}


def pooled(counts, expected):
    """Counts and expectations, rare tokens together until ten are expected."""
    found, wanted = [0], [0.0]
    for j in sorted(expected, key=expected.get):
        if wanted[-1] >= 10:
            found, wanted = [*found, 0], [*wanted, 0.0]
        found[-1] += counts[j]
        wanted[-1] += expected[j]
    return found, wanted


def assert_drawn_from(tokens, expected, significance):
    """The G-test of tokens against their likelihoods; none that has none."""
    counts = Counter(tokens.flatten().tolist())
    assert not counts.keys() - expected.keys()
    total = sum(counts.values())
    found, wanted = pooled(counts, {j: total * p for j, p in expected.items()})
    if len(found) > 1:
        test = stats.power_divergence(found, wanted, lambda_="log-likelihood")
        assert test.pvalue > significance


def bits_of(allowed, vocab):
    """The mask, `[words]` int32, that allows these tokens."""
    words = [0] * -(-vocab // 32)
    for j in allowed:
        words[j // 32] |= 1 << j % 32
    signed = [word - (word >> 31 << 32) for word in words]
    return torch.tensor(signed, dtype=torch.int32, device=DEVICE)

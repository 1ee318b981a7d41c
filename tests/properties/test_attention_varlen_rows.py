"""Packed sequences: rows of no sequence are 0, and are never seen."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from attention_cases import near
from cases import DEVICE, interpreted
from packed_cases import (
    EVERY,
    INF,
    LENGTHS,
    NAN,
    OPTIONS,
    able,
    packed,
    randn,
    same,
    with_gradients,
)

from tilewise import attention_varlen_with_lse
from tilewise.verify import sanitize


@EVERY
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_what_lies_past_the_last_sequence_is_never_seen(backend, poison, name):
    more, options = OPTIONS[name]
    clean = with_gradients(backend, *packed(past=3), *more, **options)
    q, k, v, *rest = packed(past=3)
    for t in (q, k, v):
        t[-3:] = poison
    more = [t.clone() for t in more]
    for bias in more[:1]:
        for b, (seq_q, seq_k) in enumerate(LENGTHS):
            bias[b, :, seq_q:] = poison
            bias[b, :, :, seq_k:] = poison
    ours = with_gradients(backend, q, k, v, *rest, *more, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    out, lse, *grads = ours
    assert not out[-3:].any() and bool((lse[:, -3:] == -INF).all())
    assert not any(g[-3:].any() for g in grads[:3])
    if more:
        assert not any(grads[3][b, :, n:].any() for b, (n, _) in enumerate(LENGTHS))


@EVERY
def test_the_longest_may_be_said_too_long_or_too_short(backend):
    *tensors, longest_q, longest_k = packed()
    whole = with_gradients(backend, *tensors, longest_q, longest_k, causal=True)
    same(with_gradients(backend, *tensors, longest_q + 9, longest_k + 70, causal=True), whole)
    out = with_gradients(backend, *tensors, 4, longest_k)[0]
    full = with_gradients(backend, *tensors, longest_q, longest_k)[0]
    ends = tensors[3].tolist()
    kept = torch.zeros(len(out), dtype=torch.bool, device=DEVICE)
    for begin, end in pairwise(ends):
        kept[begin : min(begin + 4, end)] = True
    near([out[kept]], [full[kept]])
    assert not out[~kept].any()


@EVERY
@pytest.mark.parametrize(
    "ends",
    [(0, 3, 900, 32), (0, 5, 3, 20), (-7, 3, 20, 32), (0, 3, 20, 2**31 - 1), (40, 50, 60, 70)],
)  # fmt: skip
@pytest.mark.parametrize("which", [3, 4])
def test_wrong_ends_lead_nowhere_else(backend, ends, which):
    """Nothing is read or written beyond the tensors: what is left is some answer. Where ends
    decrease two sequences have the same rows, and whose comes last nobody says."""
    arguments = list(packed(((3, 3), (17, 17), (12, 12))))
    arguments[which] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    with sanitize("random") if interpreted(backend) else nullcontext() as report:
        out, *_, dv = with_gradients(backend, *arguments)
        if report is not None and list(ends) != sorted(ends):
            assert {finding.kind for finding in report.findings} <= {"race"}
            report.clear()
    assert bool(out.isfinite().all()) and bool(dv.isfinite().all())


@EVERY
@pytest.mark.parametrize("name", ["plain", "all"])
def test_rows_of_nobody(backend, name):
    """Before the first sequence, past the last, and beyond the longest that is said: zeros, or no
    sum, and whatever they hold is never seen."""
    more, options = OPTIONS[name]
    more = [t[:2, ..., :33] if t.ndim == 4 else t for t in more]
    options = {n: t[:2] if n == "alibi_slopes" else t for n, t in options.items()}
    q, k, v, ends_q, ends_k, *_ = packed(((40, 70), (3, 50)))
    longest = 20, 33
    able(backend, q, k, v, ends_q, ends_k, *longest, *more, **options)
    cotangents = randn(len(q), 4, 6), randn(4, len(q))

    def run(before, past):
        def within(t, dim=0):
            ends = [
                t.new_full((*t.shape[:dim], n, *t.shape[dim + 1 :]), NAN) for n in (before, past)
            ]
            return torch.cat([ends[0], t, ends[1]], dim)

        leaves = [within(t).requires_grad_() for t in (q, k, v)]
        leaves += [t.detach().requires_grad_() for t in more]
        out, lse = attention_varlen_with_lse(
            *leaves[:3], ends_q + before, ends_k + before, *longest, *leaves[3:], **options,
            backend=backend,
        )  # fmt: skip
        found = within(cotangents[0]), within(cotangents[1], 1)
        return [out, lse.mT, *torch.autograd.grad([out, lse], leaves, found)]

    clean = run(0, 0)
    assert not clean[0][20:40].any()
    assert bool((clean[1][20:40] == -INF).all())
    assert not clean[2][20:40].any()
    assert not any(g[33:70].any() or g[103:].any() for g in clean[3:5])
    for before, past in ((0, 150), (7, 0), (90, 41)):
        ours = run(before, past)
        same([t[before : before + len(c)] for t, c in zip(ours[:5], clean, strict=False)],
             clean[:5])  # fmt: skip
        same(ours[5:], clean[5:])
        for t, c, empty in zip(ours[:5], clean, (0.0, -INF, 0.0, 0.0, 0.0), strict=False):
            assert bool((t[:before] == empty).all())
            assert bool((t[before + len(c) :] == empty).all())

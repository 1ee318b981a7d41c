"""Draws with logarithms of probabilities: the tokens of `sample`, and logs as an oracle has."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import backend, bits_of, float64_or_skip, many, row_of_logits

import tilewise
from tilewise.sampling import adjusted

pytestmark = pytest.mark.thinned(3)

__all__ = ["backend"]

INFINITY, NAN = math.inf, math.nan

CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.7, "top_k": 9},
    {"top_p": 0.6, "logit_bias": torch.linspace(-2, 2, 300)},
    {"min_p": 0.2, "mask": bits_of(range(0, 300, 3), 300).expand(6, -1)},
    {"repetition_penalty": 1.5, "history": torch.arange(60).view(6, 10) * 4, "top_k": 290},
]
CASES = [
    {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in case.items()}
    for case in CASES
]
IDS = [" ".join(case) or "plain" for case in CASES]


def logs_of(row, kept=None):
    """log softmax of one row, of those `kept`, in Python's fp64."""
    kept = range(len(row)) if kept is None else kept
    top = max(row[j] for j in kept)
    mass = math.log(math.fsum(math.exp(row[j] - top) for j in kept))
    return {j: row[j] - top - mass for j in kept if row[j] > -INFINITY}


def ranked(row, logs, count):
    """Tokens in rank, and logs, with -1 and -inf past those that there are."""
    order = sorted(logs, key=lambda j: (-row[j], j))[:count]
    missing = count - len(order)
    return order + [-1] * missing, [logs[j] for j in order] + [-INFINITY] * missing


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 20, 300])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_logs_are_those_of_the_oracle(backend, case, count, processed):
    if many(backend) < 100 and count != 20 and len(case) < 3:
        pytest.skip("triton: interpreted, too slow for more than one case of so many counts")
    logits = torch.stack([row_of_logits(300, seed) for seed in range(6)])
    logits[1] = logits[1].round()  # ties
    logits[2, ::2] = -INFINITY
    tokens, logs, top_logs, top_tokens = tilewise.sample_with_logprobs(
        logits, **case, top_logprobs=count, processed=processed, seed=3, backend=backend
    )
    assert torch.equal(tokens, tilewise.sample(logits, **case, seed=3, backend=backend))
    assert top_logs.shape == top_tokens.shape == (6, count)
    assert (logs.dtype, top_logs.dtype, top_tokens.dtype) == (torch.float32,) * 2 + (torch.int64,)
    kept = tilewise.filter_logits(logits, **case, backend="reference").tolist()
    rows = adjusted(logits.double(), **case).tolist() if processed else logits.tolist()
    for i, row in enumerate(rows):
        left = [j for j in range(300) if kept[i][j] > -INFINITY]
        t = case.get("temperature", 1.0) or 1.0
        row = [v / t for v in row] if processed else row
        expected = logs_of(row, left if processed else None)
        assert float(logs[i]) == pytest.approx(expected[int(tokens[i])], rel=1e-5, abs=1e-5)
        order, values = ranked(row, expected, count)
        assert top_tokens[i].tolist() == order
        assert top_logs[i].tolist() == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_rows_without_a_token_or_a_distribution(backend):
    logits = torch.stack([row_of_logits(150, seed) for seed in range(5)])
    logits[0, 149], logits[1], logits[2, [7, 140]], logits[3, 5] = NAN, -INFINITY, INFINITY, NAN
    mask = bits_of(range(150), 150).repeat(5, 1)
    mask[3] = bits_of([9, 60], 150)
    raw, processed = (
        tilewise.sample_with_logprobs(
            logits, mask=mask, top_logprobs=3, processed=after, seed=1, backend=backend
        )
        for after in (False, True)
    )
    assert raw[0].tolist()[:2] == [-1, -1] and raw[0][2] in (7, 140) and raw[0][3] in (9, 60)
    assert raw[1].isnan().tolist() == [True] * 4 + [False]
    assert raw[2].isnan().all(1).tolist() == [True] * 4 + [False]
    assert (raw[3] == -1).all(1).tolist() == [True] * 4 + [False]
    assert processed[1].isnan().tolist() == [True, True, False, False, False]
    assert processed[2][2].tolist() == [pytest.approx(-math.log(2))] * 2 + [-INFINITY]
    assert processed[3][2:4].tolist() in ([[7, 140, -1], [9, 60, -1]], [[7, 140, -1], [60, 9, -1]])


def test_ties_that_are_cut_are_not_among_the_likeliest(backend):
    logits = torch.zeros(1, 40, device=DEVICE)
    options = {"top_k": 2, "processed": True, "seed": 1, "backend": backend}
    _, _, logs, tokens = tilewise.sample_with_logprobs(logits, top_logprobs=4, **options)
    assert tokens.tolist() == [[0, 1, -1, -1]]
    assert (logs[0, 2:] == -INFINITY).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend, dtype):
    float64_or_skip(backend, dtype)
    logits = row_of_logits(500).view(2, 250).to(dtype)
    found = tilewise.sample_with_logprobs(logits, top_logprobs=4, seed=1, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [torch.int64, wide, wide, torch.int64]
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(found[2].double(), expected.gather(1, found[3]), atol=1e-5)
    assert torch.allclose(found[1].double(), expected.gather(1, found[0][:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_nothing_to_draw_from(backend, shape):
    logits = torch.zeros(shape, device=DEVICE)
    found = tilewise.sample_with_logprobs(logits, seed=1, backend=backend)
    assert found[0].tolist() == [-1] * shape[0] and found[1].isnan().all()
    assert [t.shape for t in found] == [shape[:1], shape[:1], (shape[0], 0), (shape[0], 0)]

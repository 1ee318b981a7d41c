"""Four million draws for each setting: what is forbidden never comes, the rest as it should.

By the backends that are themselves here; those that are stood in for are too slow.
"""

import pytest
import torch
from cases import DEVICE, STAND_INS
from sample_cases import MINE, adjusted, likelihoods, pooled, row_of_logits
from scipy import stats
from test_sample import FILTERS
from test_sample_options import CASES, HISTORY, VOCAB, arguments, split

import tilewise

pytestmark = pytest.mark.slow

DRAWS, AT_ONCE = 4_000_000, 250_000
BACKENDS = [
    b for b in MINE if b not in {*STAND_INS, "reference"} and (b != "numba" or DEVICE == "cpu")
]
SETTINGS = [(VOCAB, case) for case in (*FILTERS, *CASES)] + [
    (1000, {"top_k": 50, "top_p": 0.9}),
    (1000, {"top_p": 0.3, "temperature": 2.0}),
    (1000, {"min_p": 0.02, "top_k": 200}),
]
SIGNIFICANCE = 1e-6 / (len(SETTINGS) * len(MINE))


def counted(backend, row, options):
    """How often each token is drawn, as many rows at once, with a seed a call."""
    counts = torch.zeros(len(row), dtype=torch.int64, device=DEVICE)
    rows = row.expand(AT_ONCE, -1)
    for seed in range(DRAWS // AT_ONCE):
        drawn = tilewise.sample(rows, **options, seed=2**40 + seed, backend=backend)
        counts += torch.bincount(drawn, minlength=len(row))
    return counts.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vocab", "case"), SETTINGS, ids=str)
def test_four_million_draws(backend, vocab, case):
    adjusts, filters = split(case)
    row = row_of_logits(vocab) - (2 if adjusts else 0)
    counts = counted(backend, row, arguments(case, AT_ONCE, vocab))
    changed = adjusted(row.tolist(), history=HISTORY, **adjusts)
    expected = {j: DRAWS * p for j, p in likelihoods(changed, **filters).items()}
    assert sum(counts) == DRAWS
    assert [j for j, count in enumerate(counts) if count and j not in expected] == []
    found, wanted = pooled(counts, expected)
    if len(found) > 1:
        test = stats.power_divergence(found, wanted, lambda_="log-likelihood")
        assert test.pvalue > SIGNIFICANCE

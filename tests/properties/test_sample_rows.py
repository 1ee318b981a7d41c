"""Sampling from long rows that are fewer than the threads, which share them."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import row_of_logits

import tilewise

INFINITY, NAN = math.inf, math.nan


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_p": 0.9}, {"top_p": 0.02, "temperature": 9.0}, {"top_k": 50, "top_p": 0.9},
        {"min_p": 0.01}, {"temperature": 0.0}, {"top_k": 40_000},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_long_row_alone_is_drawn_as_among_others(options, dtype, three_threads):
    """On a CPU the threads share a row, if there are more of them than rows."""
    logits = torch.stack([row_of_logits(40_000, seed) for seed in range(5)]).to(dtype)
    logits[3, 39_999], logits[4, 5] = NAN, -INFINITY
    seeds = torch.arange(5, device=DEVICE)
    together = tilewise.sample(logits, seed=seeds, **options)
    assert together[3] == -1 and together[[0, 1, 2, 4]].min() >= 0
    for offset in range(5):
        together = tilewise.sample(logits, seed=seeds, offset=offset, **options)
        alone = [
            tilewise.sample(logits[i : i + 1], seed=seeds[i : i + 1], offset=offset, **options)
            for i in range(5)
        ]
        assert torch.equal(torch.cat(alone), together)


def test_all_columns_of_a_long_row_can_be_drawn(three_threads):
    """Those where blocks and parts of it begin and end."""
    logits = torch.full((1, 40_000), -INFINITY, device=DEVICE)
    ends = {0, 39_999} | {end + i for end in (128, 16_384, 32_768, 39_936) for i in (-1, 0)}
    logits[0, list(ends)] = 1.0
    for options in ({}, {"top_p": 0.999}, {"top_k": 20}):
        drawn = {int(tilewise.sample(logits, seed=seed, **options)) for seed in range(120)}
        assert drawn == ends


@pytest.mark.parametrize("heavy", [127, 128, 16_383, 16_384, 39_999])
def test_the_mass_of_every_column_of_a_long_row_counts(heavy, three_threads):
    logits = torch.full((1, 40_000), -INFINITY, device=DEVICE)
    logits[0, [heavy, 3, 30_000]] = torch.tensor([0.5, 0.3, 0.2], device=DEVICE).log()
    drawn = {int(tilewise.sample(logits, seed=seed, top_p=0.7)) for seed in range(60)}
    assert drawn == {heavy, 3}

"""Sampling: frequencies by G-test, what may never be drawn, replay, rows that cannot be drawn."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import (
    MINE,
    backend,
    enough_or_skip,
    float64_or_skip,
    likelihoods,
    many,
    pooled,
    row_of_logits,
)
from scipy import stats

import tilewise
from tilewise.rng import gumbel

pytestmark = pytest.mark.thinned(3)

__all__ = ["backend"]

INFINITY, NAN = math.inf, math.nan


FILTERS = [
    {},
    {"temperature": 1e30},  # uniform
    {"temperature": 1.9, "top_k": 7},
    {"top_k": 30},
    {"top_p": 0.9},
    {"top_p": 0.2, "temperature": 1.5},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.8},
    {"top_k": 40, "top_p": 0.05},
]
SIGNIFICANCE = 1e-6 / (3 * len(FILTERS) * len(MINE))


@pytest.mark.parametrize("apart", ["seeds", "places", "offsets"])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_frequencies_are_those_of_the_filtered_softmax(backend, options, apart):
    row, count = row_of_logits(47), enough_or_skip(backend)
    index = torch.arange(count, device=DEVICE)
    places = {
        "seeds": {"seed": index},
        "places": {"seed": 11},
        "offsets": {"seed": index * 0 + 5, "offset": index},
    }[apart]
    tokens = tilewise.sample(row.expand(count, -1), **options, **places, backend=backend)
    counts = torch.bincount(tokens, minlength=47).tolist()
    expected = {j: count * p for j, p in likelihoods(row.tolist(), **options).items()}
    assert sum(counts[j] for j in range(47) if j not in expected) == 0
    found, wanted = pooled(counts, expected)
    if len(found) > 1:
        test = stats.power_divergence(found, wanted, lambda_="log-likelihood")
        assert test.pvalue > SIGNIFICANCE


@pytest.mark.parametrize("options", FILTERS[3:], ids=str)
def test_forbidden_tokens_of_a_large_vocabulary_are_never_drawn(backend, options):
    few = many(backend) < 10_000
    row = row_of_logits(50257 if not few else 3001)
    tokens = torch.cat([
        tilewise.sample(row.expand(2 if few else 200, -1), **options, seed=seed, backend=backend)
        for seed in range(1 if few else 5)
    ])  # fmt: skip
    assert set(tokens.tolist()) <= set(likelihoods(row.tolist(), **options))


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [128, 1000, 50257])
def test_backends_draw_the_same_tokens_but_for_ties_within_rounding(backend, options, vocab):
    if many(backend) < 100 and vocab > 10_000 and len(options) < 3:
        pytest.skip("triton: interpreted, too slow for more than one filter of a large vocabulary")
    batch = min(100_000 // vocab + 1, many(backend))
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(batch, vocab, generator=generator)).to(DEVICE)
    seeds = torch.arange(batch, device=DEVICE) * 2**33
    ours = tilewise.sample(logits, **options, seed=seeds, backend=backend)
    theirs = tilewise.sample(logits.double(), **options, seed=seeds, backend="reference")
    scaled = logits.double() / options.get("temperature", 1.0)
    scores = scaled + gumbel(seeds, 0, 0, vocab, torch.float64)
    gap = (scores.gather(1, ours[:, None]) - scores.gather(1, theirs[:, None])).abs().squeeze(1)
    rounding = torch.finfo(torch.float32).eps * (scaled.abs().amax(1) + scores.abs().amax(1))
    assert (gap <= rounding).all()
    assert (ours != theirs).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_same_values_draw_the_same_tokens(backend, dtype):
    float64_or_skip(backend, dtype)
    logits = torch.stack([row_of_logits(300, seed) for seed in range(4)]).bfloat16() / 8
    options = {"seed": 3, "top_k": 100, "top_p": 0.95, "backend": backend}
    expected = tilewise.sample(logits.float(), **options)
    assert torch.equal(tilewise.sample(logits.to(dtype), **options), expected)


def test_seed_and_offset_replay_and_differ(backend):
    logits = row_of_logits(1000).expand(8, -1)
    first, again, other, later = (
        tilewise.sample(logits, temperature=3.0, seed=seed, offset=offset, backend=backend)
        for seed, offset in [(1, 0), (1, 0), (2, 0), (1, 1)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, later)
    one = torch.tensor(1, device=DEVICE)
    replayed = tilewise.sample(logits, temperature=3.0, seed=one, offset=one, backend=backend)
    assert torch.equal(later, replayed)


def test_all_64_bits_of_seed_and_offset_count(backend):
    logits = torch.zeros(1, 4096, device=DEVICE)
    places = [(0, 0), (1, 0), (1 << 40, 0), (-1, 0), (0, 1), (0, 1 << 40), (0, -1)]
    tokens = [int(tilewise.sample(logits, seed=s, offset=o, backend=backend)) for s, o in places]
    assert len(set(tokens)) == len(places)


def test_a_row_with_its_own_seed_does_not_know_its_place(backend):
    logits = torch.stack([row_of_logits(200, seed) for seed in range(7)])
    seeds = torch.arange(7, device=DEVICE) + 100
    options = {"temperature": 2.0, "top_p": 0.95, "backend": backend}
    together = tilewise.sample(logits, seed=seeds, **options)
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4], device=DEVICE)
    permuted = tilewise.sample(logits[order], seed=seeds[order], **options)
    assert torch.equal(permuted, together[order])
    alone = [tilewise.sample(logits[i : i + 1], seed=seeds[i : i + 1], **options) for i in range(7)]
    assert torch.equal(torch.cat(alone), together)


def test_one_seed_gives_each_row_its_own_noise(backend):
    logits = torch.zeros(8, 4096, device=DEVICE)
    assert len(set(tilewise.sample(logits, seed=1, backend=backend).tolist())) == 8


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}], ids=str)
def test_greedy_takes_the_lowest_of_the_largest(backend, options):
    logits = torch.stack([row_of_logits(300, seed) for seed in range(5)])
    logits[0, [7, 200, 299]] = 50.0
    logits[1, [299]] = 50.0
    logits[2] = -3.0
    logits[3, 130:140] = INFINITY
    tokens = tilewise.sample(logits, **options, seed=1, backend=backend)
    assert tokens.tolist() == [7, 299, 0, 130, int(logits[4].argmax())]


def test_what_the_mass_before_is_just_the_goal_of_is_not_drawn(backend):
    logits = torch.zeros(min(many(backend), 2000), 2, device=DEVICE)
    assert not tilewise.sample(logits, top_p=0.5, seed=1, backend=backend).any()


@pytest.mark.parametrize("top_k", [300, 301, 10**6, 0])
def test_top_k_of_the_vocabulary_or_0_is_off(backend, top_k):
    logits = row_of_logits(300).expand(6, -1)
    off = tilewise.sample(logits, temperature=2.0, seed=1, backend=backend)
    on = tilewise.sample(logits, temperature=2.0, top_k=top_k, seed=1, backend=backend)
    assert torch.equal(on, off)


def test_top_p_of_1_is_off(backend):
    """Also for tokens too unlikely to change the sum of the others."""
    logits = torch.zeros(1, 200, device=DEVICE)
    logits[:, 100:] = -18.0
    count = min(many(backend), 4000)
    seeds = torch.arange(count, device=DEVICE)
    options = {"temperature": 3.0, "seed": seeds, "backend": backend}
    off, on = (tilewise.sample(logits.expand(count, -1), top_p=p, **options) for p in (None, 1.0))
    assert torch.equal(on, off)
    assert (on >= 100).any() or count < 100


@pytest.mark.parametrize(
    "options, left", [({"top_k": 7}, 7), ({"top_p": 0.3}, 3), ({"top_p": 0.31}, 4)], ids=str
)
@pytest.mark.parametrize("zeros", ["alike", "of both signs"])
def test_ties_go_to_the_lowest_tokens(backend, options, left, zeros):
    count = min(many(backend), 2000)
    logits = torch.full((count, 20), -INFINITY, device=DEVICE)
    logits[:, 3:13] = 0.0
    if zeros == "of both signs":
        logits[:, 3:13:2] = -0.0
    tokens = tilewise.sample(logits, **options, seed=1, backend=backend)
    assert set(tokens.tolist()) <= set(range(3, 3 + left))
    assert len(set(tokens.tolist())) >= min(left, count // 2)


def test_ties_at_the_threshold_of_a_large_k(backend):
    """Ties in more than one block, most of them cut."""
    logits = torch.zeros(4, 700, device=DEVICE)
    logits[:, 350] = 1.0
    options = {"top_k": 260, "seed": 5, "temperature": 4.0, "backend": backend}
    tokens = torch.cat([tilewise.sample(logits, **options, offset=i) for i in range(10)])
    allowed = {*range(259), 350}
    assert set(tokens.tolist()) <= allowed
    cut = logits.clone()
    cut[:, [j for j in range(700) if j not in allowed]] = -INFINITY
    del options["top_k"]
    expected = torch.cat([tilewise.sample(cut, **options, offset=i) for i in range(10)])
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str
)
def test_rows_that_cannot_be_drawn(backend, options):
    logits = torch.stack([row_of_logits(150, seed) for seed in range(7)])
    before = tilewise.sample(logits, **options, seed=2, backend=backend)
    logits[0, 149] = NAN
    logits[1] = -INFINITY
    logits[2] = -INFINITY
    logits[2, 131] = -5.0
    logits[3, 140] = INFINITY
    logits[4, :140] = -INFINITY
    logits[5, 3], logits[5, 4] = NAN, INFINITY
    tokens = tilewise.sample(logits, **options, seed=2, backend=backend)
    assert tokens[[0, 1, 2, 3, 5]].tolist() == [-1, -1, 131, 140, -1]
    assert tokens[4] >= 140
    assert tokens[6] == before[6]


def test_infinite_logits_share_the_draw(backend):
    count = min(many(backend), 2000)
    logits = row_of_logits(40).repeat(count, 1)
    logits[:, [5, 11, 30]] = INFINITY
    tokens = tilewise.sample(logits, seed=1, backend=backend)
    counts = torch.bincount(tokens, minlength=40)[[5, 11, 30]].tolist()
    assert sum(counts) == count
    assert stats.chisquare(counts).pvalue > 1e-6
    for options in {"top_k": 2}, {"top_p": 0.5}:
        tokens = tilewise.sample(logits, **options, seed=1, backend=backend)
        assert set(tokens.tolist()) == {5, 11}


def test_each_row_has_its_own_options(backend):
    logits = row_of_logits(100).expand(8, -1)
    temperatures = torch.tensor([0.0, 1, 2, 0, 1, 0.5, 3, 1], device=DEVICE)
    top_ks = torch.tensor([0, 5, 0, 9, 1, 100, 200, 30], device=DEVICE)
    top_ps = torch.tensor([1.0, 0.5, 0.3, 1, 1, 0, 0.9, 1], device=DEVICE)
    seeds, offsets = torch.arange(8, device=DEVICE), torch.arange(8, device=DEVICE) + 9
    together = tilewise.sample(
        logits, temperature=temperatures, top_k=top_ks.int(), top_p=top_ps.half(),
        seed=seeds, offset=offsets, backend=backend,
    )  # fmt: skip
    for i in range(8):
        alone = tilewise.sample(
            logits[:1], temperature=float(temperatures[i]), top_k=int(top_ks[i]),
            top_p=float(top_ps[i].half()), seed=seeds[i : i + 1], offset=int(offsets[i]),
            backend=backend,
        )  # fmt: skip
        assert together[i] == alone
    assert together[[0, 3, 4, 5]].tolist() == [int(logits[0].argmax())] * 4


def test_a_row_whose_own_options_are_out_of_range_is_not_drawn(backend):
    ones, logits = torch.ones(5, device=DEVICE), torch.zeros(5, 10, device=DEVICE)
    bad = torch.tensor([-1.0, NAN, INFINITY, 1.0, 0.0], device=DEVICE)
    tokens = tilewise.sample(logits, temperature=bad, seed=1, backend=backend)
    assert (tokens >= 0).tolist() == [False, False, False, True, True]
    tokens = tilewise.sample(logits, top_p=bad * 2 * ones, seed=1, backend=backend)
    assert (tokens >= 0).tolist() == [False, False, False, False, True]
    tokens = tilewise.sample(logits, top_k=torch.arange(-3, 2).to(DEVICE), seed=1, backend=backend)
    assert (tokens >= 0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("temperature", [1e-30, 1e-44])
def test_tiny_temperature_leaves_the_largest(backend, temperature):
    logits = row_of_logits(200).repeat(min(many(backend), 100), 1)
    logits[:, [20, 150]] = 60.0
    tokens = tilewise.sample(logits, temperature=temperature, seed=1, backend=backend)
    assert set(tokens.tolist()) == {20, 150}


@pytest.mark.parametrize("shape", [(0, 10), (3, 0), (0, 0)])
def test_nothing_to_draw_from(backend, shape):
    logits = torch.zeros(shape, device=DEVICE)
    tokens = tilewise.sample(logits, top_k=3, top_p=0.5, seed=1, backend=backend)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [-1] * shape[0]


def test_without_a_seed_the_generator_decides(backend):
    logits = torch.zeros(4, 4096, device=DEVICE)

    def draw(state):
        torch.manual_seed(state)
        return tilewise.sample(logits, backend=backend).tolist()

    def draw_with(state):
        generator = torch.Generator(DEVICE).manual_seed(state)
        return tilewise.sample(logits, generator=generator, backend=backend).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw_with(1) == draw_with(1) != draw_with(2)
    torch.manual_seed(3)
    first = tilewise.sample(logits, backend=backend)
    assert not torch.equal(first, tilewise.sample(logits, backend=backend))


def test_compiled_draws_anew_each_time(backend):
    logits = torch.zeros(4, 4096, device=DEVICE)
    compiled = torch.compile(tilewise.sample, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(logits, backend=backend), compiled(logits, backend=backend))
    for seed in range(3, 8) if backend != "reference" else ():  # a graph of 600 operations
        expected = tilewise.sample(logits, seed=seed, offset=2 * seed, backend=backend)
        drawn = compiled(logits, seed=seed, offset=2 * seed, backend=backend)
        assert torch.equal(drawn, expected)


def test_threads_do_not_change_the_draw(backend):
    logits = torch.stack([row_of_logits(5000, seed) for seed in range(9)])
    threads = torch.get_num_threads()
    drawn = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        drawn.append(tilewise.sample(logits, top_p=0.9, seed=1, backend=backend))
    torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("options", [{}, {"min_p": 0.2}, {"temperature": 0.0}], ids=str)
def test_programs_that_share_a_row_draw_as_one(backend, options, monkeypatch):
    """However many they are, up to more than there are blocks of the row."""
    if backend != "triton":
        pytest.skip(f"{backend}: shares a row by other parts, which have tests of their own")
    from tilewise.kernels.triton import _gumbel as kernel

    logits = torch.stack([row_of_logits(9000, seed) for seed in range(6)])
    logits[1, 8999], logits[2, [3000, 8000]], logits[3] = NAN, INFINITY, -INFINITY
    logits[4, [4100, 6200, 8999]] = 20.0
    seeds, drawn = torch.arange(6, device=DEVICE) * 2**34, {}
    for parts in (1, 2, 3, 7):
        monkeypatch.setattr(kernel, "parts_of", lambda draws, vocab, parts=parts: parts)
        tokens = tilewise.sample(logits, **options, seed=seeds, backend=backend)
        drawn[parts] = tokens.tolist()
    expected = tilewise.sample(logits.double(), **options, seed=seeds, backend="reference")
    assert drawn == dict.fromkeys(drawn, expected.tolist())


def test_few_rows_share_programs_and_many_do_not():
    pytest.importorskip("triton")
    from tilewise.kernels.triton._parts import parts_of

    assert [parts_of(1, vocab) for vocab in (1, 4000, 8192, 128256)] == [1, 1, 4, 62]
    assert [parts_of(rows, 128256) for rows in (0, 4, 8, 64, 129, 5000)] == [62, 62, 32, 4, 1, 1]


def test_tokens_require_no_gradient(backend):
    logits = row_of_logits(100)[None].requires_grad_()
    assert not tilewise.sample(logits, seed=1, backend=backend).requires_grad


def test_vmap_draws_as_the_reference():
    logits = torch.stack([row_of_logits(100, seed) for seed in range(6)]).view(2, 3, 100)
    tokens = torch.vmap(lambda x: tilewise.sample(x, top_p=0.9, seed=1))(logits)
    assert torch.equal(tokens[1], tilewise.sample(logits[1], top_p=0.9, seed=1))


def test_no_token_depends_on_how_its_row_is_shared_out(backend, monkeypatch):
    """One block a row, a cluster of 2 or of 8 that holds it, one that reads it again and again."""
    if backend != "cuda":
        pytest.skip(f"{backend}: has none of these ways")
    filters = {"temperature": 1.5, "top_k": 900, "top_p": 0.97, "min_p": 1e-3, "backend": backend}
    for vocab, rows in ((4099, 130), (50257, 4)):
        logits = torch.stack([row_of_logits(vocab, seed) for seed in range(rows)])
        seeds = torch.arange(rows, device=DEVICE) + 7
        bias = row_of_logits(vocab, 1000)
        together = tilewise.sample(logits, **filters, logit_bias=bias, seed=seeds)
        for major in "98" if DEVICE == "cpu" else "9":  # which only the emulator asks for
            monkeypatch.setenv("TILEWISE_EMULATION_MAJOR", major)
            tilewise.sample.plans.clear()  # they were made for another machine
            for i in range(min(rows, 5)):
                alone = tilewise.sample(
                    logits[i : i + 1], **filters, logit_bias=bias, seed=seeds[i : i + 1]
                )
                assert alone == together[i]

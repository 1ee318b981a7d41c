"""Rows that programs of Triton share are cut and drawn as by one program, to the bit."""

import math

import pytest
import torch
from cases import DEVICE
from sample_cases import backends_that, row_of_logits

import tilewise

pytestmark = pytest.mark.thinned(3)

backend = backends_that("filter_logits")

INFINITY, NAN = math.inf, math.nan
VOCAB = 2100  # two blocks, of which the second is nearly empty


def with_values(row, values):
    row = row.clone()
    for place, value in values.items():
        row[place] = value
    return row


def only(row, count):
    """The first of it; all others -inf."""
    return torch.cat([row[:count], torch.full_like(row[count:], -INFINITY)])


def levels(vocab):
    """Of the first thousand in rank most are of a level that has more, so the mass of the thousand
    is known only when they are: it says that top-p ends at the second level."""
    levels = torch.tensor([2.0, 1.95, 1.5, -5.0], device=DEVICE)
    counts = torch.tensor([100, 100, 900, vocab - 1100], device=DEVICE)
    return levels.repeat_interleave(counts).flip(0)


def rows_and_options(vocab):
    """Rows with top-k, temperature, top-p and min-p of their own."""
    x = row_of_logits(vocab)
    ends = {vocab - 1: 9.0, 2047: 8.5, 2048: 8.25, 0: 8.0}
    cases = [
        (x, 50, 1.0, 0.9, 0.05),
        (-x - 20, 50, 0.5, 1.0, 0.0),
        (x, 0, 1.0, 0.9, 0.0),
        (x, 600, 0.7, 0.8, 0.1),
        (x, 700, 1.0, 1.0, 0.0),
        (x, 1500, 3.0, 0.999, 0.0),
        (x, 512, 1.0, 1.0, 0.0),
        (x, 513, 1.0, 1.0, 0.0),
        (x, vocab - 1, 1.0, 1.0, 0.0),
        (x, vocab, 1.0, 0.5, 0.0),
        (x, 0, 9.0, 0.999999, 0.0),
        (x * 40, 0, 1.0, 0.99999, 0.0),
        (x * 40, 900, 1.0, 1.0, 0.0),
        (x / 1000, 0, 1.0, 0.7, 0.0),
        (x.round(), 70, 1.0, 0.95, 0.0),
        (x.round(), 600, 1.0, 0.9, 0.0),
        ((4 * x).round() / 4, 0, 2.0, 0.9, 0.0),
        (0 * x, 100, 1.0, 1.0, 0.0),
        (0 * x - 3, 0, 1.0, 0.5, 0.0),
        (torch.where(x > 0, 0.0, -0.0), 0, 1.0, 0.25, 0.0),
        (with_values(x, ends), 3, 5.0, 1.0, 0.0),
        (with_values(x, ends), 0, 5.0, 0.01, 0.0),
        (torch.cat([x[:300], 12 + x[:100], x[400:]]), 90, 1.0, 0.99, 0.0),
        (only(x, 20), 50, 1.0, 0.9, 0.0),
        (only(x, 20), 600, 1.0, 0.9, 0.0),
        (only(x, 20), 20, 1.0, 1.0, 0.0),
        (with_values(x, {5: INFINITY, 2050: INFINITY}), 50, 1.0, 0.9, 0.0),
        (with_values(x, {5: INFINITY, 2050: INFINITY}), 0, 1.0, 0.5, 0.0),
        (with_values(x, {2099: NAN}), 50, 1.0, 0.9, 0.0),
        (with_values(x, {3: NAN}), 0, 1.0, 0.9, 0.0),
        (only(x, 0), 50, 1.0, 0.9, 0.0),
        (only(x, 0), 0, 1.0, 0.9, 0.0),
        (x, 0, 1.0, 1.0, 0.2),
        (x, 50, 0.0, 0.9, 0.0),
        (x, 1, 1.0, 0.9, 0.0),
        (x, 50, 1.0, 0.0, 0.0),
        (x, -1, 1.0, 0.9, 0.0),
        (x, 50, 1.0, 1.5, 0.0),
        (x, 0, INFINITY, 0.5, 0.0),
        (levels(vocab), 1000, 1.0, 0.15, 0.0),
    ]  # fmt: skip
    rows, *options = zip(*cases, strict=True)
    names = "top_k", "temperature", "top_p", "min_p"
    tensors = (torch.tensor(values, device=DEVICE) for values in options)
    return torch.stack(rows), dict(zip(names, tensors, strict=True))


@pytest.fixture
def share(backend, monkeypatch):
    """Says how many programs share a row; none of them looks for lists of one."""
    if backend != "triton":
        pytest.skip(f"{backend}: shares rows in ways of its own, which have tests of their own")
    from tilewise.kernels.triton import _filter, _gumbel, _shortlist, _top_k

    def share(parts, lists=None):
        lists = parts > 1 if lists is None else lists
        for module in (_filter, _gumbel, _top_k):
            monkeypatch.setattr(module, "parts_of", lambda rows, vocab: parts)
        monkeypatch.setattr(_shortlist, "LEAST_VOCAB", 2049 if lists else _shortlist.MOST_VOCAB)

    return share


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuts_of_shared_rows_are_those_of_one_program(share, dtype):
    rows, options = rows_and_options(VOCAB)
    rows = rows.to(dtype)
    share(1)
    kept = tilewise.filter_logits(rows, **options, backend="triton")
    share(2)
    assert_same([tilewise.filter_logits(rows, **options, backend="triton")], [kept])
    share(1, lists=True)  # of a small top-k alone
    assert_same([tilewise.filter_logits(rows, **options, backend="triton")], [kept])
    assert (kept > -INFINITY).sum(1)[[0, 2, 3]].min() > 1


def test_probabilities_of_shared_rows_are_those_of_one_program(share):
    rows, options = rows_and_options(VOCAB)
    share(1)
    probs = tilewise.filtered_probs(rows, **options, backend="triton")
    share(2)
    assert_same([tilewise.filtered_probs(rows, **options, backend="triton")], [probs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_shared_rows_are_those_of_one_program(share, dtype):
    rows, options = rows_and_options(VOCAB)
    rows = rows.to(dtype)
    options["seed"] = torch.arange(len(rows), device=DEVICE) * 2**34
    share(1)
    tokens = tilewise.sample(rows, **options, backend="triton")
    share(2)
    assert torch.equal(tilewise.sample(rows, **options, backend="triton"), tokens)
    share(1, lists=True)
    assert torch.equal(tilewise.sample(rows, **options, backend="triton"), tokens)
    assert (tokens < 0).sum() == 7


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, {"top_k": 3}, {"top_k": 600, "top_p": 0.8},
        {"top_p": 0.9, "temperature": 0.6}, {"top_k": 512, "top_p": 0.99},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_all_rows(share, options):
    """With penalties, a bias and a mask: such rows are written once, in fp32."""
    rows = torch.stack([row_of_logits(VOCAB, seed) for seed in range(3)]).half()
    more = {
        "history": torch.arange(12, device=DEVICE).view(3, 4), "frequency_penalty": 0.5,
        "logit_bias": row_of_logits(VOCAB, 9),
        "mask": torch.full((3, 66), -(2**20) - 1, dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    drawn = []
    for parts in (1, 2):
        share(parts)
        drawn.append(
            [
                tilewise.sample(rows, **options, **more, seed=seed, backend="triton")
                for seed in range(3)
            ]
        )
    assert_same(*drawn)


@pytest.mark.parametrize("processed", [False, True])
def test_logprobs_of_shared_rows_are_those_of_one_program(share, processed):
    rows, options = rows_and_options(VOCAB)
    places = [0, 2, 3, 14, 23, 26, 28, 30, 33]
    rows, options = rows[places], {name: each[places] for name, each in options.items()}
    found = []
    for parts in (1, 2):
        share(parts)
        found.append(
            tilewise.sample_with_logprobs(
                rows, **options, processed=processed, seed=3, backend="triton"
            )
        )
    assert_same(found[1][:2], found[0][:2])
    assert not found[0][1].isnan().all()


@pytest.mark.parametrize("options", [{"top_k": 100}, {"top_p": 0.5}, {"top_k": 900}], ids=str)
def test_what_does_not_fit_on_a_list_is_searched_in_the_row(share, options):
    """So many ties."""
    rows = torch.zeros(1, 4200, dtype=torch.bfloat16, device=DEVICE)
    rows[0, 4100] = 1.0
    share(2)
    kept = tilewise.filter_logits(rows, **options, backend="triton")[0] > -INFINITY
    expected = tilewise.filter_logits(rows.double(), **options, backend="reference")[0] > -INFINITY
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_in_whichever_order_programs_list(share, order):
    """And none of them reads what another may still write."""
    from tilewise.op import INTERPRETED

    if not INTERPRETED:
        pytest.skip("triton: compiled, so the sanitizer cannot watch it")
    from tilewise.verify import sanitize

    rows, options = rows_and_options(VOCAB)
    places = [0, 2, 3, 14, 16]
    rows, options = rows[places], {name: each[places] for name, each in options.items()}
    options |= {"seed": 7, "backend": "triton"}
    share(2)
    tokens = tilewise.sample(rows, **options)
    with sanitize(order=order):
        assert torch.equal(tilewise.sample(rows, **options), tokens)
        values, _ = tilewise.top_k(rows[:2], 600, backend="triton")
    assert torch.equal(values, rows[:2].sort(descending=True).values[:, :600])


@pytest.mark.parametrize("k", [400, 700])
def test_the_largest_of_shared_rows_are_those_of_one_program(share, k):
    """Also where NaN and -inf are among them."""
    rows, _ = rows_and_options(VOCAB)
    rows = torch.cat([rows[[0, 1, 14, 20, 23, 26, 29]], torch.zeros(1, VOCAB, device=DEVICE)])
    share(2)
    values, indices = tilewise.top_k(rows, k, backend="triton")
    expected = tilewise.top_k(rows, k, backend="reference")
    assert_same([values], [expected[0]])
    assert torch.equal(indices, expected[1])


def test_replacements_from_shared_rows_are_those_of_one_program(backend, monkeypatch):
    """In a sequence what the target has more lies in one part, in a block of it or in none; one
    stands throughout, one has what is no token, and one no token to draw."""
    if backend != "triton":
        pytest.skip(f"{backend}: shares rows in ways of its own, which have tests of their own")
    from tilewise.kernels.triton import _verify_draft

    vocab, draft = 4200, 33
    logits = row_of_logits(vocab).repeat(6, draft + 1, 1)
    probs = logits[:, :-1].softmax(-1)
    drafts = torch.zeros(6, draft, dtype=torch.int64, device=DEVICE)
    drafts[5, 2] = vocab
    likely = probs[:, :, 0] / 2  # which stands whatever is drawn
    probs[..., 0] = likely
    probs[0, 7] *= 1e9
    probs[0, 7, [4150, 4160]] = 0.0
    probs[1, 32] *= 1e9
    probs[1, 32, [70, 2100]] = 0.0
    probs[2, 0] *= 1e9
    logits[4, 5] = NAN
    found = []
    for parts in (1, 2, 3):
        monkeypatch.setattr(_verify_draft, "parts_of", lambda rows, vocab, parts=parts: parts)
        found.append(tilewise.verify_draft(drafts, probs, logits, seed=1, backend="triton"))
    expected = tilewise.verify_draft(drafts, probs, logits, seed=1, backend="reference")
    for ours in found:
        assert_same(ours, expected)
    assert expected[0].tolist() == [7, 32, 0, 33, 5, 2]
    assert expected[1][0, 7] in (4150, 4160) and expected[1][1, 32] in (70, 2100)
    assert expected[1][4, 5] == -1

"""Decoding by tensor cores, in the halves that they take: what no tile may let through."""

import pytest
import torch
from attention_cases import zeros
from cache_cases import DECODE, PAGES, able, dense, lengths_of, normal, paged
from cases import DEVICE
from pairs import all_pairs

from tilewise import append_kv_, attention_decode, attention_decode_with_lse, rotary_tables
from tilewise.check import check, compare, failures
from tilewise.heads.cache import append_reference_
from tilewise.op import HALVES, OPS

pytestmark = pytest.mark.thinned(3)

DECODE_WITH_LSE = OPS["attention_decode_with_lse"]
INF, NAN = float("inf"), float("nan")
TILED = pytest.mark.parametrize(
    "backend", [name for name in DECODE.backends if DECODE.backends[name].dtypes >= HALVES]
)
LENGTHS = (600, 0, 130, 257)


def halves(lengths=LENGTHS, q_len=2, dim=32, v_dim=24, dtype=torch.bfloat16):
    """q, k and v of 16-byte accesses, not all in one piece."""
    q = normal(q_len, len(lengths), 8, dim, dtype=dtype).permute(1, 2, 0, 3)
    k, v = dense(lengths, dim=dim, v_dim=v_dim, dtype=dtype)
    return q, torch.empty_like(k).copy_(k), v


def right(ours, q, k, v, lengths, **options):
    """Hold out and lse to the reference, of what there is in one piece."""
    found = [torch.nan_to_num(t, neginf=-99) for t in ours]
    references = (
        DECODE_WITH_LSE.reference(*(t.to(dtype) for t in (q, k, v)), lengths, **options)
        for dtype in (q.dtype, torch.float64)
    )
    for a, yardstick, truth in zip(found, *references, strict=True):
        numbers = (torch.nan_to_num(t, neginf=-99) for t in (yardstick, truth))
        error, allowed = compare(a, *numbers)
        assert error <= allowed


@TILED
@PAGES
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("left", [None, 40])
def test_what_is_not_there_changes_no_bit(backend, page_size, poison, left):
    q, k, v = halves()
    seq_lens, window = lengths_of(*LENGTHS), None if left is None else (left, None)
    able(backend, q, k, v, seq_lens)
    clean, poisoned, options = (k, v), (k.clone(), v.clone()), {"window": window}
    for b, length in enumerate(LENGTHS):
        for t in poisoned:
            t[b, :, length:] = poison
    if page_size is not None:
        *clean, options["block_table"] = paged(k, v, LENGTHS, page_size, 0.0)
        *poisoned, _ = paged(*poisoned, LENGTHS, page_size, poison)
    ours, expected = (
        attention_decode_with_lse(q, *caches, seq_lens, **options, backend=backend)
        for caches in (poisoned, clean)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not ours[0][1].any() and bool((ours[1][1] == -INF).all())
    right(ours, q, k, v, seq_lens, window=window)


@TILED
@pytest.mark.parametrize("page", [-1, 99, 2**31 - 1, -(2**31)])
def test_tokens_of_no_page_are_not_there(backend, page):
    lengths = (40, 33)
    q, k, v = halves(lengths)
    *caches, table = paged(k, v, lengths, 16)
    table[0, 1] = page
    able(backend, q, *caches, lengths_of(*lengths), block_table=table)
    ours = attention_decode_with_lse(
        q, *caches, lengths_of(*lengths), block_table=table, backend=backend
    )
    right(ours, q, *(t.nan_to_num() for t in caches), lengths_of(*lengths), block_table=table)


@TILED
@pytest.mark.parametrize("length", [-5, 2**31 - 1, 46])
def test_a_wrong_length_is_the_nearest_that_there_can_be(backend, length):
    q, k, v = halves((40,))
    able(backend, q, k, v, lengths_of(length))
    ours = attention_decode_with_lse(q, k, v, lengths_of(length), backend=backend)
    right(ours, q, k, v, lengths_of(max(min(length, 45), 0)))


@TILED
def test_rows_that_are_not_aligned_are_read_too(backend):
    q, k, v = halves()
    k = normal(*k.shape[:3], 35, seed=1, dtype=k.dtype)[..., 3:]
    able(backend, q, k, v, lengths_of(*LENGTHS))
    ours = attention_decode_with_lse(q, k, v, lengths_of(*LENGTHS), backend=backend)
    right(ours, q, k, v, lengths_of(*LENGTHS))


@TILED
def test_it_repeats_to_the_bit(backend):
    q, k, v = halves(q_len=16)
    able(backend, q, k, v, lengths_of(*LENGTHS))
    first, *others = (
        attention_decode(q, k, v, lengths_of(*LENGTHS), backend=backend) for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


FACTORS = {
    "dim, v_dim": ((16, 16), (40, 24), (128, 128), (192, 128), (256, 256), (33, 7)),
    "q_len": (1, 3, 16),
    "kv_heads": (1, 8),
    "page_size": (None, 1, 16, 256),
    "sinks": (False, True),
    "left": (None, 20, 300),
    "softcap": (None, 1.5),
    "alibi": (None, "bh"),
    "dtype": (torch.float16, torch.bfloat16),
}
CASES = list(all_pairs(FACTORS))


@TILED
@pytest.mark.parametrize("number", range(len(CASES)))
def test_heads_of_every_width(backend, number):
    chosen = {name: value for name, value in CASES[number].items() if value not in (None, False)}
    dtype, (dim, v_dim) = chosen.pop("dtype"), chosen.pop("dim, v_dim")
    size = {"lengths": (1, 300, 257), "heads": 8, "dim": dim, "v_dim": v_dim} | chosen
    able(backend, zeros(1, 1, 1, dim, dtype=dtype), *[zeros(1, 1, 1, v_dim, dtype=dtype)] * 2)
    results = check(DECODE_WITH_LSE, backend, dtype, size, DEVICE)
    assert all(r.ok for r in results), failures(results)


# --- Appending.


@TILED
@PAGES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim, rotary_dim", [(32, 32), (48, 16), (11, 6)])
def test_what_is_appended_is_what_the_reference_appends(
    backend, page_size, interleaved, dim, rotary_dim
):
    before, dtype = (0, 7, 30, -2, 2**31 - 9), torch.bfloat16
    k, v = normal(5, 4, 2, dim, dtype=dtype).transpose(1, 2), normal(5, 2, 4, 16, dtype=dtype)
    options = dict(zip(("cos", "sin"), rotary_tables(33, rotary_dim, 100.0, DEVICE), strict=True))
    options["interleaved"] = interleaved
    shape = (5, 2, 32)
    if page_size is not None:
        most = -(-32 // page_size)
        table = torch.randperm(5 * most, generator=torch.Generator().manual_seed(0))
        options["block_table"] = table.view(5, most).int().to(DEVICE)
        options["block_table"][1, 0] = -1
        shape = (5 * most, page_size, 2)
    results = []
    for append in (append_reference_, append_kv_):
        caches = [torch.full((*shape, n), NAN, device=DEVICE, dtype=dtype) for n in (dim, 16)]
        able(backend, k, *caches, lengths_of(*before))
        named = {"backend": backend} if append is append_kv_ else {}
        append(*caches, k, v, lengths_of(*before), **options, **named)
        results.append(caches)
    (k_expected, v_expected), (k_cache, v_cache) = results
    assert torch.equal(v_cache.nan_to_num(-9), v_expected.nan_to_num(-9))
    assert torch.equal(k_cache.isnan(), k_expected.isnan())
    off = (k_cache.float() - k_expected.float()).nan_to_num().abs().max()
    assert off <= 2 * torch.finfo(dtype).eps * k_expected.nan_to_num().abs().max()

"""Decoding is attention of the last tokens to what is in the cache, wherever that lies."""

import pytest
import torch
from attention_cases import near
from cache_cases import DECODE, EVERY, PAGES, able, cached, dense, lengths_of, normal, paged
from cases import DEVICE, label
from pairs import all_pairs

import tilewise
from tilewise import (
    attention_decode,
    attention_decode_with_lse,
    attention_with_lse,
    merge_attention,
)
from tilewise.check import check, failures
from tilewise.op import OPS

INF, NAN = float("inf"), float("nan")


def one_by_one(q, k, v, lengths, sinks=None, **options):
    """out and lse of each sequence by the reference of attention, `[batch, heads, q_len, ...]`."""
    slopes, outs = options.pop("alibi_slopes", None), []
    for b, length in enumerate(lengths):
        if slopes is not None:
            options["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
        heads = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        outs.append(
            attention_with_lse(*heads, None, sinks, causal=True, **options, backend="reference")
        )
    return [torch.cat(parts) for parts in zip(*outs, strict=True)]


def same(ours, expected):
    near([t.nan_to_num(neginf=-99) for t in ours], [t.nan_to_num(neginf=-99) for t in expected])


OPTIONS = {
    "plain": {},
    "window": {"window": (100, 3)},
    "slopes": {"alibi_slopes": normal(8, seed=5).abs()},
    "slopes of each": {"alibi_slopes": normal(3, 8, seed=5).abs(), "scale": -0.2},
    "softcap": {"softcap": 1.5},
    "all": {"alibi_slopes": normal(8, seed=5).abs(), "softcap": 1.5, "window": (30, None),
            "sinks": normal(8, seed=6)},
}  # fmt: skip
LENGTHS = (600, 17, 257)


@pytest.mark.thinned(4)
@EVERY
@PAGES
@pytest.mark.parametrize("q_len", [1, 2, 16])
def test_it_is_attention_of_the_last_tokens(backend, page_size, q_len):
    q = normal(q_len, 3, 8, 8).permute(1, 2, 0, 3)
    k, v, options = cached(LENGTHS, page_size)
    able(backend, q, k, v, lengths_of(*LENGTHS), **options)
    ours = attention_decode_with_lse(q, k, v, lengths_of(*LENGTHS), **options, backend=backend)
    same(ours, one_by_one(q, *dense(LENGTHS), LENGTHS))


@pytest.mark.thinned(3)
@EVERY
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_options_are_those_of_attention(backend, name, page_size):
    q, options = normal(3, 8, 3, 8), OPTIONS[name]
    k, v, more = cached(LENGTHS, page_size)
    able(backend, q, k, v, lengths_of(*LENGTHS), **options, **more)
    ours = attention_decode_with_lse(
        q, k, v, lengths_of(*LENGTHS), **options, **more, backend=backend
    )
    same(ours, one_by_one(q, *dense(LENGTHS), LENGTHS, **options))


@pytest.mark.thinned(8)
@EVERY
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("dim, v_dim", [(16, 16), (3, 20), (72, 5), (128, 40)])
def test_heads_that_share_keys(backend, kv_heads, q_len, dim, v_dim):
    lengths = (1, 40, 131)
    q = normal(3, 8, q_len, dim)
    k, v = dense(lengths, kv_heads=kv_heads, dim=dim, v_dim=v_dim)
    able(backend, q, k, v, lengths_of(*lengths))
    ours = attention_decode_with_lse(q, k, v, lengths_of(*lengths), backend=backend)
    same(ours, one_by_one(q, k, v, lengths))


@pytest.mark.thinned(3)
@EVERY
@pytest.mark.parametrize("length", [1, 17, 255, 256, 257, 511, 512, 513, 1024])
def test_where_keys_are_split(backend, length):
    q = normal(1, 2, 2, 8)
    k, v = dense((length,), spare=3)
    able(backend, q, k, v, lengths_of(length))
    ours = attention_decode_with_lse(q, k, v, lengths_of(length), backend=backend)
    same(ours, one_by_one(q, k, v, (length,)))


@pytest.mark.thinned(4)
@EVERY
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@PAGES
@pytest.mark.parametrize("window", [None, (40, None)])
def test_what_is_not_in_the_cache_is_never_seen(backend, poison, page_size, window):
    lengths = (600, 0, 130)
    q, seq_lens = normal(3, 4, 2, 8), lengths_of(*lengths)
    k, v = dense(lengths)
    clean, poisoned = (k, v), (k.clone(), v.clone())
    options = {}
    for b, length in enumerate(lengths):
        for t in poisoned:
            t[b, :, length:] = poison
    if page_size is not None:
        *clean, options["block_table"] = paged(k, v, lengths, page_size, 0.0)
        *poisoned, _ = paged(k, v, lengths, page_size, poison)
    able(backend, q, *clean, seq_lens, window=window, **options)
    ours, expected = (
        attention_decode_with_lse(q, *caches, seq_lens, window=window, **options, backend=backend)
        for caches in (poisoned, clean)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not ours[0][1].any() and bool((ours[1][1] == -INF).all())
    assert bool(ours[0].isfinite().all())


@EVERY
@pytest.mark.parametrize("page", [-1, -7, 99, 2**31 - 1])
def test_a_page_that_is_not_there_is_as_if_its_tokens_were_not(backend, page):
    lengths = (40, 33)
    q, (k, v) = normal(2, 4, 1, 8), dense(lengths)
    *caches, table = paged(k, v, lengths, 16)
    table[0, 1] = page
    able(backend, q, *caches, lengths_of(*lengths), block_table=table)
    ours = attention_decode_with_lse(
        q, *caches, lengths_of(*lengths), block_table=table, backend=backend
    )
    seen = torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    seen[0, ..., 16:32] = False
    seen[1, ..., 33:] = False
    same(ours, attention_with_lse(q, k[:, :, :40], v[:, :, :40], mask=seen, backend="reference"))


@EVERY
@pytest.mark.parametrize("length", [-5, 2**31 - 1, 46])
def test_a_wrong_length_leads_nowhere_else(backend, length):
    q, (k, v) = normal(1, 4, 1, 8), dense((40,))
    able(backend, q, k, v, lengths_of(length))
    ours = attention_decode_with_lse(q, k, v, lengths_of(length), backend=backend)
    same(ours, one_by_one(q, k, v, (max(min(length, 45), 0),)))


@EVERY
def test_more_new_tokens_than_there_are_see_nothing(backend):
    q, (k, v) = normal(2, 4, 5, 8), dense((3, 7))
    able(backend, q, k, v, lengths_of(3, 7))
    out, lse = attention_decode_with_lse(q, k, v, lengths_of(3, 7), backend=backend)
    assert not out[0, :, :2].any() and bool((lse[0, :, :2] == -INF).all())
    same([out, lse], one_by_one(q, k, v, (3, 7)))


@pytest.mark.parametrize("backend", DECODE.backends)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_know_the_others_nor_where_it_lies(backend, dtype):
    """Not by one bit: not of the batch, of the room of the cache, or of its pages."""
    q, (k, v) = normal(3, 8, 2, 64, dtype=dtype), dense(LENGTHS, dim=64, v_dim=64, dtype=dtype)
    able(backend, q, k, v, lengths_of(*LENGTHS))
    whole = attention_decode_with_lse(q, k, v, lengths_of(*LENGTHS), backend=backend)
    for b, length in enumerate(LENGTHS):
        own = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        alone = attention_decode_with_lse(*own, lengths_of(length), backend=backend)
        assert all(torch.equal(a, w[b : b + 1]) for a, w in zip(alone, whole, strict=True))
    for page_size in (1, 16, 256):
        *caches, table = paged(k, v, LENGTHS, page_size)
        ours = attention_decode_with_lse(
            q, *caches, lengths_of(*LENGTHS), block_table=table, backend=backend
        )
        assert all(torch.equal(a, w) for a, w in zip(ours, whole, strict=True))


@pytest.mark.parametrize("backend", DECODE.backends)
def test_the_number_of_threads_changes_no_bit(backend):
    if backend != "numba":
        pytest.skip(f"{backend}: does not run on torch's threads")
    q, (k, v) = normal(3, 8, 2, 64), dense((2000, 17, 900), dim=64, v_dim=64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention_decode(q, k, v, lengths_of(2000, 17, 900), backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@EVERY
def test_what_two_caches_hold_merges_by_lse(backend):
    """A prefix that sequences share, and what each has for itself."""
    q, (k, v) = normal(2, 4, 1, 8), dense((60, 60), spare=0)
    able(backend, q, k, v, lengths_of(60, 60))
    whole = attention_decode_with_lse(q, k, v, lengths_of(60, 60), backend=backend)
    parts = [
        attention_decode_with_lse(q, k[:, :, own], v[:, :, own], lengths_of(n, n), backend=backend)
        for own, n in ((slice(40), 40), (slice(40, None), 20))
    ]
    near(merge_attention(*parts[0], *parts[1]), whole)


@pytest.mark.parametrize("backend", DECODE.backends)
def test_the_output_lies_in_memory_as_the_queries_do(backend):
    k, v = dense((9, 4))
    able(backend, normal(2, 4, 3, 8), k, v, lengths_of(9, 4))
    for order in [(0, 1, 2), (0, 2, 1), (2, 1, 0)]:
        q = torch.empty_permuted((2, 4, 3, 8), (*order, 3), device=DEVICE).copy_(normal(2, 4, 3, 8))
        out = attention_decode(q, k, v, lengths_of(9, 4), backend=backend)
        assert sorted(range(3), key=out.stride, reverse=True) == list(order)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_autocast_lowers_the_queries(backend):
    q, (k, v) = normal(2, 4, 1, 8), dense((9, 4), dtype=torch.bfloat16)
    able(backend, q, k, v, lengths_of(9, 4))
    expected = attention_decode(q.bfloat16(), k, v, lengths_of(9, 4), backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(attention_decode(q, k, v, lengths_of(9, 4), backend=backend), expected)


def test_of_full_caches_the_reference_is_the_function_of_torch():
    q, (k, v) = normal(2, 4, 1, 8, dtype=torch.float64), dense((9, 9), spare=0, dtype=torch.float64)
    tensors = (q, k, v, lengths_of(9, 9))
    torch.testing.assert_close(DECODE.reference(*tensors), DECODE.native(*tensors))


def test_a_decoded_sequence_is_a_causal_one():
    """Token after token, appended and decoded, gives what attention gives at once."""
    q, k, v = (normal(1, heads, 20, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    caches = [torch.full((9, 4, 2, 8), NAN, device=DEVICE) for _ in range(2)]
    table = torch.tensor([[3, 8, 0, 5, 1]], dtype=torch.int32, device=DEVICE)
    outs = []
    for first in range(0, 20, 2):
        new = slice(first, first + 2)
        tilewise.append_kv_(
            *caches, k[:, :, new], v[:, :, new], lengths_of(first), block_table=table
        )
        outs.append(
            attention_decode(q[:, :, new], *caches, lengths_of(first + 2), block_table=table)
        )
    near([torch.cat(outs, 2)], [tilewise.attention(q, k, v, causal=True)])


# --- Every two options, by the rule.

FACTORS = {
    "lengths": ((1, 17, 257), (0, 256, 255), (600,)),
    "q_len": (1, 2, 16),
    "kv_heads": (1, 2, 8),
    "dim": (16, 40, 128),
    "v_dim": (None, 24),
    "page_size": (None, 1, 16, 64, 256),
    "sinks": (False, True),
    "alibi": (None, "h", "bh"),
    "left": (None, 20),
    "softcap": (None, 1.5),
    "scale": (None, -0.1),
}
CASES = [
    {"heads": 8} | {n: v for n, v in chosen.items() if v not in (None, False)}
    for chosen in all_pairs(FACTORS)
]


@pytest.mark.thinned(7)
@pytest.mark.parametrize("dtype", sorted(DECODE.backends["numba"].dtypes, key=str), ids=str)
@pytest.mark.parametrize("backend", DECODE.backends)
@pytest.mark.parametrize("size", CASES, ids=[label(DECODE, "", "", s) for s in CASES])
def test_every_two_options(backend, dtype, size):
    results = check(OPS["attention_decode_with_lse"], backend, dtype, size, DEVICE)
    if results[0].skipped:
        pytest.skip(f"{backend}: {results[0].skipped}")
    assert all(r.ok for r in results), failures(results)

"""What is appended stands where it belongs, turned, and nothing else is touched."""

import pytest
import torch
from cache_cases import EVERY, PAGES, able, lengths_of, normal
from cases import DEVICE

from tilewise import append_kv_, rotary, rotary_tables
from tilewise.check import compare
from tilewise.rotation import rotated

pytestmark = pytest.mark.thinned(3)

BEFORE = (0, 7, 30)
OLD = -7.0


def caches(page_size, kv_heads=2, capacity=34, dims=(10, 6), dtype=torch.float32):
    """Two caches of one number, where what is written can be seen, and the pages of each."""
    if page_size is None:
        return [
            torch.full((kv_heads, 3, capacity, d + 3), OLD, device=DEVICE, dtype=dtype)
            .transpose(0, 1)[..., 3:]
            for d in dims
        ], {}  # fmt: skip
    most = -(-capacity // page_size)
    order = torch.randperm(3 * most + 2, generator=torch.Generator().manual_seed(1))
    table = order[: 3 * most].view(3, most).int().to(DEVICE)
    return [
        torch.full((3 * most + 2, kv_heads, page_size, d), OLD, device=DEVICE, dtype=dtype)
        .transpose(1, 2)
        for d in dims
    ], {"block_table": table}  # fmt: skip


def tokens(new=4, dtype=torch.float32):
    k = normal(3, new, 2, 10, seed=1, dtype=dtype).transpose(1, 2)
    return k, normal(2, 3, new, 6, seed=2, dtype=dtype).transpose(0, 1)


def where(cache, options, b, position):
    """What the cache holds of a token, `[kv_heads, dim]`."""
    if not options:
        return cache[b, :, position]
    page_size = cache.shape[1]
    return cache[int(options["block_table"][b, position // page_size]), position % page_size]


@EVERY
@PAGES
@pytest.mark.parametrize("new", [1, 4])
def test_tokens_stand_behind_those_before(backend, page_size, new):
    (k_cache, v_cache), options = caches(page_size)
    k, v = tokens(new)
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    before = lengths_of(*BEFORE)
    assert append_kv_(k_cache, v_cache, k, v, before, **options, backend=backend) is None
    for b, first in enumerate(BEFORE):
        for i in range(new):
            assert torch.equal(where(k_cache, options, b, first + i), k[b, :, i])
            assert torch.equal(where(v_cache, options, b, first + i), v[b, :, i])
    for cache in (k_cache, v_cache):  # nothing else was touched, not even beside a view
        width = cache.shape[-1]
        assert int((cache != OLD).sum()) == 3 * new * 2 * width
        if page_size is None:
            assert bool((cache._base[..., :3] == OLD).all())


@EVERY
@PAGES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [10, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_keys_are_turned_by_their_positions(backend, page_size, interleaved, rotary_dim, dtype):
    (k_cache, v_cache), options = caches(page_size, dtype=dtype)
    k, v = tokens(dtype=dtype)
    cos, sin = rotary_tables(40, rotary_dim, 100.0, DEVICE)
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    append_kv_(
        k_cache, v_cache, k, v, lengths_of(*BEFORE), **options, cos=cos, sin=sin,
        interleaved=interleaved, backend=backend,
    )  # fmt: skip
    for b, first in enumerate(BEFORE):
        own = slice(first, first + 4)
        tables = cos[own], sin[own], None
        truth = rotated(k[b].double(), *tables, interleaved)
        yardstick = rotated(k[b], *tables, interleaved).to(dtype)
        ours = torch.stack([where(k_cache, options, b, first + i) for i in range(4)], 1)
        error, allowed = compare(ours, yardstick, truth)
        assert error <= allowed
        values = torch.stack([where(v_cache, options, b, first + i) for i in range(4)], 1)
        assert torch.equal(values, v[b])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_turns_as_rotary_does(backend, dtype):
    (k_cache, v_cache), _ = caches(None, dtype=dtype)
    k, v = tokens(dtype=dtype)
    cos, sin = rotary_tables(40, 10, 100.0, DEVICE)
    able(backend, k, k_cache, v_cache, lengths_of(5, 5, 5))
    append_kv_(k_cache, v_cache, k, v, lengths_of(5, 5, 5), cos=cos, sin=sin, backend=backend)
    turned, _ = rotary(k, k, cos, sin, offset=5, backend=backend)
    assert torch.equal(k_cache[:, :, 5:9], turned)


@EVERY
@pytest.mark.parametrize("page_size", [None, 16])
def test_without_room_nothing_is_written(backend, page_size):
    (k_cache, v_cache), options = caches(page_size, capacity=32)
    k, v = tokens()
    before = lengths_of(30, 2**31 - 9, -2)  # beside the first none may be written
    able(backend, k, k_cache, v_cache, before)
    append_kv_(k_cache, v_cache, k, v, before, **options, backend=backend)
    for cache, t in ((k_cache, k), (v_cache, v)):
        for b, i, position in ((0, 0, 30), (0, 1, 31), (2, 2, 0), (2, 3, 1)):
            assert torch.equal(where(cache, options, b, position), t[b, :, i])
        assert int((cache != OLD).sum()) == 4 * 2 * cache.shape[-1]


@EVERY
@pytest.mark.parametrize("page", [-1, 99, -(2**31)])
def test_where_there_is_no_page_nothing_is_written(backend, page):
    (k_cache, v_cache), options = caches(16)
    options["block_table"][2, 1] = page
    k, v = tokens()
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    append_kv_(k_cache, v_cache, k, v, lengths_of(*BEFORE), **options, backend=backend)
    assert int((k_cache != OLD).sum()) == (4 + 4 + 2) * 2 * 10  # of the last only 32 and 33
    assert torch.equal(where(v_cache, options, 2, 33), v[2, :, 3])


@EVERY
def test_positions_past_the_tables_are_nan(backend):
    (k_cache, v_cache), _ = caches(None)
    k, v = tokens()
    cos, sin = rotary_tables(9, 6, 100.0, DEVICE)
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    append_kv_(k_cache, v_cache, k, v, lengths_of(*BEFORE), cos=cos, sin=sin, backend=backend)
    assert bool(k_cache[1, :, 7:9].isfinite().all())
    assert bool(k_cache[1, :, 9:11, :6].isnan().all())
    assert torch.equal(k_cache[1, :, 9:11, 6:], k[1, :, 2:, 6:])
    assert bool(v_cache.isfinite().all())


@EVERY
def test_nothing_new_is_nothing_written(backend):
    (k_cache, v_cache), _ = caches(None)
    k, v = tokens(0)
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    append_kv_(k_cache, v_cache, k, v, lengths_of(*BEFORE), backend=backend)
    assert not (k_cache != OLD).any() and not (v_cache != OLD).any()


@EVERY
def test_compiled_it_writes_too(backend):
    k, v = tokens()
    results = []
    for call in (append_kv_, torch.compile(append_kv_, backend="aot_eager", fullgraph=True)):
        (k_cache, v_cache), _ = caches(None)
        able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
        if backend == "reference" and call is not append_kv_:
            pytest.skip("reference: where it writes depends on the numbers")
        call(k_cache, v_cache, k, v, lengths_of(*BEFORE), backend=backend)
        results.append((k_cache, v_cache))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY
def test_autograd_sees_that_the_caches_were_written(backend):
    (k_cache, v_cache), _ = caches(None)
    k, v = tokens()
    able(backend, k, k_cache, v_cache, lengths_of(*BEFORE))
    leaf = torch.ones(10, device=DEVICE, requires_grad=True)
    y = leaf * k_cache
    append_kv_(k_cache, v_cache, k, v, lengths_of(*BEFORE), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

"""Caches for the tests of decoding, in one piece and in pages, each laid out in its own way."""

import pytest
import torch
from cases import DEVICE

from tilewise.choice import refusal
from tilewise.op import OPS

DECODE = OPS["attention_decode"]
EVERY = pytest.mark.parametrize("backend", [*DECODE.backends, "reference"])
PAGES = pytest.mark.parametrize("page_size", [None, 1, 16, 64, 256], ids=lambda n: f"pages of {n}")


def able(backend, q, *tensors, **options):
    """Skip aloud what `backend` cannot take."""
    if backend != "reference" and (no := refusal(DECODE.backends[backend], q, *tensors, **options)):
        pytest.skip(f"{backend}: {no[1]}")


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def lengths_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def dense(lengths, kv_heads=2, dim=8, v_dim=12, spare=5, dtype=torch.float32):
    """k and v, `[batch, kv_heads, capacity, dim]`: a swapped stride must not go unseen."""
    batch, capacity = len(lengths), max(lengths) + spare
    k = normal(kv_heads, batch, capacity, dim + 3, seed=1, dtype=dtype)[..., 3:].transpose(0, 1)
    v = normal(batch, capacity, kv_heads, v_dim, seed=2, dtype=dtype).transpose(1, 2)
    return k, v


def paged(k, v, lengths, page_size, fill=float("nan")):
    """The same tokens in pages that lie in no order, `fill` wherever no token is."""
    batch, kv_heads, capacity, _ = k.shape
    most = -(-capacity // page_size)
    order = torch.randperm(batch * most + 2, generator=torch.Generator().manual_seed(3))
    table = torch.full((batch, most), -1, dtype=torch.int32)
    caches = []
    for t in (k, v):
        shape = (kv_heads, batch * most + 2, page_size, t.shape[3])
        caches.append(torch.full(shape, fill, device=DEVICE, dtype=t.dtype).permute(1, 2, 0, 3))
    for b, length in enumerate(lengths):
        for i in range(-(-length // page_size)):
            page = int(order[b * most + i])
            table[b, i] = page
            tokens = slice(i * page_size, min((i + 1) * page_size, length))
            for cache, t in zip(caches, (k, v), strict=True):
                cache[page, : tokens.stop - tokens.start] = t[b, :, tokens].transpose(0, 1)
    return *caches, table.to(DEVICE)


def cached(lengths, page_size, **shape):
    """k_cache, v_cache and options, of pages or of none."""
    k, v = dense(lengths, **shape)
    if page_size is None:
        return k, v, {}
    *caches, table = paged(k, v, lengths, page_size)
    return *caches, {"block_table": table}

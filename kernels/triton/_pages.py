"""Where the tokens of a sequence lie in a cache, in one piece or in pages."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def page_of(
    table_ptr, batch, first, position, there, pages, BLOCK: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """The page of each position, or the sequence without pages; the place in it; and which of those
    `there` the cache has. A block of BLOCK positions, from `first` on, may lie in one page."""
    if table_ptr is None:
        return tl.zeros_like(tl.cast(position, tl.int64)) + batch, position, there
    elif BLOCK > 0 and PAGE % BLOCK == 0:
        own = tl.load(table_ptr + first // PAGE)
        page = tl.zeros_like(tl.cast(position, tl.int64)) + own
        return page, position % PAGE, there & (page >= 0) & (page < pages)
    else:
        page = tl.load(table_ptr + position // PAGE, mask=there, other=-1)
        there = there & (page >= 0) & (page < pages)
        return tl.cast(page, tl.int64), position % PAGE, there


def cache_of(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None
) -> tuple[tuple[int, int, int, int, int], tuple[tuple[int, int, int], ...]]:
    """kv_heads, the capacity, how many pages there are, the stride of the table and the size of a
    page, 0 without pages; and the strides [batch or page, head, position] of both caches."""
    if block_table is None:
        sizes = (k_cache.shape[1], k_cache.shape[2], 0, 0, 0)
        return sizes, tuple(t.stride()[:3] for t in (k_cache, v_cache))
    pages, page_size, kv_heads, _ = k_cache.shape
    capacity = block_table.shape[1] * page_size
    sizes = (kv_heads, capacity, pages, block_table.stride(0), page_size)
    return sizes, tuple((t.stride(0), t.stride(2), t.stride(1)) for t in (k_cache, v_cache))

"""New keys and values into a cache, each to its place, the keys turned on the way."""

import triton
import triton.language as tl

from tilewise.kernels.triton._pages import page_of
from tilewise.kernels.triton._rotation import angles_of, turn_rows

TILE = 1024  # elements of one program


@triton.jit
def _append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, before_ptr, table_ptr, cos_ptr, sin_ptr,
    rows, heads, new, capacity, pages, table_stride, positions, cos_stride, sin_stride,
    k_cache_strides, v_cache_strides, k_strides, v_strides,
    PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    V_COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    # Heads beside each other, as they are in a page. Half of the programs have keys, half values.
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token, batch = row % heads, row // heads % new, row // heads // new
    inside = row < rows
    position = tl.load(before_ptr + batch, mask=inside, other=-1).to(tl.int64) + token
    there = inside & (position >= 0) & (position < capacity)
    if table_ptr is not None:
        table_ptr += batch * table_stride
    page, slot, there = page_of(table_ptr, batch, 0, position, there, pages, 0, PAGE)

    write = there[:, None]
    if tl.program_id(1) == 0:
        x = batch * k_strides[0] + head * k_strides[1] + token * k_strides[2]
        y = page * k_cache_strides[0] + head * k_cache_strides[1] + slot * k_cache_strides[2]
        cos, sin = 0.0, 0.0
        if HALF > 0:
            cos, sin = angles_of(
                cos_ptr, sin_ptr, position[:, None], write, cos_stride, sin_stride, positions,
                HALF, BLOCK,
            )  # fmt: skip
        turn_rows(
            k_cache_ptr + y[:, None], k_ptr + x[:, None], write, write, cos, sin,
            HALF, REST, INTERLEAVED, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        x = batch * v_strides[0] + head * v_strides[1] + token * v_strides[2]
        y = page * v_cache_strides[0] + head * v_cache_strides[1] + slot * v_cache_strides[2]
        turn_rows(
            v_cache_ptr + y[:, None], v_ptr + x[:, None], write, write, 0.0, 0.0,
            0, V_COLS, False, 1, V_BLOCK,
        )  # fmt: skip

"""Runs of one id, over rows in the order of their ids that are walked in chunks."""

import triton
import triton.language as tl

# Of a run over all chunks a program adds TALL at a time, so the chunks may be that much shorter.
TALL = 16


@triton.jit
def key_of(keys_ptr, turn):
    """The id of all rows of a turn."""
    if keys_ptr is None:
        return turn
    else:
        return tl.load(keys_ptr + turn)


@triton.jit(do_not_specialize=["padding"])
def _join_kernel(
    dtable_ptr, parts_ptr, keys_ptr,
    rows, cols, repeats, table_rows, padding, chunk_rows, chunks,
    TALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Add up a run that began in this chunk and goes on in others.
    chunk = tl.cast(tl.program_id(0), tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    first = chunk * chunk_rows
    following = tl.minimum(first + chunk_rows, rows - 1)
    key = key_of(keys_ptr, tl.maximum(following - 1, 0) // repeats)
    goes_on = (first + chunk_rows < rows) & (key_of(keys_ptr, following // repeats) == key)
    before = tl.maximum(first - 1, 0)
    began_before = (first > 0) & (key_of(keys_ptr, before // repeats) == key)
    if goes_on & (not began_before) & (key >= 0) & (key < table_rows) & (key != padding):
        total = tl.load(parts_ptr + (chunk * 2 + 1) * cols + col, mask=mask, other=0.0)
        other = chunk + 1
        more = goes_on
        while more:
            at = other + tl.arange(0, TALL)
            keys = key_of(keys_ptr, tl.minimum(at * chunk_rows, rows - 1) // repeats)
            same = (at < chunks) & (keys == key)
            part = parts_ptr + (at * 2 * cols)[:, None] + col[None, :]
            total += tl.sum(tl.load(part, mask=same[:, None] & mask[None, :], other=0.0), 0)
            other += TALL
            more = tl.sum(same.to(tl.int32)) == TALL
        tl.store(dtable_ptr + key * cols + col, total, mask=mask)

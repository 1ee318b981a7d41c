"""What the row kernels share: how wide a block is, how many warps take it."""

import triton

MAX_PARTS = 256  # not a function of the GPU, so that the bits of a weight's gradient are not either


def row_options(cols: int) -> dict[str, int]:
    """One program a row: the row in one block, 512 elements a warp."""
    block = triton.next_power_of_2(cols)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}

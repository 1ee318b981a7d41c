"""What the kernels share: the options of every launch, blocks and warps for a row, a layout."""

import torch
import triton
from torch import Tensor


def launch_options(warps: int) -> dict[str, int | bool]:
    """What every launch says, so that no version of Triton or ptxas chooses for itself.

    A product and its sum are one instruction: newer versions than 3.9 must be told. And ptxas may
    take all registers that such a block can have: else it aims at more blocks at a time, and keeps
    a handful of values in local memory (dk and dv in fp32, rms_norm's dx in bf16 for sm_100).
    """
    registers = min(65536 // (32 * warps), 255)
    return {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}


MAX_PARTS = 256  # not a function of the GPU, so that the bits of a weight's gradient are not either

# Columns that a program can hold in registers; above, backward spills (sm_80 and sm_90, fp32 and
# bf16: 18 to 74 local accesses at 16384, none at 8192), so wider rows are taken in blocks.
WIDEST_BLOCK = 8192
WIDE_ROW = {"BLOCK": 4096, **launch_options(8)}

# What `tilewise kernels --prune` compiles: a row in one block leaves only the warps to choose.
_ROW = {"num_warps": (1, 2, 4, 8, 16, 32)}
_WIDE = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}
SEARCH_SPACE = {
    "_forward_kernel": _ROW,
    "_backward_kernel": _ROW,
    "_forward_wide_kernel": _WIDE,
    "_backward_wide_kernel": _WIDE,
    "_dweight_wide_kernel": _WIDE,
}


def row_options(cols: int) -> dict[str, int]:
    """One program a row: the row in one block, 512 elements a warp."""
    block = triton.next_power_of_2(cols)
    return {"BLOCK": block, **launch_options(min(max(block // 512, 1), 16))}


def same_layout(x: Tensor, cols: int) -> Tensor:
    """An empty [..., cols] whose other dims lie in memory in the order of those of `x`."""
    order = sorted(range(x.ndim - 1), key=x.stride, reverse=True)
    size = (*x.shape[:-1], cols)
    return torch.empty_permuted(size, (*order, x.ndim - 1), dtype=x.dtype, device=x.device)


def broadcast_strides(t: Tensor | None) -> tuple[int, ...]:
    """Of a [batch, heads, queries, cols], 0 along what is broadcast, which is all of None."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(
        0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)
    )

"""How attention is cut into tiles: blocks of queries and keys by what a program keeps of them, and
what its loops read by tensor descriptors."""

from typing import Any

import triton
from torch import Tensor

from tilewise.kernels.triton._attention_scores import Drawn, Rules
from tilewise.kernels.triton._descriptors import can_describe, descriptor_of, has_copy_engine
from tilewise.kernels.triton._packed import Packed
from tilewise.kernels.triton._shared import launch_options

# From how many multiplications of the two forward products on loops read by descriptors. To make
# one and pass it takes the host some 5 us, this many the tensor cores of an H200 some 20: guessed
# and counted, not timed.
LARGE = 2**33


def width_of(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 16)  # the least that tl.dot takes


# Blocks of queries and keys, warps and stages by bytes an element, by how much a program keeps
# (`kept_beside`), and by the wider of the two dims: the largest of those tried that ptxas compiles
# for sm_80, sm_90, sm_100 and sm_120 with no access to local memory, for every declared size.
# Products in true fp32 are made of scalars; what a loop keeps of them fills the registers.
FORWARD = {
    4: ({64: (64, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 32, 8, 1)},
        {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}),
    2: ({64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        {64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
        {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}),
}  # fmt: skip
QUERIES_BACK = {
    4: ({64: (32, 32, 8, 1), 128: (16, 16, 4, 2), 256: (16, 16, 8, 2)},
        {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}),
    2: ({64: (64, 32, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
        {64: (64, 32, 4, 1), 128: (64, 16, 8, 1), 256: (32, 32, 8, 1)},
        {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}),
}  # fmt: skip
KEYS_BACK = {
    4: ({64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
        {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        {64: (16, 16, 8, 1), 128: (16, 16, 16, 1), 256: (16, 16, 16, 1)}),
    2: ({64: (32, 64, 4, 1), 128: (16, 128, 8, 1), 256: (32, 32, 8, 1)},
        {64: (16, 64, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
        {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}),
}  # fmt: skip
# Of packed sequences, whose lengths are in registers too: dq spilled in fp32 with 4 warps (sm_90
# and sm_120), dk and dv of heads of 128 in 16 bits on sm_100, their out on sm_80 and sm_120.
PACKED_FORWARD = {
    4: FORWARD[4], 2: ({**FORWARD[2][0], 128: (64, 64, 8, 2)}, *FORWARD[2][1:]),
}  # fmt: skip
PACKED_QUERIES = {4: (QUERIES_BACK[4][1], *QUERIES_BACK[4][1:]), 2: QUERIES_BACK[2]}
PACKED_KEYS = {4: KEYS_BACK[4], 2: ({**KEYS_BACK[2][0], 128: (16, 64, 4, 1)}, *KEYS_BACK[2][1:])}
BIAS_BACK = {  # a bias alone is much
    4: ({64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}),
    2: ({64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
        {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)}),
}  # fmt: skip
# What a program streams by descriptors takes no registers, so that it can have more. By count the
# tensor cores bind on sm_90: they take 1.0 of the longest of the loop's times (heads of 128) and
# 0.97, 1.0 and 0.83 (64), where by the tables above it is 0.94, 0.67 and 0.61 for heads of 128;
# with a bias 0.94, 1.0 and 0.80. Blocks of 64 queries would do as well but for L2, which they ask
# for twice the bytes.
LONG_FORWARD = (
    {64: (128, 128, 8, 2), 128: (128, 128, 8, 2)},
    {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
    {},
)
LONG_QUERIES = (
    {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
    {64: (128, 64, 8, 1), 128: (128, 64, 8, 1)},
    {},
)
LONG_KEYS = (
    {64: (32, 128, 4, 1), 128: (64, 64, 4, 1)},
    {64: (64, 64, 4, 1), 128: (32, 64, 4, 1)},
    {},
)
LONG_BIAS = ({64: (128, 64, 8, 2), 128: (128, 64, 8, 2)}, {}, {})  # 0.77 and 0.41 for 0.17 and 0.15


def kept_beside(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rules: Rules, drawn: Drawn) -> int:
    """How much a program keeps beside the products, from 0 to 2: one more where scores are made of
    slopes and a softcap, or of what is loaded or drawn for each, and where rows are not made of
    16 bytes, or packed ones of at most 64 do not fill their tile."""
    full_mask = rules.mask_query is not None
    loaded = rules.bias is not None or drawn.scale is not None or full_mask
    many = loaded or (rules.slopes is not None and rules.softcap is not None)
    grain = 16 // q.itemsize
    odd = any(n % grain for t in (q, k, v) for n in (t.shape[-1], *t.stride()[:-1]))
    dims = q.shape[-1], v.shape[-1]
    narrow = packed.ends_q is not None and max(dims) <= 64 and min(dims) < width_of(max(dims))
    return many + (odd or narrow)


def long_options(described: bool, tables: tuple[dict, ...], level: int, rules: Rules) -> dict:
    """What is taken instead where tiles come by descriptors. Slopes, a softcap, a full mask count
    once more: with them the larger tiles spill, or ptxas serialises their products."""
    tight = any(n is not None for n in (rules.slopes, rules.softcap, rules.mask_query))
    return tables[min(level + tight, 2)] if described else {}


def options_of(
    table: dict, level: int, q: Tensor, v: Tensor, long: dict | None = None
) -> dict[str, int | bool]:
    dim, v_dim = width_of(q.shape[-1]), width_of(v.shape[-1])
    if q.itemsize == 4:
        dim = v_dim = max(dim, v_dim)  # unequal, they are more kernels than these were tried for
    chosen = table[q.itemsize][level] | (long or {})
    queries, keys, warps, stages = chosen[max(dim, v_dim, 64)]
    return {
        "DIM": dim, "V_DIM": v_dim, "QUERIES": queries, "KEYS": keys,
        "num_stages": stages, **launch_options(warps),
    }  # fmt: skip


def dims_of(q: Tensor, v: Tensor, options: dict) -> tuple[int | None, ...]:
    """dim and v_dim; None for one that fills its tile."""
    dims = (q.shape[-1], options["DIM"]), (v.shape[-1], options["V_DIM"])
    return tuple(None if dim == width else dim for dim, width in dims)


def strides_of(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of [batch, heads, seq]; of packed rows, a sequence is where its first row is."""
    return tuple(
        t.stride()[:3] if t.ndim == 4 else (t.stride(0), t.stride(1), t.stride(0)) for t in tensors
    )


def are_described(q: Tensor, k: Tensor, v: Tensor, packed: Packed, *streamed: Tensor) -> bool:
    """Whether what a loop reads is worth descriptors, and can have them: in 16 bits, of sequences
    that are not packed, where a tile ends with its tensor."""
    if packed.ends_q is not None or q.itemsize != 2:
        return False
    products = q.shape[:3].numel() * k.shape[2] * (q.shape[-1] + v.shape[-1])
    return products >= LARGE and has_copy_engine() and all(map(can_describe, streamed))


def streamed(described: bool, rows: int, *tiles: tuple[Tensor, int]) -> tuple[Any, ...]:
    """Tensors, each with the width of its tiles, as loops read them, `rows` at a time, and their
    strides, None of descriptors."""
    if described:
        return *(descriptor_of(t, rows, width) for t, width in tiles), *(None for _ in tiles)
    return *(t for t, _ in tiles), *strides_of(*(t for t, _ in tiles))

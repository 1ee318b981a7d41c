"""What decoding is tried on."""

from typing import Any

import torch
from torch import Tensor

from tilewise.op import Inputs, Size
from tilewise.rotation import rotary_tables


def cache_inputs(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    q_len: int = 1,
    v_dim: int | None = None,
    page_size: int | None = None,
    capacity: int | None = None,
    sinks: bool = False,
    alibi: str | None = None,
    left: int | None = None,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    """`lengths` include the new tokens; `capacity` is room for some more than the longest, of whole
    pages. Pages are in no order, and past a sequence its table names none."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    batch, room = len(lengths), max(lengths, default=0) + 3 if capacity is None else capacity
    v_dim = dim if v_dim is None else v_dim
    if page_size is None:
        k, v = normal(batch, kv_heads, room, dim), normal(batch, kv_heads, room, v_dim)
    else:
        most = -(-room // page_size)
        pages = batch * most + 1
        k, v = (normal(pages, page_size, kv_heads, n) for n in (dim, v_dim))
        table = torch.randperm(pages, device=device)[: batch * most].view(batch, most).int()
        used = torch.tensor([-(-n // page_size) for n in lengths], device=device)
        unused = torch.arange(most, device=device) >= used[:, None]
        options["block_table"] = table.masked_fill(unused, -1)
    if alibi is not None:
        size = (batch, heads) if "b" in alibi else (heads,)
        options["alibi_slopes"] = 0.05 + torch.rand(size, device=device)
    if left is not None:
        options["window"] = (left, None)
    seq_lens = torch.tensor(lengths, device=device, dtype=torch.int32)
    sink = normal(heads) if sinks else None
    return (normal(batch, heads, q_len, dim), k, v, seq_lens, sink), options


_TINY: dict[str, Any] = {"lengths": (5, 2), "heads": 2, "kv_heads": 1, "dim": 16}

CACHE_SIZES: list[Size] = [
    _TINY,
    _TINY | {"lengths": (5, 9), "page_size": 4, "q_len": 2},
    _TINY | {"lengths": (), "dim": 5},
    _TINY | {"lengths": (0, 3), "dim": 5, "v_dim": 3, "q_len": 4},  # some see nothing
    _TINY | {"lengths": (1,), "heads": 1, "dim": 64},
    _TINY | {"lengths": (255, 17, 256), "heads": 8, "dim": 64, "page_size": 16, "q_len": 2},
    _TINY | {"lengths": (257, 1, 130), "heads": 4, "kv_heads": 4, "dim": 40, "v_dim": 24},
    _TINY | {"lengths": (300, 260), "heads": 6, "kv_heads": 2, "dim": 80, "q_len": 16},
    _TINY | {"lengths": (515, 3), "heads": 4, "dim": 128, "page_size": 256, "sinks": True},
    _TINY | {"lengths": (1025, 700), "heads": 8, "dim": 24, "q_len": 3, "page_size": 1},
    _TINY | {"lengths": (130, 20), "dim": 192, "v_dim": 128, "page_size": 64, "softcap": 2.0},
    _TINY | {"lengths": (700, 40), "heads": 8, "alibi": "h", "left": 150, "q_len": 5},
    _TINY
    | {
        "lengths": (600, 33, 9), "heads": 4, "kv_heads": 2, "dim": 32, "v_dim": 17, "q_len": 4,
        "page_size": 16, "sinks": True, "alibi": "bh", "left": 530, "softcap": 1.5, "scale": -0.3,
    },  # all at once
    _TINY | {"lengths": (4096,), "heads": 8, "dim": 128},
]  # fmt: skip
CACHE_LSE_SIZES: list[Size] = [
    _TINY,
    _TINY | {"lengths": (0, 3, 520), "sinks": True, "q_len": 4},
    _TINY | {"lengths": (300, 0, 17), "heads": 8, "page_size": 16, "softcap": 2.0, "alibi": "h"},
]
CACHE_WORKLOADS: list[Size] = [
    {"lengths": (n,), "heads": 32, "kv_heads": 8, "dim": 128, "capacity": n} for n in (4096, 16384)
]
# Many sequences, 1 GiB and over, are read as fast as the memory can; what counts of a single one is
# how soon it begins. The reference in fp64 takes 116 KiB for each token that there is room for.
_GROUPED: dict[str, Any] = {"heads": 32, "kv_heads": 8, "dim": 128}
_UNEVEN = tuple(4096 + 389 * (11 * i % 32) for i in range(32))  # to 16155
CACHE_GPU_WORKLOADS: list[Size] = [
    _GROUPED | {"lengths": (4096,) * 64, "capacity": 4096},
    _GROUPED | {"lengths": _UNEVEN, "page_size": 16},
    _GROUPED | {"lengths": (1024,), "capacity": 1024},
    _GROUPED | {"lengths": (1024,), "capacity": 1024, "page_size": 16},
    _GROUPED | {"lengths": (4096,), "capacity": 4096, "page_size": 16},
]


def append_inputs(
    lengths: tuple[int, ...],
    heads: int,
    dim: int,
    new: int = 1,
    batch: int = 1,
    rotary_dim: int | None = None,
    v_dim: int | None = None,
    page_size: int | None = None,
    capacity: int | None = None,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    """`lengths`, so often, include the `new` tokens: k, the caches, what was there before, v, cos
    and sin."""
    lengths = lengths * batch
    (_, k_cache, v_cache, seq_lens, _), paged = cache_inputs(
        lengths, heads, heads, dim, new, v_dim, page_size, capacity, device=device, dtype=dtype
    )
    assert v_cache is not None and seq_lens is not None
    shape = len(lengths), heads, new
    k, v = (torch.randn(*shape, n, device=device, dtype=dtype) for n in (dim, v_cache.shape[3]))
    tables: tuple[Tensor | None, ...] = None, None
    if rotary_dim is not None:
        positions = max(lengths, default=0) + 1
        tables = rotary_tables(positions, rotary_dim, device=device, dtype=dtype)
    return (k, k_cache, v_cache, seq_lens - new, v, *tables), options | paged


APPEND_SIZES: list[Size] = [
    {"lengths": (5, 2), "heads": 2, "dim": 16, "rotary_dim": 16},
    {"lengths": (5, 9), "heads": 1, "dim": 5, "v_dim": 3, "page_size": 4, "new": 2},
    {"lengths": (), "heads": 2, "dim": 16, "rotary_dim": 8},
    {"lengths": (40, 7, 31), "heads": 2, "dim": 64, "rotary_dim": 32, "new": 5, "page_size": 16},
    {"lengths": (9, 30), "heads": 3, "dim": 40, "rotary_dim": 22, "new": 8, "interleaved": True},
    {"lengths": (300,), "heads": 8, "dim": 128, "rotary_dim": 128, "page_size": 64},
]
APPEND_WORKLOADS: list[Size] = [
    {"lengths": (4096,), "batch": batch, "heads": 8, "dim": 128, "rotary_dim": 128, "page_size": 16}
    for batch in (1, 64)
]


def append_bytes_moved(
    k: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **options: Any
) -> int:
    """Of new keys and values, read and written."""
    return 2 * k.nbytes // max(k.shape[-1], 1) * (k_cache.shape[3] + v_cache.shape[3])


def cache_bytes_moved(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    **options: Any,
) -> int:
    """Of the keys and values that there are, each once; of q and out."""
    kv_heads = k_cache.shape[1 if block_table is None else 2]
    tokens = int(seq_lens.sum())
    wide = k_cache.shape[3] + v_cache.shape[3]
    small = q.nbytes // q.shape[-1] * (q.shape[-1] + v_cache.shape[3])
    return small + tokens * kv_heads * wide * q.itemsize


def cache_flops(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, *rest: Any, **options: Any
) -> int:
    """Of the two products, of all new tokens with all there are."""
    rows = q.shape[1] * q.shape[2]
    return 2 * rows * int(seq_lens.sum()) * (k_cache.shape[3] + v_cache.shape[3])

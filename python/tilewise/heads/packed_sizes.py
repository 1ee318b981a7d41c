"""What attention of packed sequences is tried on."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tilewise.heads.sizes import flops
from tilewise.op import Inputs, Size


def packed_inputs(
    lengths: tuple[tuple[int, int], ...],
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int | None = None,
    past: int = 0,
    bias: str | None = None,
    bias_dtype: str = "like q",
    sinks: bool = False,
    alibi: str | None = None,
    left: int | None = None,
    right: int | None = None,
    *,
    device: str,
    dtype: torch.dtype,
    **options: Any,
) -> Inputs:
    """`lengths` are those of each sequence, of queries and of keys; `past` rows follow the last.

    `bias` and `alibi` name of "bh" along which they vary. What is dropped with a `dropout_p` is the
    same every time.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    batch, ends = len(lengths), []
    for i, name in enumerate("qk"):
        own = [pair[i] for pair in lengths]
        ends.append(torch.tensor([0, *own], device=device).cumsum(0).int())
        options[f"max_seqlen_{name}"] = max(own, default=0)
    total_q, total_k = (sum(pair[i] for pair in lengths) + past for i in (0, 1))
    q, k = normal(total_q, heads, dim), normal(total_k, kv_heads, dim)
    v = normal(total_k, kv_heads, dim if v_dim is None else v_dim)
    added = sink = None
    if bias is not None:
        wanted = dtype if bias_dtype == "like q" else getattr(torch, bias_dtype)
        shape = (batch if "b" in bias else 1, heads if "h" in bias else 1)
        ends_of = (options["max_seqlen_q"], options["max_seqlen_k"])
        added = torch.randn(*shape, *ends_of, device=device, dtype=wanted)
    if sinks:
        sink = normal(heads)
    if alibi is not None:
        size = (batch, heads) if "b" in alibi else (heads,)
        options["alibi_slopes"] = 0.05 + torch.rand(size, device=device)
    if left is not None or right is not None:
        options["window"] = (left, right)
    if options.get("dropout_p"):
        options = {"seed": 2**40 + 7, "offset": 3} | options
    return (q, k, v, *ends, added, sink), options


_TINY: dict[str, Any] = {"lengths": ((3, 4), (2, 1)), "heads": 2, "kv_heads": 1, "dim": 5}
# No sequence has a single key: the gradient of that is 0, and a kernel's a rounding of p = 1.
_MIXED = ((2, 3), (1, 40), (0, 7), (33, 20), (5, 0), (17, 130))

PACKED_SIZES: list[Size] = [
    _TINY,
    _TINY | {"lengths": ()},
    _TINY | {"lengths": ((0, 0), (0, 0)), "past": 3},
    _TINY | {"lengths": ((0, 3), (2, 0)), "past": 2, "sinks": True},  # nothing to attend to
    _TINY | {"lengths": _MIXED, "dim": 16, "past": 5, "causal": True},
    _TINY | {"lengths": _MIXED, "heads": 6, "dim": 24, "v_dim": 40},
    _TINY | {"lengths": ((131, 67), (67, 131)), "dim": 40, "v_dim": 16, "causal": True},
    _TINY | {"lengths": ((64, 64), (128, 128)), "dim": 64, "causal": True},  # whole blocks
    _TINY | {"lengths": ((64, 70), (3, 5)), "heads": 4, "kv_heads": 2, "dim": 128, "causal": True},
    _TINY | {"lengths": ((20, 40),), "dim": 192, "v_dim": 128, "causal": True},
    _TINY | {"lengths": _MIXED, "dim": 8, "bias": "h", "past": 1},  # as in T5
    _TINY | {"lengths": _MIXED, "dim": 8, "bias": "bh", "bias_dtype": "float32", "softcap": 2.0},
    _TINY | {"lengths": _MIXED, "dim": 16, "left": 9, "sinks": True, "causal": True},
    _TINY | {"lengths": _MIXED, "dim": 16, "alibi": "bh", "right": 2, "dropout_p": 0.3},
    _TINY
    | {
        "lengths": ((35, 70), (4, 3), (50, 9)), "heads": 4, "kv_heads": 2, "dim": 8, "v_dim": 16,
        "bias": "b", "sinks": True, "alibi": "h", "left": 30, "right": 4, "softcap": 1.5,
        "dropout_p": 0.2, "past": 3,
    },  # all at once
]  # fmt: skip
PACKED_LSE_SIZES: list[Size] = [
    _TINY,
    _TINY | {"lengths": _MIXED, "past": 4, "sinks": True, "right": 3},
    _TINY | {"lengths": _MIXED, "bias": "h", "alibi": "h", "softcap": 2.0, "dropout_p": 0.3},
]
PACKED_WORKLOADS: list[Size] = [
    {
        "lengths": tuple((n, n) for n in lengths), "heads": 16, "kv_heads": 16, "dim": 64,
        "causal": causal,
    }
    for lengths, causal in (
        ((512, 96, 256, 200, 384, 40), True),
        ((1024, 96, 512, 200, 768, 40, 1408), True),
        ((1024, 96, 512, 200, 768, 40, 1408), False),
    )
]  # fmt: skip
# Few that are long and many that are short, 16384 together, in no order. The reference pads them to
# the longest, and holds 54 GiB in fp64.
_UNEVEN = (
    650, 9, 2100, 130, 350, 4000, 1300, 80, 550, 2900, 35, 450, 180, 1600, 1000, 250, 800,
)  # fmt: skip
PACKED_GPU_WORKLOADS: list[Size] = [
    {
        "lengths": tuple((n, n) for n in _UNEVEN), "heads": 4, "kv_heads": 4, "dim": 128,
        "causal": True,
    }
]  # fmt: skip


def packed_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *rest: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> int:
    """Of the two products, for the pairs that causality and the window leave."""
    total = 0
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (begin_q, begin_k), (end_q, end_k) in pairwise(ends):
        own_q = q[begin_q : min(end_q, begin_q + max_seqlen_q)]
        own_k, own_v = (t[begin_k : min(end_k, begin_k + max_seqlen_k)] for t in (k, v))
        heads = (t.transpose(0, 1)[None] for t in (own_q, own_k, own_v))
        total += flops(*heads, **options)
    return total


def packed_bytes_moved(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **options: Any
) -> int:
    """Of the tensors, each once, and out."""
    read = sum(t.nbytes for t in (q, k, v, *rest) if t is not None)
    return read + q.nbytes // max(q.shape[-1], 1) * v.shape[-1]

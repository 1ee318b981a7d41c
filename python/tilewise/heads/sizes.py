"""What attention is tried on: inputs by their sizes, the sizes where kernels go wrong, the work."""

from typing import Any

import torch
from torch import Tensor

from tilewise.heads.formula import Window, limits
from tilewise.op import Inputs, Size

TINY: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 3, "seq_k": 4, "dim": 5}


def inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    seq_q: int,
    seq_k: int,
    dim: int,
    v_dim: int | None = None,
    mask: str | None = None,
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
    """`mask`, `bias` and `alibi` name the dims along which they vary, of "bhqk".

    The first query of a mask attends to nothing, or, where it is the same for all queries, not to
    the second half of the keys. `left` and `right` are those of the window. What is dropped with
    a `dropout_p` is the same every time.
    """

    def normal(heads: int, seq: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, seq, dim, device=device, dtype=dtype)

    def spread(dims: str) -> list[int]:
        full = zip("bhqk", (batch, heads, seq_q, seq_k), strict=True)
        return [n if name in dims else 1 for name, n in full]

    q, k = normal(heads, seq_q, dim), normal(kv_heads, seq_k, dim)
    v = normal(kv_heads, seq_k, dim if v_dim is None else v_dim)
    added = sink = None
    if mask is not None:
        allowed = torch.rand(spread(mask), device=device) < 0.7
        if "q" in mask:
            allowed[:, :, 0] = False
        else:
            allowed[..., (seq_k + 1) // 2 :] = False
        options["mask"] = allowed
    if bias is not None:
        wanted = dtype if bias_dtype == "like q" else getattr(torch, bias_dtype)
        added = torch.randn(spread(bias), device=device, dtype=wanted)
    if sinks:
        sink = torch.randn(heads, device=device, dtype=dtype)
    if alibi is not None:
        size = (batch, heads) if "b" in alibi else (heads,)
        options["alibi_slopes"] = 0.05 + torch.rand(size, device=device)
    if left is not None or right is not None:
        options["window"] = (left, right)
    if options.get("dropout_p"):
        options = {"seed": 2**40 + 7, "offset": 3} | options
    return (q, k, v, added, sink), options


SIZES: list[Size] = [
    TINY,
    TINY | {"batch": 0},
    TINY | {"seq_k": 0},  # nothing to attend to
    TINY | {"seq_q": 1, "seq_k": 1, "dim": 1},
    TINY | {"heads": 6, "seq_q": 1, "seq_k": 79, "dim": 16},  # heads share the lanes
    TINY | {"seq_q": 64, "seq_k": 64, "dim": 64, "causal": True},  # whole blocks
    TINY | {"seq_q": 67, "seq_k": 132, "dim": 40, "v_dim": 16, "causal": True},
    TINY | {"seq_q": 131, "seq_k": 67, "dim": 24, "v_dim": 40, "causal": True},
    TINY | {"seq_q": 33, "seq_k": 65, "dim": 128},
    TINY | {"seq_q": 18, "seq_k": 33, "dim": 256},
    TINY | {"seq_q": 20, "seq_k": 40, "dim": 192, "v_dim": 128, "causal": True},
    TINY | {"batch": 2, "seq_q": 17, "seq_k": 135, "dim": 16, "mask": "bk"},  # padding
    TINY | {"batch": 2, "seq_q": 5, "seq_k": 20, "dim": 8, "mask": "hk"},
    TINY | {"batch": 2, "seq_q": 20, "seq_k": 33, "dim": 8, "mask": "bhqk"},
    TINY | {"seq_q": 20, "seq_k": 33, "dim": 8, "mask": "qk", "causal": True},
    TINY | {"batch": 2, "seq_q": 20, "seq_k": 33, "dim": 8, "mask": "bq"},
    TINY | {"seq_q": 20, "seq_k": 33, "dim": 8, "bias": "hqk"},  # as in T5
    TINY | {"batch": 2, "seq_q": 17, "seq_k": 70, "bias": "bk", "bias_dtype": "float32"},
    TINY | {"heads": 3, "seq_q": 1, "seq_k": 40, "dim": 16, "bias": "h", "softcap": 2.0},
    TINY | {"seq_q": 20, "seq_k": 9, "sinks": True, "causal": True},  # first see only the sink
    TINY | {"batch": 2, "seq_q": 40, "seq_k": 70, "alibi": "bh", "softcap": 0.7},
    TINY | {"seq_q": 70, "seq_k": 150, "dim": 16, "left": 9, "causal": True},
    TINY | {"seq_q": 150, "seq_k": 70, "dim": 16, "left": 2, "right": 70},  # some see nothing
    TINY | {"batch": 2, "seq_q": 37, "seq_k": 45, "dim": 16, "dropout_p": 0.3},
    TINY
    | {
        "batch": 2, "heads": 4, "kv_heads": 2, "seq_q": 35, "seq_k": 70, "dim": 8, "v_dim": 16,
        "mask": "bk", "bias": "bhqk", "sinks": True, "alibi": "h", "left": 30, "right": 4,
        "softcap": 1.5, "dropout_p": 0.2,
    },  # all at once
]  # fmt: skip
LSE_SIZES: list[Size] = [
    TINY,
    TINY | {"seq_k": 0, "sinks": True},
    TINY | {"seq_q": 131, "seq_k": 67, "dim": 24, "causal": True},
    TINY | {"batch": 2, "heads": 6, "seq_q": 3, "seq_k": 40, "mask": "bk"},
    TINY | {"seq_q": 40, "seq_k": 20, "bias": "hk", "sinks": True, "right": 3},
    TINY | {"seq_q": 20, "seq_k": 33, "alibi": "h", "softcap": 2.0, "dropout_p": 0.3},
]
WORKLOADS: list[Size] = [
    {"batch": 1, "heads": 16, "kv_heads": 16, "seq_q": n, "seq_k": n, "dim": d, "causal": c}
    for n, d, c in ((1024, 64, True), (1024, 128, True), (1024, 64, False))
]
_LONG: dict[str, Any] = {
    "batch": 1, "heads": 16, "kv_heads": 16, "seq_q": 4096, "seq_k": 4096, "dim": 128,
}  # fmt: skip
_LONGER, _LONGEST = {"seq_q": 8192, "seq_k": 8192}, {"seq_q": 16384, "seq_k": 16384}
_FEW = _LONGEST | {"heads": 4, "kv_heads": 4}
# The reference in fp64 holds 33 bytes a score with its gradients, 33 GiB at the longest.
GPU_WORKLOADS: list[Size] = [
    _LONG | {"causal": True},
    _LONG,
    _LONG | {"bias": "hqk"},
    _LONG | _LONGER | {"causal": True},
    _LONG | _LONGER,
    _LONG | {"dim": 64, "causal": True},
    _LONG | {"dim": 64},
    _LONG | {"heads": 32, "kv_heads": 8, "causal": True},
    _LONG | _FEW | {"left": 1024, "causal": True},
    _LONG | _FEW | {"causal": True},
    _LONG | _FEW,
]


def flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    **options: Any,
) -> int:
    """Of the two products, for the pairs that causality and the window leave."""
    (left, right), (seq_q, seq_k) = limits(causal, window), (q.shape[2], k.shape[2])
    pairs = 0
    for own in range(seq_k - seq_q, seq_k):
        first = 0 if left < 0 else max(own - left, 0)
        last = seq_k - 1 if right < 0 else min(own + right, seq_k - 1)
        pairs += max(last - first + 1, 0)
    return 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[-1] + v.shape[-1])


def bytes_moved(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, **options: Any
) -> int:
    """Of the tensors, each once, and out."""
    read = sum(t.nbytes for t in (q, k, v, bias, sinks, options.get("mask")) if t is not None)
    return read + q.nbytes // q.shape[-1] * v.shape[-1]

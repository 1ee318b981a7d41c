"""The largest of each row, in rank."""

from typing import Any

import torch
from torch import Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    as_rows,
    backends_of,
    declare,
    needs_gradient,
    register,
    takes_all,
    transforming,
)


def top_k(x: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Give the k largest of each row, the largest first, and where they are.

    Of equals the one of the lowest index comes first. NaN is larger than all others, and the two
    zeros are equal. The values have a gradient, which goes back to where they are.

    Args:
        x: `[..., vocab]`, floating point.
        k: From 0 to vocab.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        Values, `[..., k]`, the dtype of x; and indices, `[..., k]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If x has no dimension, k is out of range, or `backend` is unknown.
        RuntimeError: If `backend` is absent or runs on another device.
    """
    if not x.is_floating_point():
        raise TypeError(f"top_k: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("top_k: x must be [..., vocab], got []")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"top_k: k must be an int, got {type(k).__name__}")
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"top_k: k must be from 0 to {x.shape[-1]}, got {k}")
    chosen = choose(TOP_K, backend, x, k=k)
    if chosen == "reference" or x.numel() == 0 or k == 0 or transforming():
        return top_k_reference(x, k)
    graded = needs_gradient(x)
    values, indices = _forward(as_rows(x.detach() if graded else x), k, chosen)
    shape = (*x.shape[:-1], k)
    indices = indices.view(shape)
    return x.gather(-1, indices) if graded else values.view(shape), indices


def top_k_reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rule of `top_k`, in plain PyTorch."""
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all)


def _fake(x: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


_forward = register(
    "top_k_forward(Tensor x, SymInt k, str backend) -> (Tensor, Tensor)", BACKENDS, fake=_fake
)


def _inputs(batch: int, vocab: int, k: int, *, device: str, dtype: torch.dtype) -> Inputs:
    options: dict[str, Any] = {"k": k}
    return (torch.randn(batch, vocab, device=device, dtype=dtype),), options


TOP_K = declare(
    Op(
        name="top_k",
        call=top_k,
        reference=top_k_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "vocab": 8, "k": 3},
            {"batch": 0, "vocab": 64, "k": 5},  # empty
            {"batch": 2, "vocab": 1, "k": 1},
            {"batch": 5, "vocab": 127, "k": 127},  # all, rows misaligned
            {"batch": 6, "vocab": 4099, "k": 17},  # fewer than blocks; halves have ties
            {"batch": 3, "vocab": 3001, "k": 300},  # more than blocks
            {"batch": 2, "vocab": 4099, "k": 2100},  # more than a program sorts
        ],
        workloads=[
            {"batch": batch, "vocab": vocab, "k": k}
            for batch, vocab in ((1, 128256), (64, 128256), (4096, 128))
            for k in (8, 50)
        ],
        bytes_moved=lambda x, k: x.nbytes + x.shape[0] * k * (x.element_size() + 8),
        constants=frozenset({0}),
    )
)

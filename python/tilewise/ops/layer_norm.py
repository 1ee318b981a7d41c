"""Layer normalisation (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

from functools import partial

import torch
from torch import Generator, Tensor

from tilewise.norm import (
    MIXED,
    add_and_normalise,
    added,
    norm_inputs,
    normalise,
    normalised,
    register_add_norm,
    register_norm,
)
from tilewise.op import Op, backends_of, declare, takes_all
from tilewise.plan import planned


@planned
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    casting: str = "torch",
    backend: str | None = None,
) -> Tensor:
    """Bring each row of `x` to mean 0 and variance 1, then scale and shift it.

        y = (x - mean(x)) * rsqrt(var(x) + eps) * (weight_offset + weight) + bias
        var(x) = mean((x - mean(x))^2)

    Computed in fp32 (fp64 for fp64 `x`) and rounded once. With `casting="llama"` the normalised row
    is rounded to the dtype of `x`, and then each step to that of its operands, as models do that
    write `weight * normalised.to(x.dtype)`.

    Rows of `[batch, heads, seq, dim]` within a packed projection are read where they lie.

    Args:
        x: `[..., cols]`, floating point.
        weight: `[cols]`, on the device of `x`; fp32, or the dtype of `x`. None is all ones.
        bias: As `weight`, and of its dtype. None is all zeros.
        eps: Added to the variance.
        weight_offset: Added to `weight`.
        casting: "torch" or "llama".
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[..., cols]`, contiguous, dtype of `x`, also under autocast.

    Raises:
        TypeError: If a dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape is wrong, there is a `weight_offset` without a weight, or `casting`
            or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    return normalise(LAYER_NORM, x, weight, bias, eps, weight_offset, casting, backend)


@planned
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    casting: str = "torch",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream, then normalise it as `layer_norm`.

        sum = dropout(x) + residual
        y = (sum - mean(sum)) * rsqrt(var(sum) + eps) * (weight_offset + weight) + bias

    `sum` is rounded once, to the dtype of the residual, and normalised as it is returned. Dropout
    zeroes an element of `x` with probability `dropout_p` and divides the others by 1 - `dropout_p`;
    which, the seed says (`tilewise.rng.keep_mask` at the row and column of `[rows, cols]`), the
    same on every backend, and again in the backward pass, so no mask is stored.

    Args:
        x: `[..., cols]`, floating point: the branch.
        residual: The shape of `x`; of its dtype, or fp32 (fp64 for fp64 `x`).
        weight: `[cols]`, on the device of `x`; fp32, or the dtype of `x`. None is all ones.
        bias: As `weight`, and of its dtype. None is all zeros.
        eps: Added to the variance.
        weight_offset: Added to `weight`.
        casting: "torch" or "llama", as in `layer_norm`.
        dropout_p: Probability of dropping an element of `x`, from 0 to 1.
        seed: int64; or a tensor `[]` or, one a row, `[rows]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        y: `[..., cols]`, contiguous, dtype of `x`.
        sum: `[..., cols]`, contiguous, dtype of `residual`.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, there is a `weight_offset` without a weight, seed
            and generator are both given, or `casting` or `backend` is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    return add_and_normalise(
        ADD_LAYER_NORM, x, residual, weight, bias, eps, weight_offset, casting,
        dropout_p, seed, offset, generator, backend,
    )  # fmt: skip


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    casting: str = "torch",
) -> Tensor:
    """The formula of `layer_norm`, in plain PyTorch, its tensors first."""
    return normalised(x, weight, bias, eps, weight_offset, casting, x.dtype, centred=True)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    casting: str = "torch",
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    offset: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """The formula of `add_layer_norm`, in plain PyTorch, its tensors first."""
    total = added(x, residual, dropout_p, seed, offset)
    y = normalised(total, weight, bias, eps, weight_offset, casting, x.dtype, centred=True)
    return y, total


BACKENDS = backends_of("layer_norm", cuda=takes_all, numba=takes_all, triton=takes_all)

register_norm("layer_norm", BACKENDS, centred=True)
register_add_norm("add_layer_norm", BACKENDS, centred=True)

LAYER_NORM = declare(
    Op(
        name="layer_norm",
        call=layer_norm,
        reference=layer_norm_reference,
        backends=BACKENDS,
        inputs=norm_inputs,
        sizes=[
            {"rows": 3, "cols": 8, "bias": True},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0},  # empty rows
            {"rows": 1, "cols": 1, "weight": None},  # nothing is left: dx is 0
            {"rows": 3, "cols": 127, "bias": True},  # one short of a block, rows misaligned
            {"rows": 5, "cols": 64, "weight": "float32", "bias": True, "casting": "llama"},
            {"rows": 5, "cols": 65, "weight": None},
            {"rows": 64, "cols": 100, "bias": True, "mean": 30.0},  # x^2 dwarfs the variance
            {"rows": 35, "cols": 1000, "bias": True},  # several parts in parallel; 8 divides cols
            {"rows": 300, "cols": 16, "bias": True, "weight_offset": 1.0},  # several rows in a part
            {"rows": 3, "cols": 16389, "bias": True},  # wider than one block of registers
        ],
        workloads=[{"rows": 4096, "cols": cols, "bias": True} for cols in (1024, 4096)],
        bytes_moved=lambda x, *parameters, **options: 2 * x.nbytes,
        native=lambda x, weight, bias, eps: torch.nn.functional.layer_norm(
            x, x.shape[-1:], weight, bias, eps
        ),
    )
)

ADD_LAYER_NORM = declare(
    Op(
        name="add_layer_norm",
        call=add_layer_norm,
        reference=add_layer_norm_reference,
        backends=BACKENDS,
        inputs=partial(norm_inputs, residual="like x"),
        sizes=[
            {"rows": 3, "cols": 8, "bias": True},
            {"rows": 0, "cols": 64},  # empty batch
            {"rows": 3, "cols": 0, "dropout_p": 0.3},  # empty rows
            {"rows": 7, "cols": 127, "bias": True},  # one short of a block, rows misaligned
            {"rows": 5, "cols": 65, "weight": None, "dropout_p": 0.3},  # part of a group of four
            {"rows": 5, "cols": 1000, **MIXED},  # 8 divides cols
            {"rows": 70, "cols": 16, **MIXED},  # several rows in a part
            {"rows": 3, "cols": 16389, **MIXED},  # wider than one block of registers
        ],
        workloads=[{"rows": 4096, "cols": cols, "bias": True} for cols in (1024, 4096)],
        bytes_moved=lambda x, residual, *parameters, **options: 2 * (x.nbytes + residual.nbytes),
    )
)

"""Drawing from the logits of a linear layer, a tile of the vocabulary after the other: by the
Gumbel-max rule a draw is a maximum, which needs no logits kept.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    autocast_dtype,
    backends_of,
    declare,
    needs_gradient,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.rng import as_arguments, seed_and_offset
from tilewise.sampling import (
    as_floats,
    checked,
    noise_of,
    refuse_bad_rows,
    refuse_nan,
    rows_of,
)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    check_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Draw one token a row from the softmax of `(hidden weight^T + linear_bias) / temperature`.

        token = argmax of (logit / temperature + gumbel)

    The token is that of `tilewise.sample` on these logits, summed in fp32 and not rounded: -1 where
    one is NaN, all are -inf, or the row's temperature is out of range.

    Args:
        hidden: `[batch, dim]`, floating point.
        weight: `[vocab, dim]`, the dtype of hidden; under autocast both become the lower one.
        linear_bias: `[vocab]`, the dtype of hidden.
        temperature: At least 0 and finite, where 0 takes the likeliest token; or `[batch]`.
        seed: As of `tilewise.sample`.
        offset: As of `tilewise.sample`.
        generator: As of `tilewise.sample`.
        check_inputs: Raise where a temperature is out of range, or hidden has NaN. Waits for the
            device.
        backend: "cuda", "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    lower = autocast_dtype(hidden)
    if lower is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(lower), weight.to(lower)
        linear_bias = None if linear_bias is None else linear_bias.to(lower)
    _check(hidden, weight, linear_bias)
    checked("linear_sample", hidden, False, temperature=temperature)
    if check_inputs:
        refuse_bad_rows("linear_sample", hidden[:, :0], {"temperature": temperature})
        refuse_nan("linear_sample", "hidden", hidden)
    batch, device = hidden.shape[0], hidden.device
    seed, offset = seed_and_offset("linear_sample", batch, device, seed, offset, generator)
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "offset": offset}
    chosen = choose(LINEAR_SAMPLE, backend, hidden, weight, linear_bias=linear_bias, **options)
    if chosen == "reference" or 0 in (*hidden.shape, *weight.shape) or transforming():
        return linear_sample_reference(hidden, weight, linear_bias=linear_bias, **options)
    if needs_gradient(hidden, weight, linear_bias):
        hidden, weight = hidden.detach(), weight.detach()
        linear_bias = None if linear_bias is None else linear_bias.detach()
    temperatures, number = as_floats(temperature, wide_dtype(hidden.dtype))
    tokens: Tensor = _forward(
        rows_of(hidden), rows_of(weight), linear_bias, temperatures,
        *as_arguments(seed, offset)[:2], number, *as_arguments(seed, offset)[2:], chosen,
    )  # fmt: skip
    return tokens


def linear_sample_reference(
    hidden: Tensor,
    weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The rule of `linear_sample`, in plain PyTorch."""
    batch, vocab = hidden.shape[0], weight.shape[0]
    seed, offset = seed_and_offset("linear_sample", batch, hidden.device, seed, offset, generator)
    if vocab == 0:
        return torch.full((batch,), -1, device=hidden.device)
    wide = wide_dtype(hidden.dtype)
    bias = None if linear_bias is None else linear_bias.to(wide)
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), bias)
    t = torch.as_tensor(temperature, dtype=wide, device=hidden.device).expand(batch).unsqueeze(-1)
    top = logits.amax(-1, keepdim=True)  # NaN, if there is one
    scores = torch.where(logits == top, 0.0, (logits - top) / t)
    drawn = (scores + noise_of(logits, seed, offset)).argmax(-1)
    tokens = torch.where(t.squeeze(-1) > 0, drawn, logits.argmax(-1))
    can = (top > -torch.inf) & (t >= 0) & (t < torch.inf)
    return torch.where(can.squeeze(-1), tokens, -1)


def _check(hidden: Tensor, weight: Tensor, linear_bias: Tensor | None) -> None:
    op = "linear_sample"
    if not hidden.is_floating_point():
        raise TypeError(f"{op}: hidden must be floating point, got {hidden.dtype}")
    if hidden.ndim != 2:
        raise ValueError(f"{op}: hidden must be [batch, dim], got {list(hidden.shape)}")
    vocab, dim = weight.shape[0] if weight.ndim else 0, hidden.shape[1]
    shapes: dict[str, tuple[Tensor, list[Any], tuple[int, ...]]]
    shapes = {"weight": (weight, ["vocab", dim], (vocab, dim))}
    if linear_bias is not None:
        shapes["linear_bias"] = (linear_bias, [vocab], (vocab,))
    for name, (t, said, wanted) in shapes.items():
        if t.dtype != hidden.dtype:
            raise TypeError(f"{op}: {name} must be {hidden.dtype}, got {t.dtype}")
        if t.shape != wanted:
            shape = ", ".join(map(str, said))
            raise ValueError(f"{op}: {name} must be [{shape}], got {list(t.shape)}")
        if t.device != hidden.device:
            raise RuntimeError(f"{op}: {name} must be on {hidden.device}, got {t.device}")


BACKENDS = backends_of("sample", cuda=takes_all, numba=takes_all, triton=takes_all)

_forward = register(
    "linear_sample_forward(Tensor hidden, Tensor weight, Tensor? linear_bias,"
    " Tensor? temperatures, Tensor? seeds, Tensor? offsets, float temperature, SymInt seed,"
    " SymInt offset, str backend) -> Tensor",
    BACKENDS,
    fake=lambda hidden, *options: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)


def _inputs(
    batch: int, dim: int, vocab: int, each: bool = False, *, device: str, dtype: torch.dtype
) -> Inputs:
    hidden = torch.randn(batch, dim, device=device, dtype=dtype)
    weight = torch.randn(vocab, dim, device=device).mul(3 * dim**-0.5).to(dtype)
    options: dict[str, Any] = {"temperature": 0.8, "seed": 1}
    if each:
        rows = torch.arange(batch, device=device)
        options = {"temperature": rows.to(dtype) / 4, "seed": rows * 2**40, "offset": rows}
        options["linear_bias"] = torch.randn(vocab, device=device, dtype=dtype)
    return (hidden, weight), options


LINEAR_SAMPLE = declare(
    Op(
        name="linear_sample",
        call=linear_sample,
        reference=linear_sample_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "dim": 16, "vocab": 8},
            {"batch": 0, "dim": 8, "vocab": 64},  # empty batch
            {"batch": 2, "dim": 1, "vocab": 1},
            {"batch": 5, "dim": 33, "vocab": 1027},
            {"batch": 9, "dim": 48, "vocab": 8501},  # several tiles of the vocabulary
            {"batch": 40, "dim": 64, "vocab": 517, "each": True},
        ],
        workloads=[{"batch": batch, "dim": 2048, "vocab": 32000} for batch in (1, 16, 64)],
        bytes_moved=lambda hidden, weight, **options: hidden.nbytes + weight.nbytes,
        flops=lambda hidden, weight, **options: 2 * hidden.numel() * weight.shape[0],
        constants=frozenset({0, 1}),
    )
)

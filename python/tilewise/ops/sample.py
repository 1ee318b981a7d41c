"""Drawing tokens from logits, with top-k (Fan et al., 2018, https://arxiv.org/abs/1805.04833) and
top-p (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751), by the Gumbel-max rule
(https://arxiv.org/abs/1411.0030).
"""

import math
import sys
from typing import Any

import torch
from torch import Generator, Tensor

from tilewise.choice import choose
from tilewise.op import (
    Inputs,
    Op,
    backends_of,
    declare,
    register,
    takes_all,
    transforming,
    wide_dtype,
)
from tilewise.rng import counter_rows, gumbel, seed_and_offset


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw one token a row, from the softmax of `logits / temperature` cut to its likeliest tokens.

        token = argmax over the tokens left of (logit / temperature + gumbel)

    Tokens are ranked by logit, then by index, lowest first. Left are the first `top_k` of them, and
    of these the shortest prefix whose probability, within the `top_k`, reaches `top_p`; the first
    one always. Temperature 0 takes the first one. The noise is that of `tilewise.rng.gumbel` at
    column = token and row = place in the batch, or row 0 with one seed a row. All backends draw the
    same tokens, but where two scores are as near as rounding.

    A row with NaN, with every logit -inf, or whose own temperature, top_k or top_p is out of range
    gives -1. Tokens of logit -inf are never drawn. Where some are +inf, those share the draw.

    Args:
        logits: `[batch, vocab]`, floating point.
        temperature: At least 0 and finite; or `[batch]`, floating point.
        top_k: At least 0, where 0 is off; or `[batch]`, int64 or int32. None is off.
        top_p: From 0 to 1, where 1 is off; or `[batch]`, floating point. None is off.
        seed: int64; or a tensor `[]` or, one a row, `[batch]`. None draws one on the device.
        offset: int64, counts the draws from one seed; or a tensor like that of `seed`. None is 0.
        generator: Draws the seed, where none is given. None is PyTorch's own.
        backend: "triton", "numba" or "reference". None picks the first that can run.

    Returns:
        `[batch]`, int64.

    Raises:
        TypeError: If a kind or dtype is wrong, or not one that `backend` takes.
        ValueError: If a shape or range is wrong, seed and generator are both given, or `backend`
            is unknown.
        RuntimeError: If the devices differ, or `backend` is absent or runs on another device.
    """
    if not logits.is_floating_point():
        raise TypeError(f"sample: logits must be floating point, got {logits.dtype}")
    if logits.ndim != 2:
        raise ValueError(f"sample: logits must be [batch, vocab], got {list(logits.shape)}")
    top_k, top_p = 0 if top_k is None else top_k, 1.0 if top_p is None else top_p
    _check("temperature", temperature, logits, "at least 0 and finite", sys.float_info.max)
    _check("top_p", top_p, logits, "from 0 to 1", 1.0)
    _check_top_k(top_k, logits)
    rows, device = logits.shape[0], logits.device
    seed, offset = seed_and_offset("sample", rows, device, seed, offset, generator)
    options: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "offset": offset,
    }  # fmt: skip
    chosen = choose(SAMPLE, backend, logits, **options)
    if chosen == "reference" or logits.numel() == 0 or transforming():
        return sample_reference(logits, **options)
    return _launch(logits, chosen, **options)


def sample_reference(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The rule of `sample`, in plain PyTorch."""
    batch, vocab = logits.shape
    device, dtype = logits.device, wide_dtype(logits.dtype)
    seed, offset = seed_and_offset("sample", batch, device, seed, offset, generator)
    if vocab == 0:
        return torch.full((batch,), -1, device=device)
    t, p = (_columns(1.0 if v is None else v, device, dtype) for v in (temperature, top_p))
    k = _columns(0 if top_k is None else top_k, device, torch.int64)

    logits, tokens = logits.to(dtype).sort(dim=-1, descending=True, stable=True)
    first, rank = logits[:, :1], torch.arange(vocab, device=device)  # NaN, if any, comes first
    scores = torch.where(logits == first, 0.0, (logits - first) / t)
    left = (k == 0) | (rank < k)
    mass = torch.where(left, scores.exp(), 0.0).cumsum(-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    left = left & ((p >= 1) | (before < p * mass[:, -1:]))
    left = (left & (t > 0)) | (rank == 0)

    noise = gumbel(seed, offset, counter_rows(seed, batch, device), vocab, dtype).gather(-1, tokens)
    scores = torch.where(left & (logits > -math.inf), scores + noise, -math.inf)
    best = scores.argmax(-1, keepdim=True)
    can = (first > -math.inf) & (t >= 0) & (t < math.inf) & (k >= 0) & (p >= 0) & (p <= 1)
    return torch.where(can, tokens.gather(-1, best), -1).squeeze(-1)


def _launch(
    logits: Tensor, chosen: str, *, temperature: Any, top_k: Any, top_p: Any, seed: Any, offset: Any
) -> Tensor:
    wide = wide_dtype(logits.dtype)
    rows = logits.detach() if logits.requires_grad else logits
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    temperatures, temperature = _apart(temperature, wide)
    top_ks, top_k = _apart(top_k, torch.int64)
    top_ps, top_p = _apart(top_p, wide)
    seeds, seed = _apart(seed, torch.int64)
    offsets, offset = _apart(offset, torch.int64)
    tokens: Tensor = _forward(
        rows, temperatures, top_ks, top_ps, seeds, offsets,
        float(temperature), min(top_k, logits.shape[1]), float(top_p), seed, offset, chosen,
    )  # fmt: skip
    return tokens


def _columns(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype).unsqueeze(-1)
    return torch.full((1, 1), value, device=device, dtype=dtype)


def _check(name: str, value: Tensor | float, logits: Tensor, wanted: str, most: float) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"sample: {name} must be floating point, got {value.dtype}")
        _check_place(name, value, logits)
    elif not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"sample: {name} must be a number or a tensor, got {type(value).__name__}")
    elif not 0 <= value <= most:
        raise ValueError(f"sample: {name} must be {wanted}, got {value}")


def _check_top_k(value: Tensor | int, logits: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"sample: top_k must be torch.int64 or torch.int32, got {value.dtype}")
        _check_place("top_k", value, logits)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"sample: top_k must be an int or a tensor, got {type(value).__name__}")
    elif value < 0:
        raise ValueError(f"sample: top_k must be at least 0, got {value}")


def _check_place(name: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"sample: {name} must be a number or [{logits.shape[0]}], got {list(value.shape)}"
        )
    if value.device != logits.device:
        raise RuntimeError(f"sample: {name} must be on {logits.device}, got {value.device}")


def _apart(value: Any, dtype: torch.dtype) -> tuple[Tensor | None, Any]:
    """What an op takes: a tensor, or None and a number."""
    return (value.to(dtype).contiguous(), 0) if isinstance(value, Tensor) else (None, value)


BACKENDS = backends_of("sample", numba=takes_all, triton=takes_all)

_forward = register(
    "sample_forward(Tensor logits, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps,"
    " Tensor? seeds, Tensor? offsets, float temperature, SymInt top_k, float top_p, SymInt seed,"
    " SymInt offset, str backend) -> Tensor",
    BACKENDS,
    fake=lambda logits, *options: logits.new_empty(logits.shape[0], dtype=torch.int64),
)


def _inputs(
    batch: int,
    vocab: int,
    top_k: int | None = None,
    top_p: float | None = None,
    each: bool = False,
    *,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    logits = 3 * torch.randn(batch, vocab, device=device, dtype=dtype)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "seed": 1}
    if each:
        rows = torch.arange(batch, device=device)
        options = {
            "temperature": rows.to(dtype) / 4,
            "top_k": rows % 8 * 5,
            "top_p": 1 - rows.to(dtype) / (2 * batch),
            "seed": rows * 2**40,
            "offset": rows,
        }
    return (logits,), options


SAMPLE = declare(
    Op(
        name="sample",
        call=sample,
        reference=sample_reference,
        backends=BACKENDS,
        inputs=_inputs,
        sizes=[
            {"batch": 3, "vocab": 8},
            {"batch": 0, "vocab": 64},  # empty batch
            {"batch": 3, "vocab": 0},  # no token at all
            {"batch": 2, "vocab": 1},
            {"batch": 5, "vocab": 127, "top_k": 50},  # one short of a block, rows misaligned
            {"batch": 3, "vocab": 4099, "top_p": 0.9},  # several blocks
            {"batch": 2, "vocab": 3001, "top_k": 300, "top_p": 0.7},
            {"batch": 9, "vocab": 129, "each": True},
        ],
        workloads=[
            {"batch": batch, "vocab": vocab, **options}
            for batch in (1, 8, 64)
            for vocab in (32000, 128256)
            for options in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {})
        ],
        bytes_moved=lambda logits, **options: logits.nbytes + 8 * logits.shape[0],
    )
)

"""Random numbers by logical position, the same bits in every backend: Philox4x32-10.

Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405. The key is the seed; the counter is
the group of four columns, the row and the offset; a column's word is the one of its place in its
group. So a number depends on where it is used, never on how the work was cut into tiles.

This is the specification: plain PyTorch in int64, on any device, and without overflow.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Generator, Tensor

P = ParamSpec("P")
R = TypeVar("R")

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
GROUP = 4  # columns that share one counter
WORDS = 1 << 32

_LOW, _HALF = WORDS - 1, (1 << 16) - 1
_LAST_SEED = (1 << 63) - 1


def _low_and_high(value: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    return value & _LOW, (value >> 32) & _LOW


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low half of a product of two 32-bit words, by halves that fit in int64."""
    upper, lower = word * (factor >> 16), word * (factor & _HALF)
    high = (upper + (lower >> 16)) >> 16
    return high, (((upper & _HALF) << 16) + lower) & _LOW


def philox(
    seed: Tensor | int, offset: Tensor | int, row: Tensor | int, group: Tensor | int
) -> Tensor:
    """Draw the four words of a group of columns.

    Args:
        seed: int64, its two halves are the key.
        offset: int64, its two halves are the last two words of the counter.
        row: Second word of the counter, modulo 2^32.
        group: First word of the counter, modulo 2^32. All four broadcast together.

    Returns:
        `[..., 4]`, int64, from 0 to 2^32 - 1.
    """
    key = _low_and_high(seed)
    parts = (group & _LOW, row & _LOW, *_low_and_high(offset), *key)
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    tensors = [torch.as_tensor(part, dtype=torch.int64, device=device) for part in parts]
    words = torch.broadcast_tensors(*tensors)
    return torch.ops.tilewise.philox(*words) if torch.compiler.is_compiling() else _rounds(*words)


def _rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor, low: Tensor, high: Tensor) -> Tensor:
    for _ in range(ROUNDS):
        (a_high, a_low), (c_high, c_low) = (
            _multiply(a, MULTIPLIERS[0]),
            _multiply(c, MULTIPLIERS[1]),
        )
        a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
        low, high = (low + KEY_STEPS[0]) & _LOW, (high + KEY_STEPS[1]) & _LOW
    return torch.stack([a, b, c, d], -1)


# Opaque to torch.compile: inlined, each word is computed anew for each of its two uses in each of
# the ten rounds, and Inductor's code for one draw takes minutes and gigabytes.
_LIBRARY = torch.library.Library("tilewise", "FRAGMENT")
_LIBRARY.define("philox(Tensor a, Tensor b, Tensor c, Tensor d, Tensor low, Tensor high) -> Tensor")
_LIBRARY.impl("philox", _rounds, "CompositeExplicitAutograd")
torch.library.register_fake(
    "tilewise::philox", lambda *words: words[0].new_empty(*words[0].shape, 4), lib=_LIBRARY
)


def philox_words(
    seed: Tensor | int, offset: Tensor | int, rows: Tensor | int, columns: int, first: int = 0
) -> Tensor:
    """Draw the words of `columns` columns of each row.

    Args:
        seed: int64.
        offset: int64.
        rows: Numbers of the rows. All three broadcast to a shape `[...]`.
        columns: How many columns.
        first: The first of them, a multiple of four.

    Returns:
        `[..., columns]`, int64, from 0 to 2^32 - 1.
    """
    device = next((t.device for t in (rows, seed, offset) if isinstance(t, Tensor)), None)
    groups = torch.arange(-(-columns // GROUP), device=device) + first // GROUP
    seed, offset, rows = (
        part.unsqueeze(-1) if isinstance(part, Tensor) else part for part in (seed, offset, rows)
    )
    return philox(seed, offset, rows, groups).flatten(-2)[..., :columns]


def _as_uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    below_one = 1 - torch.finfo(dtype).eps / 2
    return ((words.double() + 0.5) / WORDS).to(dtype).clamp(max=below_one)


def uniform(
    seed: Tensor | int,
    offset: Tensor | int,
    rows: Tensor | int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> Tensor:
    """Draw numbers between 0 and 1, of which neither is ever reached.

        u = (word + 1/2) / 2^32, rounded to `dtype`, at most the number before 1

    Args:
        seed: int64.
        offset: int64.
        rows: Numbers of the rows. All three broadcast to a shape `[...]`.
        columns: How many columns.
        dtype: float32 or float64.
        first: The first of them, a multiple of four.

    Returns:
        `[..., columns]`, `dtype`.
    """
    return _as_uniform(philox_words(seed, offset, rows, columns, first), dtype)


def gumbel(
    seed: Tensor | int,
    offset: Tensor | int,
    rows: Tensor | int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> Tensor:
    """Draw from the standard Gumbel distribution: logits plus these are largest at a sample.

        g = -log(-log((word + 1/2) / 2^32))

    Computed in fp64, since near 1 the uniform number loses in fp32 what the logarithm needs.

    Args:
        seed: int64.
        offset: int64.
        rows: Numbers of the rows. All three broadcast to a shape `[...]`.
        columns: How many columns.
        dtype: Of the result.
        first: The first of them, a multiple of four.

    Returns:
        `[..., columns]`, `dtype`, between -3.2 and 22.9.
    """
    numbers = uniform(seed, offset, rows, columns, torch.float64, first)
    return (-(-numbers.log()).log()).to(dtype)


def keep_threshold(p: float) -> int:
    """The first word that survives dropout with probability `p`: 0 drops none, 2^32 all."""
    return int(p * WORDS)


def keep_mask(
    p: float, seed: Tensor | int, offset: Tensor | int, rows: Tensor | int, columns: int
) -> Tensor:
    """Say which elements dropout keeps.

        keep = word >= floor(p * 2^32)

    Args:
        p: Probability of dropping an element, from 0 to 1.
        seed: int64.
        offset: int64.
        rows: Numbers of the rows. All three broadcast to a shape `[...]`.
        columns: How many columns.

    Returns:
        `[..., columns]`, bool.
    """
    return philox_words(seed, offset, rows, columns) >= keep_threshold(p)


def dropped(x: Tensor, p: float, seed: Tensor | int, offset: Tensor | int) -> Tensor:
    """`x` times 1 / (1 - p) where dropout keeps it, 0 elsewhere, whatever `x` is there.

    Args:
        x: `[..., cols]`; the rows of the counters are those of `[rows, cols]`.
        p: Probability of dropping an element, from 0 to 1.
        seed: int64, an int or a tensor `[]` or, one a row, `[rows]`.
        offset: Like `seed`.

    Returns:
        The shape and dtype of `x`.
    """
    if p == 0:
        return x
    rows = x.numel() // max(x.shape[-1], 1)
    kept = keep_mask(p, seed, offset, counter_rows(seed, rows, x.device), x.shape[-1])
    return torch.where(kept.expand(rows, -1).view(x.shape), x * keep_scale(p), 0)


def keep_scale(p: float) -> float:
    """By what dropout multiplies the elements that it keeps."""
    return 0.0 if p == 1 else 1 / (1 - p)


# --- What a front door asks.


def _checked(
    op: str, name: str, value: Tensor | int, rows: int, device: torch.device
) -> Tensor | int:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be torch.int64, got {value.dtype}")
        if value.ndim and value.shape != (rows,):
            raise ValueError(f"{op}: {name} must be [] or [{rows}], got {list(value.shape)}")
        if value.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, got {value.device}")
        return value.contiguous()
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int or a tensor, got {type(value).__name__}")
    if not -_LAST_SEED - 1 <= value <= _LAST_SEED:
        raise ValueError(f"{op}: {name} must fit in 64 bits with a sign, got {value}")
    return value


def seed_and_offset(
    op: str,
    rows: int,
    device: torch.device,
    seed: Tensor | int | None,
    offset: Tensor | int | None,
    generator: Generator | None,
) -> tuple[Tensor | int, Tensor | int]:
    """Settle the `seed`, `offset` and `generator` of the op named `op`, for `rows` on `device`.

    Without a seed one is drawn on the device, by PyTorch's own generator or the one given: no
    synchronisation, and a part of a compiled or captured graph.

    Returns:
        Seed and offset, each an int or an int64 tensor, `[]` or `[rows]`. With one seed a row, the
        row of every counter is 0, so that a draw does not know its place in the batch.

    Raises:
        TypeError: If a dtype or kind is wrong.
        ValueError: If a shape or range is wrong, or both seed and generator are given.
        RuntimeError: If a tensor is on another device.
    """
    if seed is not None and generator is not None:
        raise ValueError(f"{op}: must be given seed or generator, got both")
    offset = 0 if offset is None else _checked(op, "offset", offset, rows, device)
    if seed is not None:
        return _checked(op, "seed", seed, rows, device), offset
    return _drawn(device, generator), offset


def _drawn(device: torch.device, generator: Generator | None) -> Tensor:
    return torch.randint(_LAST_SEED, (), device=device, generator=generator)


def seeded(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function`, of a tensor first, have a seed whenever it is called: where none was given
    one is drawn beforehand, as `seed_and_offset` does it."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if options.get("seed") is None and args and isinstance(args[0], Tensor):
            generator = options.pop("generator", None)
            options["seed"] = _drawn(args[0].device, cast(Any, generator))
        return function(*args, **options)

    return call


def as_arguments(
    seed: Tensor | int, offset: Tensor | int
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What a torch op takes for them: two tensors or None, then two ints."""
    seeds, seed = (seed.contiguous(), 0) if isinstance(seed, Tensor) else (None, seed)
    offsets, offset = (offset.contiguous(), 0) if isinstance(offset, Tensor) else (None, offset)
    return seeds, offsets, seed, offset


def counter_rows(seed: Tensor | int, rows: int, device: torch.device) -> Tensor | int:
    """The row of each counter: 0 with one seed a row, else the place in the batch."""
    one_a_row = isinstance(seed, Tensor) and seed.ndim > 0
    return 0 if one_a_row else torch.arange(rows, device=device)

"""The matrix products around the losses of linear logits: which, in what order, in how much memory.

What is done to rows of logits, and how a product is computed, each room of kernels says itself.
Logits are made in parts that fit into a budget, and their gradients take their place:

    by tokens    Logits of some tokens and all classes. Three products: the logits, dhidden of these
                 tokens, and dweight summed over the parts.
    by slices    Logits of all tokens and some classes, from statistics known before. Three products
                 as well: the logits, dweight of these classes, and dhidden summed over the parts.

A sum over parts is one in fp32. Where dweight is narrower, that sum would take twice its room; so
"lean" then computes dhidden by tokens and dweight by slices, in four products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MODES = ("fast", "lean", "min")

# Bytes of logits at a time. By slices there is beside them an fp32 sum of dhidden.
TOKENS_BUDGET = {"cpu": 56_000_000, "other": 1 << 28}
SLICE_BUDGET = 110_000_000

TOKENS, CLASSES = 64, 256  # of which parts are multiples, unless they are smaller
PADDING = 64  # the rows of logits are a multiple of this many elements apart


def logits_by_torch(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = hidden weight^T + bias."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def product_by_torch(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a b, added to what it holds with `add`; out may be fp32 beside halves."""
    if out.dtype != a.dtype and out.device.type == "cpu":  # where a product has no other dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    if out.dtype != a.dtype:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


@dataclass(frozen=True)
class Room:
    """What a room of kernels does with logits `[1, rows, classes]`.

    Attributes:
        losses: (logits, target, class weights, numbers) -> losses, lse, statistics.
        gradients: (dlogits, dlosses, dlse, logits, target, class weights, statistics, first,
            classes, numbers): writes dlogits, of classes `first` and on.
        losses_and_gradients: (logits, target, class weights, dlosses, numbers) -> losses, lse; the
            gradients take the place of the logits.
        logits: As `logits_by_torch`.
        product: As `product_by_torch`.
    """

    losses: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradients: Callable[..., None]
    losses_and_gradients: Callable[..., tuple[Tensor, Tensor]]
    logits: Callable[[Tensor, Tensor, Tensor, Tensor | None], None] = logits_by_torch
    product: Callable[[Tensor, Tensor, Tensor, bool], None] = product_by_torch


@dataclass(frozen=True)
class Problem:
    """hidden [tokens, dim], weight [classes, dim], bias [classes], target [tokens], class weights
    [classes + 1], the numbers of the loss; the memory mode; and which of dhidden, dweight and dbias
    are wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weights: Tensor | None
    numbers: tuple[float, ...]
    memory: str
    wanted: tuple[bool, bool, bool]


Gradients = list[Tensor]


def losses_and_gradients(
    room: Room, problem: Problem, factor: Tensor | None
) -> tuple[Tensor, Tensor, Gradients]:
    """losses [tokens], statistics [3, tokens], and the gradients of factor * sum(losses).

    A gradient that is not wanted is empty, and so are statistics where one is.
    """
    hidden, wanted = problem.hidden, problem.wanted
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    statistics = losses.new_empty(3, len(hidden))
    if not any(wanted):
        _losses(room, problem, losses, statistics)
        return losses, statistics, _gradients(problem)
    if not _in_slices(problem):
        return losses, statistics.new_empty(3, 0), _by_tokens(room, problem, factor, losses)

    first = replace(problem, wanted=(wanted[0], False, False))
    each = losses.new_ones(len(hidden)) if factor is None else factor.expand(len(hidden))
    dlosses = each.contiguous()
    dhidden = _by_tokens(room, first, dlosses, losses, statistics)[0]
    rest = replace(problem, wanted=(False, *wanted[1:]))
    return (
        losses,
        statistics.new_empty(3, 0),
        [dhidden, *_by_slices(room, rest, dlosses, statistics)[1:]],
    )


def gradients(room: Room, problem: Problem, dlosses: Tensor, statistics: Tensor) -> Gradients:
    """The wanted gradients for dlosses [tokens], from logits computed once more."""
    if problem.memory == "min" or _in_slices(problem):
        return _by_slices(room, problem, dlosses, statistics)
    return _by_tokens(room, problem, dlosses, torch.empty_like(dlosses))


def _in_slices(problem: Problem) -> bool:
    """Whether dweight would be a sum over parts in fp32, and is not fp32 itself."""
    several = _tokens_at_once(problem) < len(problem.hidden)
    return several and problem.wanted[1] and problem.weight.itemsize < 4


def _gradients(problem: Problem) -> Gradients:
    """Room for what is wanted."""
    likes = problem.hidden, problem.weight, problem.bias
    return [
        like.new_empty(like.shape) if wanted and like is not None else problem.hidden.new_empty(0)
        for like, wanted in zip(likes, problem.wanted, strict=True)
    ]


def _tokens_at_once(problem: Problem) -> int:
    """How many rows of logits there are at a time: all of them in "fast", if for gradients."""
    hidden = problem.hidden
    if problem.memory == "fast" and any(problem.wanted):
        return len(hidden)
    budget = TOKENS_BUDGET["cpu" if hidden.device.type == "cpu" else "other"]
    budget = min(budget, SLICE_BUDGET) if problem.memory == "min" else budget
    fitting = budget // (_padded(len(problem.weight)) * hidden.itemsize)
    return min(len(hidden), max(fitting // TOKENS * TOKENS, min(fitting, TOKENS), 1))


def _padded(classes: int) -> int:
    return -(-classes // PADDING) * PADDING


def _logits_memory(hidden: Tensor, rows: int, classes: int) -> Tensor:
    """Room for rows of logits, zero behind them: where torch multiplies bf16 with AMX it reads on
    to a whole tile, and what is not a number there is in the product."""
    memory = hidden.new_empty(rows, _padded(classes))
    memory[:, classes:] = 0
    return memory


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _token_logits(room: Room, problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens, and their logits `[1, tokens, classes]`, in one piece of memory for all."""
    hidden, classes = problem.hidden, len(problem.weight)
    size = _tokens_at_once(problem)
    memory = _logits_memory(hidden, size, classes)
    for part in _parts(len(hidden), size):
        logits = memory[: part.stop - part.start, :classes]
        room.logits(logits, hidden[part], problem.weight, problem.bias)
        yield part, logits[None]


def _losses(room: Room, problem: Problem, losses: Tensor, statistics: Tensor) -> None:
    for part, logits in _token_logits(room, problem):
        target = problem.target[None, part]
        some, _, known = room.losses(logits, target, problem.class_weights, problem.numbers)
        losses[part], statistics[:, part] = some[0], known[:, 0]


def _by_tokens(
    room: Room,
    problem: Problem,
    dlosses: Tensor | None,
    losses: Tensor,
    statistics: Tensor | None = None,
) -> Gradients:
    """The gradients for dlosses [tokens], or [] for all; losses, and statistics, are filled in."""
    weights, numbers = problem.class_weights, problem.numbers
    dhidden, dweight, dbias = _gradients(problem)
    sums = torch.zeros_like(dbias, dtype=losses.dtype)
    for part, logits in _token_logits(room, problem):
        target = problem.target[None, part]
        some = dlosses if dlosses is None or dlosses.ndim == 0 else dlosses[None, part]
        if statistics is None:
            here, _ = room.losses_and_gradients(logits, target, weights, some, numbers)
        else:
            here, _, known = room.losses(logits, target, weights, numbers)
            room.gradients(
                logits, some, None, logits, target, weights, known, 0, logits.shape[-1], numbers
            )
            statistics[:, part] = known[:, 0]
        losses[part] = here[0]
        if problem.wanted[0]:
            room.product(dhidden[part], logits[0], problem.weight, False)
        if problem.wanted[1]:
            room.product(dweight, logits[0].t(), problem.hidden[part], part.start > 0)
        if problem.wanted[2]:
            sums += logits[0].sum(0, dtype=sums.dtype)
    return [dhidden, dweight, sums.to(dbias.dtype)]


def _by_slices(room: Room, problem: Problem, dlosses: Tensor, statistics: Tensor) -> Gradients:
    """The gradients for dlosses [tokens], from the statistics of whole rows."""
    hidden, weight, bias = problem.hidden, problem.weight, problem.bias
    tokens, classes = len(hidden), len(weight)
    _, dweight, dbias = _gradients(replace(problem, wanted=(False, *problem.wanted[1:])))
    sums = dlosses.new_empty(hidden.shape if problem.wanted[0] else 0)
    fitting = SLICE_BUDGET // (tokens * hidden.itemsize)
    size = min(classes, max(fitting // CLASSES * CLASSES, min(fitting, CLASSES), 1))
    memory = _logits_memory(hidden, tokens, size)
    known = statistics.view(3, 1, tokens)
    for part in _parts(classes, size):
        logits = memory[:, : part.stop - part.start]
        room.logits(logits, hidden, weight[part], None if bias is None else bias[part])
        room.gradients(
            logits[None], dlosses[None], None, logits[None], problem.target[None],
            problem.class_weights, known, part.start, classes, problem.numbers,
        )  # fmt: skip
        if problem.wanted[0]:
            room.product(sums, logits, weight[part], part.start > 0)
        if problem.wanted[1]:
            room.product(dweight[part], logits.t(), hidden, False)
        if problem.wanted[2]:
            dbias[part] = logits.sum(0, dtype=sums.dtype)
    return [sums.to(hidden.dtype), dweight, dbias]


# --- What the ops call, in every room.


def forward(
    room: Room,
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weights: Tensor | None,
    factor: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """hidden [tokens, dim], linear_weight [classes, dim], target [tokens], linear_bias [classes],
    class_weights [classes + 1], factor [] -> losses [tokens], statistics [3, tokens or 0], and the
    gradients of hidden, linear_weight and linear_bias, empty where not wanted."""
    *numbers, memory, want_hidden, want_weight, want_bias = options
    problem = Problem(
        hidden, linear_weight, linear_bias, target, class_weights, tuple(numbers), memory,
        (want_hidden, want_weight, want_bias),
    )  # fmt: skip
    losses, statistics, found = losses_and_gradients(room, problem, factor)
    return losses, statistics, *found


def backward(
    room: Room,
    dlosses: Tensor,
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weights: Tensor | None,
    statistics: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """As forward, and dlosses [tokens] -> the gradients."""
    *numbers, memory, want_hidden, want_weight, want_bias = options
    problem = Problem(
        hidden, linear_weight, linear_bias, target, class_weights, tuple(numbers), memory,
        (want_hidden, want_weight, want_bias),
    )  # fmt: skip
    return tuple(gradients(room, problem, dlosses, statistics))

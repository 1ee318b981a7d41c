"""Is a backend right? One rule, used by `tilewise check` and by the tests.

Truth is the reference in fp64; the yardstick is the reference run in the dtype at hand. In every
block of at most 32 consecutive rows, with maxima over the block,

    max|ours - truth| <= 2 max|yardstick - truth| + eps max|truth|

and over the whole tensor the mean error is at most twice the yardstick's, or twice that of the
truth correctly rounded, where this is larger. Outputs and every gradient.

In fp32 the yardstick is the worst of four runs, three of them on inputs a rounding away: a single
run of a small case has few roundings, and may by luck be far better than its dtype is.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilewise.choice import refusal
from tilewise.op import INTERPRETED, Op, Size, Tensors

BLOCK_ROWS = 32
NUDGES = 3


@dataclass(frozen=True)
class Result:
    """One output or gradient of one case, or the reason why the case cannot run."""

    op: str
    backend: str
    device: str
    dtype: str
    size: dict[str, Any]
    output: str = ""
    error: float = 0.0
    allowed: float = 0.0
    ok: bool = True
    skipped: str = ""

    def row(self) -> dict[str, Any]:
        """The JSON form: `skipped` is there only for a case that did not run."""
        row = asdict(self)
        if self.skipped:
            return {k: row[k] for k in ("op", "backend", "device", "dtype", "size", "skipped")}
        del row["skipped"]
        return row

    @property
    def ratio(self) -> float:
        """The error as a part of what is allowed."""
        return self.error / self.allowed if self.allowed else float(self.error > 0)


def cases(op: Op) -> Iterator[tuple[str, torch.dtype, Size]]:
    """Every (backend, dtype, size) of `op`, whether or not this machine can run it."""
    for name, backend in op.backends.items():
        for dtype in sorted(backend.dtypes, key=str):
            yield from ((name, dtype, size) for size in op.sizes)


def gradient_inputs(op: Op, tensors: Tensors) -> list[int]:
    """Positions of the tensors that have a gradient."""
    return [
        i
        for i, t in enumerate(tensors)
        if t is not None and t.is_floating_point() and i not in op.constants
    ]


def outputs_and_grads(
    op: Op, call: Callable[..., Any], tensors: Tensors, options: dict[str, Any]
) -> list[Tensor]:
    """Run `call` forward and backward, from a gradient that is the same every time."""
    wanted = gradient_inputs(op, tensors)
    leaves = [
        t if t is None else t.detach().clone().requires_grad_(i in wanted)
        for i, t in enumerate(tensors)
    ]
    result = call(*leaves, **options)
    outs = list(result) if isinstance(result, tuple) else [result]
    floating = [out for out in outs if out.is_floating_point() and out.requires_grad]
    if not floating:
        return [out.detach() for out in outs]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in floating]
    inputs = [t for i, t in enumerate(leaves) if t is not None and i in wanted]
    grads = torch.autograd.grad(floating, inputs, cotangents, materialize_grads=True)
    return [*(out.detach() for out in outs), *grads]


def output_names(op: Op, tensors: Tensors, count: int) -> list[str]:
    """Names for what `outputs_and_grads` returns: out, out1, ..., then dx, dweight, ..."""
    parameters = list(inspect.signature(op.call).parameters)
    grads = [f"d{parameters[i]}" for i in gradient_inputs(op, tensors)]
    outs = count - len(grads) if count > len(grads) else count
    return [f"out{i}" if i else "out" for i in range(outs)] + grads[: count - outs]


def converted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same values, the floating-point ones in `dtype`."""
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def check(
    op: Op, backend: str, dtype: torch.dtype, size: Size, device: str, seed: int = 0
) -> list[Result]:
    """Hold one case to the rule.

    Returns:
        A result for each output and gradient, or a single one that says why the case cannot run.
    """
    torch.manual_seed(seed)
    tensors, options = op.inputs(**size, device=device, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    case = (op.name, backend, device, name, dict(size))
    if refused := refusal(op.backends[backend], *tensors, **options):
        return [Result(*case, skipped=refused[1])]
    if backend == "triton" and INTERPRETED:
        from tilewise.verify.interpreter import repair

        repair()

    standard = standard_of(op, tensors, options)
    ours = outputs_and_grads(op, op.call, tensors, options | {"backend": backend})
    return standard.judge(ours, Result(*case))


@dataclass(frozen=True)
class Standard:
    """What one case is held to.

    Attributes:
        names: Of the outputs, then of the gradients.
        truth: The reference in fp64.
        plain: The reference in the dtype at hand: what ours must look like.
        runs: Of the reference as yardstick; more than `plain` in fp32, and in its place in fp64.
        scale: By how much the error of a yardstick counts.
    """

    names: list[str]
    truth: list[Tensor]
    plain: list[Tensor]
    runs: list[list[Tensor]]
    scale: float

    @property
    def outputs(self) -> int:
        """How many outputs there are; the rest are gradients."""
        return sum(name.startswith("out") for name in self.names)

    def judge(self, ours: Sequence[Tensor], case: Result) -> list[Result]:
        """Fill in `case` for each output and gradient, of which `ours` may hold only the first."""
        return [
            self._judge(replace(case, output=self.names[i]), i, mine) for i, mine in enumerate(ours)
        ]

    def _judge(self, case: Result, i: int, ours: Tensor) -> Result:
        plain, truth, yardsticks = self.plain[i], self.truth[i], [run[i] for run in self.runs]
        if ours.shape != plain.shape or ours.dtype != plain.dtype or ours.device != plain.device:
            error, allowed = float("inf"), 0.0
        elif truth.is_floating_point():
            error, allowed = compare(ours, yardsticks, truth, self.scale)
        else:
            error = float((ours != truth).sum())
            allowed = 2 * float((yardsticks[0] != truth).sum())
        return replace(case, error=error, allowed=allowed, ok=error <= allowed)


def standard_of(op: Op, tensors: Tensors, options: dict[str, Any]) -> Standard:
    """Run the reference, in fp64 and in the dtype of `tensors`."""
    first = tensors[op.leading]
    assert first is not None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        double = converted(tensors, torch.float64)
        truth = outputs_and_grads(op, op.reference, double, options)
        plain = outputs_and_grads(op, op.reference, tensors, options)
        runs, scale = [plain], 1.0
        if first.dtype in (torch.float32, torch.float64):
            single = converted(tensors, torch.float32)
            near = [tuple(map(nudged, single)) for _ in range(NUDGES)]
            runs = [outputs_and_grads(op, op.reference, t, options) for t in (single, *near)]
        if first.dtype == torch.float64:  # the truth itself: the error in fp32 is scaled down
            scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            scale *= 1.5  # and that truth is itself as far from the exact one as the yardstick is
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return Standard(output_names(op, tensors, len(truth)), truth, plain, runs, scale)


def nudged(x: Tensor | None) -> Tensor | None:
    """Each floating-point number of `x` moved, at random, to a neighbouring one, or left."""
    if x is None or not x.is_floating_point():
        return x
    way = torch.randint(-1, 2, x.shape, device=x.device)
    moved = torch.nextafter(x, torch.where(way > 0, torch.inf, -torch.inf).to(x))
    return torch.where((way == 0) | x.isinf(), x, moved)


def compare(
    ours: Tensor, yardstick: Tensor | Sequence[Tensor], truth: Tensor, scale: float = 1.0
) -> tuple[float, float]:
    """The error and the allowance of the block, or of the mean, that comes nearest to failing.

    Args:
        ours: What a kernel gave.
        yardstick: What the reference gave in the same dtype; of several runs the worst counts.
        truth: What the reference gave in fp64.
        scale: By how much the yardstick's error counts: below 1 where it had to be run in fp32.

    Returns:
        error, allowed: right if and only if the first is at most the second. Where the truth is NaN
        or infinite, ours must be the same; if not, the error is infinite.
    """
    if truth.numel() == 0:
        return 0.0, 0.0
    eps = torch.finfo(ours.dtype).eps
    finite = truth.isfinite()
    same = torch.where(truth.isnan(), ours.isnan(), ours == truth.to(ours.dtype)) | finite
    rounded = truth.to(ours.dtype).to(truth.dtype)
    overflowing = finite & ~rounded.isfinite()
    if not bool((same | overflowing).all()) or bool((finite & ~overflowing & ours.isnan()).any()):
        return float("inf"), 0.0
    kept = finite & ~overflowing
    size = torch.where(kept, truth, 0).abs()
    error = torch.where(kept, ours.to(truth.dtype) - truth, 0).abs()
    runs = [yardstick] if isinstance(yardstick, Tensor) else yardstick
    theirs = [torch.where(kept, run.to(truth.dtype) - truth, 0).abs() * scale for run in runs]
    theirs = [run.nan_to_num(posinf=0.0) for run in theirs]
    means = [float(run.mean()) for run in theirs]
    rounding = torch.where(kept, rounded - truth, 0).abs()

    spread = torch.stack([_block_maxima(run) for run in theirs]).amax(0)
    allowed = 2 * spread + eps * _block_maxima(size)
    pairs = list(zip(_block_maxima(error).tolist(), allowed.tolist(), strict=True))
    pairs.append((float(error.mean()), 2 * max(*means, float(rounding.mean()))))
    if truth.numel() < BLOCK_ROWS * 2:  # too few for a mean to mean more than a maximum
        pairs.pop()
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else float(pair[0] > 0))


def _block_maxima(values: Tensor) -> Tensor:
    """Maxima over blocks of 32 consecutive rows; a vector is a column of one-element rows."""
    rows = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1).amax(-1)
    padding = -rows.numel() % BLOCK_ROWS
    rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.view(-1, BLOCK_ROWS).amax(-1)


def failures(results: Sequence[Result]) -> str:
    """A line for each result that is not ok."""
    return "\n".join(
        f"{r.op}/{r.backend} {r.dtype} {r.size} {r.output}: error {r.error:.2e} > {r.allowed:.2e}"
        for r in results
        if not r.ok
    )

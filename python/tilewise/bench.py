"""How fast is a backend? Every workload of every op beside PyTorch, from the declarations.

Green first: a backend that fails the rule of `tilewise.check` is reported and not timed. PyTorch's
own rounding is not ours to judge, nor that of the `libraries`: a peer that fails the rule is
reported too, and timed all the same.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewise import clock, libraries
from tilewise.check import Result, Standard, gradient_inputs, outputs_and_grads, standard_of
from tilewise.choice import refusal
from tilewise.clock import Call, Roof, fair_clock, interleaved, measure_roof, peak_bytes, summary
from tilewise.op import Op, Size, Tensors, stand_in

DIRECTIONS = ("forward", "forward+backward")
PYTORCH = ("reference", "torch", "torch.compile")
PEERS = (*PYTORCH, *libraries.MODULES)

# What is timed unless a dtype is asked for, the most important first.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Work:
    """One workload in one dtype: what is worth dropping as a whole."""

    op: Op
    size: Size
    dtype: torch.dtype

    def __str__(self) -> str:
        size = " ".join(f"{name}={value}" for name, value in self.size.items())
        return f"{self.op.name} {str(self.dtype).removeprefix('torch.')} {size}"


@dataclass(frozen=True)
class Row:
    """One provider at one work in one direction: what was measured.

    `ratio` is the time of PyTorch's own function, or of the reference where it has none, over that
    of the provider; with one thread on a CPU the thread's own time, else the wall's or the GPU's.
    """

    op: str
    direction: str
    device: str
    dtype: str
    size: dict[str, Any]
    provider: str
    threads: int
    seconds: float
    host_seconds: float
    p10: float
    p90: float
    ratio: float | None
    bytes: int | None
    flops: int | None
    error: float
    peak_bytes: int

    @property
    def fair_seconds(self) -> float:
        """The seconds to compare by."""
        seconds: float = getattr(self, fair_clock(self.device, self.threads))
        return seconds


@dataclass(frozen=True)
class Untimed:
    """A provider that was not timed, and why; or one of PyTorch's that fails the rule, and how."""

    op: str
    direction: str  # or "both"
    device: str
    dtype: str
    size: dict[str, Any]
    provider: str
    threads: int
    reason: str


@dataclass
class Report:
    """What a run has found so far.

    Attributes:
        rows: What was timed.
        untimed: What was not, and why: not there, or not right.
        inexact: What of PyTorch's was timed although it fails the rule.
        dropped: Works not timed: no time was left, or, in a run that was stopped, not reached.
        roofs: What this machine can do at most.
    """

    rows: list[Row] = field(default_factory=list)
    untimed: list[Untimed] = field(default_factory=list)
    inexact: list[Untimed] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    roofs: list[Roof] = field(default_factory=list)

    def roof(self, device: str, threads: int, dtype: torch.dtype) -> Roof:
        """The ceiling for these, measured at the first call."""
        name = str(dtype).removeprefix("torch.")
        for roof in self.roofs:
            if (roof.device, roof.threads, roof.dtype) == (device, threads, name):
                return roof
        with threads_set(threads):
            self.roofs.append(measure_roof(device, dtype))
        return self.roofs[-1]

    def as_json(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON form: rows, with what they were measured on beside them."""
        return {
            "machine": {**machine, "roofs": [asdict(roof) for roof in self.roofs]},
            "rows": [asdict(row) for row in self.rows],
            "untimed": [asdict(row) for row in self.untimed],
            "inexact": [asdict(row) for row in self.inexact],
            "dropped": self.dropped,
        }


def works(
    ops: Sequence[Op], device: str, dtype: torch.dtype | None = None, quick: bool = False
) -> list[Work]:
    """Every work, the most important first: first workloads before second, first dtypes before.

    Among equals those with matrix products come last: their references take longest by far. Those
    of a GPU's own have the first dtype alone.
    """
    ops = sorted(ops, key=lambda op: op.flops is not None)
    dtypes = DTYPES[device] if dtype is None else (dtype,)
    sizes = [(op, i, size) for op in ops for i, size in enumerate(op.timed_on(device))]
    found: list[Work] = []
    for place in range(max((i + 1 for _, i, _ in sizes), default=0)):
        for kind in dtypes:
            found += [
                Work(op, size, kind)
                for op, i, size in sizes
                if i == place and (kind == dtypes[0] or size not in op.gpu_workloads)
            ]
    return found[: len(ops)] if quick else found


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Let PyTorch, and so our kernels, use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    chosen: Sequence[Work],
    device: str,
    threads: Sequence[int],
    *,
    backend: str | None = None,
    compiled: bool = True,
    seconds_each: float = 0.5,
    budget: float | None = None,
) -> Iterator[Report]:
    """Time every work, giving the same growing report after each.

    Args:
        chosen: What to time, in this order.
        device: "cpu" or "cuda".
        threads: With how many threads, each in turn.
        backend: Only this one beside PyTorch; None is every one that can run.
        compiled: Whether to time torch.compile as well, which takes longest to get ready.
        seconds_each: About how long to spend on each provider, direction and number of threads.
        budget: Seconds for it all: a work is dropped where its op has taken longer than what is
            left, or, of an op that is new, where any has. A work once begun is finished.
    """
    report, begun, costs = Report(), time.monotonic(), dict[str, float]()
    report.dropped += map(str, chosen)
    for work in chosen:
        left = float("inf") if budget is None else budget - (time.monotonic() - begun)
        if left <= costs.get(work.op.name, min(costs.values(), default=0.0)):
            yield report
            continue
        started = time.monotonic()
        for count in threads:
            report.roof(device, count, work.dtype)
            with threads_set(count):
                found = list(_measure(work, device, count, backend, compiled, seconds_each))
            report.rows += [item for item in found if isinstance(item, Row)]
            done = {(row.provider, row.direction) for row in found if isinstance(row, Row)}
            for item in found:
                if isinstance(item, Untimed):
                    late = (item.provider, item.direction) in done
                    (report.inexact if late else report.untimed).append(item)
        costs[work.op.name] = time.monotonic() - started
        report.dropped.remove(str(work))
        yield report


def _measure(
    work: Work, device: str, threads: int, backend: str | None, compiled: bool, seconds_each: float
) -> Iterator[Row | Untimed]:
    """Time the providers of one work that are right; say of the others why not."""
    torch.manual_seed(0)
    torch.compiler.reset()  # every size is compiled for itself
    op = work.op
    place: dict[str, Any] = {
        "op": op.name,
        "device": device,
        "dtype": str(work.dtype).removeprefix("torch."),
        "size": dict(work.size),
        "threads": threads,
    }
    try:
        tensors, options = op.inputs(**work.size, device=device, dtype=work.dtype)
        standard = standard_of(op, tensors, options)
    except RuntimeError as error:  # it does not fit into the memory
        yield Untimed(provider="reference", direction="both", reason=_line(error), **place)
        return
    calls, absent = providers(op, tensors, options, threads, backend, compiled)
    own = {name: _copies(tensors) if name in libraries.MODULES else tensors for name in calls}
    verdicts = {name: judge(op, calls[name], own[name], options, standard) for name in calls}
    for name, reason in absent.items():
        yield Untimed(provider=name, direction="both", reason=reason, **place)

    differentiable = len(standard.names) > standard.outputs
    for index, direction in enumerate(DIRECTIONS[: 1 + differentiable]):
        said = {name: verdict[index].reason for name, verdict in verdicts.items()}
        for name, reason in said.items():
            if reason:
                yield Untimed(provider=name, direction=direction, reason=reason, **place)
        green = [name for name, verdict in verdicts.items() if worth_timing(name, verdict[index])]
        timed = {name: thunk(op, calls[name], own[name], options, direction) for name in green}
        cost: dict[str, Any] = cost_of(op, tensors, options, standard, direction)
        cold = device == "cuda" and clock.bound_by_memory(cost["bytes"], cost["flops"])
        for name, figures in _timed(timed, device, seconds_each, cold).items():
            largest = verdicts[name][index].error
            yield Row(
                provider=name, direction=direction, error=largest, **place, **cost, **figures
            )  # fmt: skip


def _copies(tensors: Tensors) -> Tensors:
    """For those who write over what they are given."""
    return tuple(None if t is None else t.clone() for t in tensors)


def _timed(
    calls: Mapping[str, Call], device: str, seconds_each: float, cold: bool
) -> dict[str, dict[str, Any]]:
    """Seconds, ratio to PyTorch and memory of each call."""
    if not calls:
        return {}
    samples = interleaved(calls, device, seconds_each, cold)
    figures: dict[str, dict[str, Any]] = {name: {**summary(s)} for name, s in samples.items()}
    peer = figures.get("torch") or figures.get("reference")
    fair = fair_clock(device, torch.get_num_threads())
    for name, call in calls.items():
        ratio = peer[fair] / figures[name][fair] if peer else None
        figures[name] |= {"ratio": ratio, "peak_bytes": peak_bytes(call, device)}
    return figures


def providers(
    op: Op,
    tensors: Tensors,
    options: dict[str, Any],
    threads: int,
    backend: str | None,
    compiled: bool,
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Who can be asked for these tensors, and of the others why not."""
    calls: dict[str, Callable[..., Any]] = {"reference": op.reference}
    if op.native is not None:
        calls["torch"] = op.native
    if compiled:
        # Inductor writes the number of threads into the code it makes.
        calls["torch.compile"] = torch.compile(
            op.reference, dynamic=False, options={"cpp.threads": threads}
        )
    place = tensors[op.leading].device.type  # type: ignore[union-attr]
    there, absent = libraries.calls(op.name, place)
    calls |= there
    for name, candidate in op.backends.items():
        if backend not in (None, name):
            continue
        if refused := refusal(candidate, *tensors, **options):
            absent[name] = refused[1]
        elif how := stand_in(name):
            absent[name] = f"is {how}, not worth the clock"
        else:
            calls[name] = partial(op.call, backend=name)
    return calls, absent


@dataclass(frozen=True)
class Verdict:
    """The largest error of an output, or of a gradient too, and what is wrong with it if it is."""

    error: float
    reason: str = ""


def worth_timing(provider: str, verdict: Verdict) -> bool:
    """Whether it is right, or a peer and at least of the right order."""
    return not verdict.reason or (provider in PEERS and verdict.error < float("inf"))


def judge(
    op: Op, call: Callable[..., Any], tensors: Tensors, options: dict[str, Any], standard: Standard
) -> tuple[Verdict, Verdict]:
    """Hold `call` to the rule: its outputs, and its outputs with their gradients."""
    lacks = None
    try:
        ours = outputs_and_grads(op, call, tensors, options)
    except Exception as error:  # whatever a peer raises, the others are still timed
        lacks = Verdict(float("inf"), _line(error))
        try:  # it may have no gradient
            constants = frozenset(range(len(tensors)))
            ours = outputs_and_grads(replace(op, constants=constants), call, tensors, options)
        except Exception:
            return lacks, lacks
    results = standard.judge(ours, Result(op.name, "", "", "", {}))

    def verdict(count: int) -> Verdict:
        wrong = [r for r in results[:count] if not r.ok]
        said = [f"{r.output}: error {r.error:.2e} > {r.allowed:.2e}" for r in wrong]
        pairs = zip(ours[:count], standard.truth, strict=False)
        return Verdict(max(largest_error(*pair) for pair in pairs), "; ".join(said))

    return verdict(standard.outputs), lacks or verdict(len(results))


def largest_error(ours: Tensor, truth: Tensor) -> float:
    """max|ours - truth|, of tokens or indices how many differ."""
    if ours.shape != truth.shape:
        return float("inf")
    if not truth.is_floating_point():
        return float((ours != truth).sum())
    differing = torch.where(ours == truth, 0.0, ours.to(truth.dtype) - truth)
    return float(differing.abs().nan_to_num(0.0).max()) if truth.numel() else 0.0


def thunk(
    op: Op, call: Callable[..., Any], tensors: Tensors, options: dict[str, Any], direction: str
) -> Call:
    """What is timed: a call, and for both directions the gradients of a random gradient."""
    if direction == "forward":
        return partial(call, *tensors, **options)
    wanted = gradient_inputs(op, tensors)
    leaves = [
        t.detach().clone().requires_grad_() if t is not None and i in wanted else t
        for i, t in enumerate(tensors)
    ]
    inputs = [t for i, t in enumerate(leaves) if i in wanted and t is not None]
    cotangents = [torch.randn_like(out) for out in _floating(call(*leaves, **options))]

    def both() -> object:
        outs = _floating(call(*leaves, **options))
        return outs, torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True)

    return both


def _floating(result: Any) -> list[Tensor]:
    outs = result if isinstance(result, tuple) else (result,)
    return [out for out in outs if out.is_floating_point() and out.requires_grad]


def cost_of(
    op: Op, tensors: Tensors, options: dict[str, Any], standard: Standard, direction: str
) -> dict[str, int | None]:
    """The bytes that must be moved and the flops that must be done, whoever does it.

    In both directions a floor: the incoming gradients are read and the outgoing ones written, and
    each matrix product has two in its backward. What a backward reads again is up to the kernel.
    """
    moved = int(op.bytes_moved(*tensors, **options))
    flops = None if op.flops is None else int(op.flops(*tensors, **options))
    if direction == "forward":
        return {"bytes": moved, "flops": flops}
    moved += sum(t.nbytes for t in standard.plain if t.is_floating_point())
    return {"bytes": moved, "flops": None if flops is None else 3 * flops}


def _line(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"

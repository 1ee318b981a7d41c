"""Plans: what a call comes to, kept for the next call with tensors of the same shapes.

An op takes longer to be called than to run, where rows are few: its arguments are checked, a
backend chosen, sizes are worked out. All that depends on the tensors by their devices, dtypes,
shapes and strides alone, and comes down to some allocations and some launches of kernels. So at the
second call with the same metadata the function is gone through with empty tensors in the place of
its own, and what it allocates and launches is written down and not done; from then on that is all
that is done. (On a CPU rms_norm of 4 x 768 takes 3.6 us by plan and 12.2 as written, torch's 7.7;
layer_norm 4.4 and 14.1, torch's 2.8; with cold caches rms_norm takes 48, 160, 74; one thread of AMD
Zen 5, 2026-11.)

It is gone through twice, with other tensors: a number that a kernel is given is an address where
it differs, and the tensor it belongs to must then be the same both times; or one of the ints that
the function says may vary, such as a seed. What does anything else than allocate, view and launch
kernels of Numba or CUDA C++ has no plan, and runs as written. On a GPU large tensors have none:
their kernels take longer than the call, and going through it would take their memory twice more.

Where a gradient is wanted the plan has two parts, of the call and of its backward, with one
`autograd.Function` around both. What the backward needs is saved, and the arguments.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from tilewise.choice import preference
from tilewise.op import is_batched, is_observed, transforming
from tilewise.plan_source import Plan, backward_source, forward_source, parameters_of
from tilewise.recording import Record, Unrecorded, has_saved_tensor_hooks, record_call

P = ParamSpec("P")
R = TypeVar("R")

Strides = tuple[tuple[int, ...] | None, ...]

KEPT = 4096  # plans, and calls seen once, of a function, before it begins anew
SAVED_BYTES = 1 << 16  # up to this, arguments are saved that only a second derivative needs

INT64 = range(-(2**63), 2**63)
GPU_BYTES = 1 << 26  # of a GPU's memory, up to which a tensor has a plan

PROBE = 0x5EED << 40  # no address, and no size

_NUMBERS = frozenset({int, float, bool, str, type(None)})


def planned(function: Callable[P, R], varying: Sequence[str] = ()) -> Callable[P, R]:
    """Let `function`, the public one of an op, be called by plan; by one for all ints that come as
    the options `varying`, which go to kernels and decide nothing."""
    plans: dict[tuple[Any, ...], Plan | None] = {}
    seen: set[tuple[Any, ...]] = set()

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if (
            torch.compiler.is_compiling()
            or is_observed()
            or transforming()
            or torch._C._is_any_autocast_enabled()
        ):
            return function(*args, **options)
        given: Any = (*args, *options.values()) if options else args
        key = [preference.names, preference.strict, len(args), *options]
        vary = [n for n in varying if type(options.get(n)) is int and options[n] in INT64]
        graded, saves = torch.is_grad_enabled(), False
        fixed: Any = given
        if vary:
            key += vary
            fixed = (*args, *(x for n, x in options.items() if n not in vary))
        for x in fixed:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if not x.is_cpu:
                    if not _is_planned_on_gpu(x):
                        return function(*args, **options)
                    key.append(x.get_device())
                wanted = graded and x.requires_grad
                saves |= wanted
                key += x.dtype, x.shape, x.stride(), wanted
            elif kind in _NUMBERS or (kind is tuple and all(type(n) in _NUMBERS for n in x)):
                key.append(x)
            else:
                return function(*args, **options)
        if saves and has_saved_tensor_hooks():
            return function(*args, **options)
        name = tuple(key)
        plan = plans.get(name)
        if plan is not None:
            return cast(R, plan(*given))
        if name not in plans:
            if name in seen:
                _make_room(plans)
                plans[name] = _plan_of(function, args, options, saves, vary)
            else:
                _make_room(seen)
                seen.add(name)
        return function(*args, **options)

    call.plans, call.seen = plans, seen  # type: ignore[attr-defined]
    return call


def _is_planned_on_gpu(x: Tensor) -> bool:
    """Whether it is on the GPU that kernels are launched on here, and not large."""
    is_here: bool = x.is_cuda and x.get_device() == torch._C._cuda_getDevice()
    return is_here and x.nbytes <= GPU_BYTES


def _make_room(kept: Any) -> None:
    if len(kept) >= KEPT:
        kept.clear()


def _plan_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: dict[str, Any],
    saves: bool,
    vary: Sequence[str],
) -> Plan | None:
    try:
        if saves:
            return None if vary else _Differentiated(function, args, options).plan()
        first, second = (_varied(function, args, options, vary, turn) for turn in range(2))
        source, returned = forward_source(first, second)
        source.count_writes()
        source.lines.append(f"return {source.listed(returned, first.several)}")
        return source.function(parameters_of([*args, *options.values()]))
    except Unrecorded:
        return None


def _varied(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: dict[str, Any],
    vary: Sequence[str],
    turn: int,
) -> Record:
    """A record of the call in which the ints that vary are numbers of their own in each turn."""
    names = parameters_of([*args, *options.values()])[len(args) :]
    written = dict(zip(options, names, strict=True))
    probes = {name: PROBE + 2 * i + turn for i, name in enumerate(vary)}
    record = record_call(function, args, options | probes)
    record.varying = {probe: written[name] for name, probe in probes.items()}
    return record


# --- With a gradient.


class _Differentiated:
    """The plan of a call whose gradient is wanted, and the plans of its backward, one for each way
    in which gradients come in: how they are strided, and None where there is none."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self.function, self.positional, self.names = function, len(args), list(options)
        arguments = [*args, *options.values()]
        self.parameters = parameters_of(arguments)
        self.options = [None if isinstance(x, Tensor) else x for x in arguments]
        first, second = self.records([x for x in arguments if isinstance(x, Tensor)], ())
        if first.writes:
            raise Unrecorded
        self.given = range(first.given)
        needed = backward_source(first, second)[0].used
        unneeded = {*self.given} - needed
        if sum(first.tensors[i].nbytes for i in unneeded) > SAVED_BYTES:
            raise Unrecorded
        self.saved = sorted({*self.given} | (needed & {*range(first.forward[0])}))
        self.layouts = [(y.shape, y.stride(), y.dtype, y.device) for y in first.results]
        self.usual = self._backward_plan(first, second)
        self.backwards: dict[Strides, Plan | None] = {}
        forward, results = forward_source(first, second, {*self.saved})
        forward.lines.append(f"ctx.save_for_backward({forward.listed(self.saved)})")
        if first.several:
            forward.lines.append("ctx.set_materialize_grads(False)")
        forward.lines.append(f"return {forward.listed(results, first.several)}")
        self.forward = forward.function(["ctx", *(f"x{i}" for i in self.given)])

    def plan(self) -> Plan:
        members = {"forward": staticmethod(self.forward), "backward": staticmethod(self.backward)}
        around: Any = type("Planned", (torch.autograd.Function,), members)
        scope = {"apply": around.apply}
        tensors = ", ".join(f"x{i}" for i in self.given)
        exec(f"def plan({', '.join(self.parameters)}): return apply({tensors})", scope)
        return cast(Plan, scope["plan"])

    def backward(self, ctx: Any, *incoming: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or is_observed()
            or transforming()
            or any(map(is_batched, incoming))
        ):
            return self._as_written(tensors[: len(self.given)], incoming)
        came = tuple(None if dy is None else dy.stride() for dy in incoming)
        plan = self.backwards.get(came)
        if plan is None:
            if came not in self.backwards:
                _make_room(self.backwards)
                self.backwards[came] = self._backward_plan_of(tensors, came)
            plan = self.backwards[came]
            if plan is None:
                plan, incoming = self.usual, self._laid_out(incoming)
        return plan(*tensors, *(dy for dy in incoming if dy is not None))

    def _call(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and options, with these tensors."""
        following = iter(tensors)
        values = [
            next(following) if name.startswith("x") else option
            for name, option in zip(self.parameters, self.options, strict=True)
        ]
        return values[: self.positional], dict(
            zip(self.names, values[self.positional :], strict=True)
        )

    def records(self, tensors: Sequence[Tensor], came: Strides) -> tuple[Record, Record]:
        args, options = self._call(tensors)
        first, second = (record_call(self.function, args, options, came) for _ in range(2))
        return first, second

    def _backward_plan(self, first: Record, second: Record) -> Plan:
        source, gradients = backward_source(first, second)
        if not source.used & {*range(first.forward[0])} <= {*self.saved}:
            raise Unrecorded
        source.lines.append(f"return {source.listed(gradients)}")
        came = range(first.forward[0], first.forward[0] + first.came)
        return source.function([f"x{i}" for i in (*self.saved, *came)])

    def _backward_plan_of(self, tensors: Sequence[Tensor], came: Strides) -> Plan | None:
        try:
            return self._backward_plan(*self.records(tensors[: len(self.given)], came))
        except Unrecorded:
            return None

    def _laid_out(self, incoming: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """As the results are, zero where none came."""
        laid_out = []
        for dy, (shape, stride, dtype, device) in zip(incoming, self.layouts, strict=True):
            laid_out.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            laid_out[-1].copy_(dy) if dy is not None else laid_out[-1].zero_()
        return tuple(laid_out)

    def _as_written(self, tensors: Sequence[Tensor], incoming: Sequence[Tensor | None]) -> Any:
        """The gradients by the function as it is written, which may be differentiated again."""
        args, options = self._call(tensors)
        with torch.enable_grad():
            results = self.function(*args, **options)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(y, dy) for y, dy in zip(results, incoming, strict=True) if dy is not None]
        wanted = [x for x in tensors if x.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [dy for _, dy in pairs],
                create_graph=torch.is_grad_enabled(), allow_unused=True,
            )
        )  # fmt: skip
        return tuple(next(found) if x.requires_grad else None for x in tensors)

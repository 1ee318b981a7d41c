"""Plans: what a call comes to, kept for the next call with tensors of the same shapes.

An op takes longer to be called than to run, where rows are few: its arguments are checked, a
backend chosen, sizes are worked out. All that depends on the tensors by their dtypes, shapes and
strides alone, and comes down to some allocations and some launches of kernels. So at the second
call with the same metadata the function is gone through with empty tensors in the place of its
own, and what it allocates and launches is written down and not done; from then on that is all that
is done. (rms_norm of 4 x 768 takes 3.6 us by plan and 12.2 as written, torch's 7.7; layer_norm 4.4
and 14.1, torch's 2.8; with cold caches rms_norm takes 48, 160, 74; one thread of AMD Zen 5,
2026-11.)

It is gone through twice, with other tensors: a number that a kernel is given is an address where
it differs, and the tensor it belongs to must then be the same both times; or one of the ints that
the function says may vary, such as a seed. What does anything else than allocate, view and launch
kernels of the CPU has no plan, and runs as written.

Where a gradient is wanted the plan has two parts, of the call and of its backward, with one
`autograd.Function` around both. What the backward needs is saved, and the arguments.
"""

import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from tilewise.choice import preference
from tilewise.op import is_batched, is_observed, transforming
from tilewise.recording import Record, Unrecorded, has_saved_tensor_hooks, record_call

P = ParamSpec("P")
R = TypeVar("R")

Plan = Callable[..., Any]
Strides = tuple[tuple[int, ...] | None, ...]

KEPT = 4096  # plans, and calls seen once, of a function, before it begins anew
SCRATCH_BYTES = 1 << 16  # up to this, what a plan only writes to is kept, one a thread
SAVED_BYTES = 1 << 16  # up to this, arguments are saved that only a second derivative needs

INT64 = range(-(2**63), 2**63)
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
                    return function(*args, **options)
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
        source, returned = _forward(first, second)
        source.lines.append(f"return {source.listed(returned, first.several)}")
        return source.function(_parameters([*args, *options.values()]))
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
    written = dict(zip(options, _parameters([*args, *options.values()])[len(args) :], strict=True))
    probes = {name: PROBE + 2 * i + turn for i, name in enumerate(vary)}
    record = record_call(function, args, options | probes)
    record.varying = {probe: written[name] for name, probe in probes.items()}
    return record


# --- From two records to a plan.


def _forward(
    first: Record, second: Record, kept: AbstractSet[int] = frozenset()
) -> tuple["_Source", list[int | None]]:
    """What is done of a call without its backward, and the numbers of its results."""
    tensors, launches = first.forward
    source = _Source(first, second, range(first.given, tensors), range(launches), kept)
    return source, source.go_through(first.results)


def _backward(first: Record, second: Record) -> tuple["_Source", list[int | None]]:
    """What is done of its backward, and the numbers of the gradients."""
    tensors, launches = first.forward
    source = _Source(
        first, second, range(tensors + first.came, len(first.tensors)),
        range(launches, len(first.launches)),
    )  # fmt: skip
    return source, source.go_through(first.gradients)


def _parameters(arguments: Sequence[Any]) -> list[str]:
    """Names of arguments, those of tensors as they are numbered."""
    numbers = count()
    return [
        f"x{next(numbers)}" if isinstance(argument, Tensor) else f"option{i}"
        for i, argument in enumerate(arguments)
    ]


class _Source:
    """A plan as Python would be written by hand, 1.9 us instead of 3.8 for a loop over what there
    is to do: of the tensors and launches that lie in `tensors` and `launches`."""

    def __init__(
        self,
        first: Record,
        second: Record,
        tensors: range,
        launches: range,
        kept: AbstractSet[int] = frozenset(),
    ) -> None:
        if len(first.launches) != len(second.launches) or not launches:
            raise Unrecorded
        self.first, self.second, self.kept = first, second, kept
        self.tensors, self.launches = tensors, launches
        self.scope: dict[str, Any] = {"empty": torch.empty_strided, "scratch": _Scratch()}
        self.lines: list[str] = []
        self.used: set[int] = set()  # tensors whose addresses kernels are given

    def go_through(self, results: Sequence[Tensor | None]) -> list[int | None]:
        """Allocate and launch; the numbers of the results."""
        returned = [None if y is None else self.first.place(y, self.tensors.start) for y in results]
        shaped: dict[int, Tensor] = {}
        for number, y in zip(returned, results, strict=True):
            if number is not None and y is not None:
                like = shaped.setdefault(number, y)
                if (like.shape, like.stride()) != (y.shape, y.stride()):
                    raise Unrecorded
        for i in self.tensors:
            x = shaped.get(i, self.first.tensors[i])
            self.scope[f"dtype{i}"] = x.dtype
            new = f"empty({tuple(x.shape)}, {x.stride()}, dtype=dtype{i})"
            if i in shaped or i in self.kept or x.nbytes > SCRATCH_BYTES:
                self.lines.append(f"x{i} = {new}")
            else:
                self.lines.append(f"x{i} = scratch.get({i})")
                self.lines.append(f"if x{i} is None: x{i} = scratch[{i}] = {new}")
        for i in self.launches:
            kernel, tasks, elements, arguments = self.first.launches[i]
            if self.first.launches[i][:3] != self.second.launches[i][:3]:
                raise Unrecorded
            written = self._written(arguments, self.second.launches[i][3])
            self.scope[f"launch{i}"], *leading = kernel.launcher(tasks, elements, arguments)
            self.lines.append(f"launch{i}(" + ", ".join([*map(str, leading), written]) + ")")
        return returned

    def listed(self, numbers: Sequence[int | None], several: bool = True) -> str:
        names = ("None" if i is None else f"x{i}" for i in numbers)
        return ", ".join(names) + ("," if several else "")

    def function(self, parameters: Sequence[str]) -> Plan:
        head = f"def plan({', '.join(parameters)}):\n"
        exec(head + "".join(f"    {line}\n" for line in self.lines), self.scope)
        return cast(Plan, self.scope["plan"])

    def _written(self, one: Any, other: Any) -> str:
        """An argument of a launch as source: an address as that of the tensor it belongs to."""
        if type(one) is not type(other):
            raise Unrecorded
        if isinstance(one, tuple):
            items = zip(one, other, strict=True)
            return "".join(["(", *(self._written(*pair) + ", " for pair in items), ")"])
        if one == other or one != one:  # NaN
            name = f"constant{len(self.scope)}"
            self.scope[name] = one
            return repr(one) if type(one) in (int, bool, type(None)) else name
        if one in self.first.varying:
            if self.first.varying[one] != self.second.varying.get(other):
                raise Unrecorded
            return self.first.varying[one]
        number, shift = self.first.owner(one)
        if (number, shift) != self.second.owner(other):
            raise Unrecorded
        self.used.add(number)
        address = f"x{number}.data_ptr()"
        return f"{address} + {shift}" if shift else address


class _Scratch(threading.local):
    """What the calls of one thread write to and nobody reads afterwards."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.get = self.kept.get

    def __setitem__(self, i: int, x: Tensor) -> None:
        self.kept[i] = x


# --- With a gradient.


class _Differentiated:
    """The plan of a call whose gradient is wanted, and the plans of its backward, one for each way
    in which gradients come in: how they are strided, and None where there is none."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self.function, self.positional, self.names = function, len(args), list(options)
        arguments = [*args, *options.values()]
        self.parameters = _parameters(arguments)
        self.options = [None if isinstance(x, Tensor) else x for x in arguments]
        first, second = self.records([x for x in arguments if isinstance(x, Tensor)], ())
        self.given = range(first.given)
        needed = _backward(first, second)[0].used
        unneeded = {*self.given} - needed
        if sum(first.tensors[i].nbytes for i in unneeded) > SAVED_BYTES:
            raise Unrecorded
        self.saved = sorted({*self.given} | (needed & {*range(first.forward[0])}))
        self.layouts = [(y.shape, y.stride(), y.dtype) for y in first.results]
        self.usual = self._backward_plan(first, second)
        self.backwards: dict[Strides, Plan | None] = {}
        forward, results = _forward(first, second, {*self.saved})
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
        source, gradients = _backward(first, second)
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
        for dy, (shape, stride, dtype) in zip(incoming, self.layouts, strict=True):
            laid_out.append(torch.empty_strided(shape, stride, dtype=dtype))
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

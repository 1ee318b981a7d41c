"""From two records of a call to a plan: what it allocates and launches, as Python."""

import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from tilewise.op import count_write
from tilewise.recording import ZERO, Record, Unrecorded

Plan = Callable[..., Any]

SCRATCH_BYTES = 1 << 16  # up to this, what a plan only writes to is kept, one a thread


def forward_source(
    first: Record, second: Record, kept: AbstractSet[int] = frozenset()
) -> tuple["Source", list[int | None]]:
    """What is done of a call without its backward, and the numbers of its results."""
    tensors, launches = first.forward
    source = Source(first, second, range(first.given, tensors), range(launches), kept)
    return source, source.go_through(first.results)


def backward_source(first: Record, second: Record) -> tuple["Source", list[int | None]]:
    """What is done of its backward, and the numbers of the gradients."""
    tensors, launches = first.forward
    source = Source(
        first, second, range(tensors + first.came, len(first.tensors)),
        range(launches, len(first.launches)),
    )  # fmt: skip
    return source, source.go_through(first.gradients)


def parameters_of(arguments: Sequence[Any]) -> list[str]:
    """Names of arguments, those of tensors as they are numbered."""
    numbers = count()
    return [
        f"x{next(numbers)}" if isinstance(argument, Tensor) else f"option{i}"
        for i, argument in enumerate(arguments)
    ]


class Source:
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
        self.place, self.stream, where = _where(first.tensors[0].device)
        self.scope |= where

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
            new = f"empty({tuple(x.shape)}, {x.stride()}, dtype=dtype{i}{self.place})"
            if i in shaped or i in self.kept or not x.is_cpu or x.nbytes > SCRATCH_BYTES:
                self.lines.append(f"x{i} = {new}")
            else:
                self.lines.append(f"x{i} = scratch.get({i})")
                self.lines.append(f"if x{i} is None: x{i} = scratch[{i}] = {new}")
        for i in self.launches:
            self.lines.append(self._launch(i))
        return returned

    def _launch(self, i: int) -> str:
        kernel, tasks, elements, arguments = self.first.launches[i]
        if self.second.launches[i][:3] != (kernel, tasks, elements):
            raise Unrecorded
        if kernel is ZERO and self.place:
            return f"x{self.first.owner(arguments[0])[0]}.zero_()"
        written = self._written(arguments, self.second.launches[i][3])
        self.scope[f"launch{i}"], *leading = kernel.launcher(tasks, elements, arguments)
        if kernel.on_stream:
            return f"launch{i}({written[1:-1]}{self.stream})"
        return f"launch{i}(" + ", ".join([*map(str, leading), written]) + ")"

    def count_writes(self) -> None:
        """As the op does, so that autograd sees what of the given is written over."""
        self.scope["count_write"] = count_write
        for x in self.first.writes:
            number, _ = self.first.owner(x.data_ptr())
            if number >= self.first.given:
                raise Unrecorded
            self.lines.append(f"count_write(x{number})")

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


def _where(device: torch.device) -> tuple[str, str, dict[str, Any]]:
    """As source, where memory is allocated and on which stream launched, and what that names."""
    if device.type == "cpu":
        return "", "0", {}
    names = {"device": device, "stream": torch._C._cuda_getCurrentRawStream}
    return ", device=device", f"stream({device.index})", names


class _Scratch(threading.local):
    """What the calls of one thread write to and nobody reads afterwards."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.get = self.kept.get

    def __setitem__(self, i: int, x: Tensor) -> None:
        self.kept[i] = x

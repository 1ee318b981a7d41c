"""Going through a function with empty tensors, and writing down what it does and not doing it."""

from collections.abc import Callable, Sequence
from ctypes import memset
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewise.recorder import Recorder


class Unrecorded(Exception):
    """It does something else than allocate, view and launch kernels of Numba and CUDA C++."""


@dataclass
class Record(Recorder):
    """Tensors by number, first those that are given; launches of kernels; what is returned.

    What is numbered or launched from `forward` on belongs to the backward; there `came` gradients
    are given first.
    """

    tensors: list[Tensor] = field(default_factory=list)
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()
    several: bool = False
    given: int = 0
    forward: tuple[int, int] = (0, 0)
    came: int = 0
    gradients: tuple[Tensor | None, ...] = ()
    varying: dict[int, str] = field(default_factory=dict)  # ints that were given, and their names

    backends = frozenset({"cuda", "numba"})

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        allocates = op.overloadpacket in _ALLOCATIONS
        zeros = op.overloadpacket in _ZEROS
        if not (allocates or zeros or _is_view(op)):
            raise Unrecorded(op)
        out: Tensor = op(*args, **(kwargs or {}))
        if allocates or (zeros and op.overloadpacket is not _ATEN.zero_):
            self.tensors.append(out)
        if zeros:
            if out.nbytes != out.untyped_storage().nbytes():
                raise Unrecorded(op)
            self.launches.append((ZERO, 1, out.numel(), (out.data_ptr(), out.nbytes)))
        return out

    def stand_in(self, shape: Sequence[int], stride: Sequence[int], like: Tensor) -> Tensor:
        """A tensor that is given."""
        x = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        self.tensors.append(x)
        return self.tensors[-1]

    def owner(self, address: int) -> tuple[int, int]:
        """Which tensor's memory it is in, and how far from the beginning."""
        for number, x in enumerate(self.tensors):
            start = x.untyped_storage().data_ptr()
            if start <= address < start + x.untyped_storage().nbytes():
                return number, address - x.data_ptr()
        raise Unrecorded

    def place(self, result: Tensor, first: int) -> int:
        """Which of the tensors made from `first` on is returned, whole, in whatever shape."""
        for number, x in enumerate(self.tensors[first:], first):
            if not isinstance(result, Tensor) or result.data_ptr() != x.data_ptr():
                continue
            if result.nbytes == x.nbytes == x.untyped_storage().nbytes():
                return number
        raise Unrecorded


_ATEN = torch.ops.aten
_ALLOCATIONS = frozenset(
    {_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.empty_strided, _ATEN.new_empty_strided,
     _ATEN.empty_permuted}
)  # fmt: skip
_ZEROS = frozenset({_ATEN.zero_, _ATEN.zeros, _ATEN.zeros_like, _ATEN.new_zeros})


class _Zero:
    """A launch that fills memory of the CPU with zeros, as the kernels' are written down."""

    on_stream = False

    def launcher(self, tasks: int, elements: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_fill_with_zeros,)


ZERO = _Zero()


def _fill_with_zeros(args: tuple[int, int]) -> None:
    memset(args[0], 0, args[1])


def _is_view(op: Any) -> bool:
    """Whether all that it returns is memory of its arguments, which it does not write to."""
    returned = [r.alias_info for r in op._schema.returns]
    return bool(returned) and all(a is not None and not a.is_write for a in returned)


def record_call(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: dict[str, Any],
    incoming: Sequence[Sequence[int] | None] | None = None,
) -> Record:
    """Go through `function` with new tensors in the place of its own.

    `incoming`: through its backward too, for gradients of the results that are so strided; None
    stands for one that does not come; empty: all come, strided as the results are.
    """
    record, leaves = Record(), []

    def stand_in(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        x = record.stand_in(argument.shape, argument.stride(), argument)
        leaves.append(x)
        return x.requires_grad_(argument.requires_grad and incoming is not None)

    args, options = [stand_in(a) for a in args], {n: stand_in(a) for n, a in options.items()}
    record.given = len(leaves)
    with torch.set_grad_enabled(incoming is not None), record:
        results = function(*args, **options)
    record.several = isinstance(results, tuple)
    record.results = results if record.several else (results,)
    record.forward = len(record.tensors), len(record.launches)
    if incoming is not None:
        _go_back(record, leaves, incoming)
    return record


def _go_back(record: Record, leaves: Sequence[Tensor], incoming: Sequence[Any]) -> None:
    if not all(isinstance(y, Tensor) and y.requires_grad for y in record.results):
        raise Unrecorded
    strides = incoming or [y.stride() for y in record.results]
    pairs = [(y, s) for y, s in zip(record.results, strides, strict=True) if s is not None]
    given = [record.stand_in(y.shape, stride, y) for y, stride in pairs]
    record.came = len(given)
    wanted = [x for x in leaves if x.requires_grad]
    with record:
        found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, given, allow_unused=True))
    record.gradients = tuple(next(found) if x.requires_grad else None for x in leaves)


def has_saved_tensor_hooks() -> bool:
    """Whether somebody looks at what autograd saves, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

"""Where launches of kernels are noted down, while they are not to be done.

Whoever launches kernels asks for the `recorder`; plans are made from what it has noted.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = tuple[Any, ...]


class Recorder(TorchDispatchMode):
    """A mode under which no kernel of `backends` runs: what was to be launched is in `launches`, as
    the launcher, the number of tasks, that of elements they touch, and the arguments; what is given
    and written to is in `writes`."""

    backends: frozenset[str] = frozenset()
    launches: list[tuple[Any, int, int, Arguments]]
    writes: list[Tensor]


def recorder() -> Recorder | None:
    """The one that is the innermost mode, in this thread or in that which called backward."""
    depth = torch._C._len_torch_dispatch_stack()
    mode = torch._C._get_dispatch_stack_at(depth - 1) if depth else None
    return mode if isinstance(mode, Recorder) else None


class Launcher:
    """One of `tilewise._cuda`; its last argument is the stream, which belongs to no plan."""

    on_stream = True

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch = launch
        self.__doc__ = launch.__doc__

    def __call__(self, *args: Any) -> None:
        noting = recorder()
        if noting is None:
            self.launch(*args)
        else:
            noting.launches.append((self, 1, 0, args[:-1]))

    def launcher(self, tasks: int, elements: int, args: Arguments) -> tuple[Any, ...]:
        return (self.launch,)


def make_notable(module: ModuleType) -> None:
    """Let the launches of a compiled module be noted down."""
    for name in module.launchers:
        setattr(module, name, Launcher(getattr(module, name)))

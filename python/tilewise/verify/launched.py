"""Kernels that a GPU ran, beside what the same launches compile to ahead of time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from tilewise.op import Op, Size
from tilewise.verify.ahead_of_time import backend_calls, call, compiling_only
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel, inspect


@dataclass(frozen=True)
class Pair:
    """One launch: what was compiled ahead of time, and what the driver says of what it ran.

    Attributes:
        ahead: The row of the report.
        kernel: Name of the function that ran.
        registers: A thread's.
        spills: Local memory of a thread, in words.
        shared: Bytes of shared memory of a block.
        same_code: Whether both are the same machine code.
    """

    ahead: Kernel
    kernel: str
    registers: int
    spills: int
    shared: int
    same_code: bool

    @property
    def differences(self) -> list[str]:
        """What ran otherwise than the report says."""
        spills = bool(self.ahead.spill_loads or self.ahead.spill_stores)
        pairs = {
            "kernel": (self.kernel, self.ahead.kernel),
            "registers": (self.registers, self.ahead.registers),
            "shared": (self.shared, self.ahead.shared),
            "spills": (bool(self.spills), spills),
        }
        return [
            f"{name} must be {foretold}, got {ran}"
            for name, (ran, foretold) in pairs.items()
            if ran != foretold
        ]


def architecture_here() -> str | None:
    """The architecture of this machine's GPU, if the report knows it."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    return name if name in ARCHITECTURES else None


@contextmanager
def _collecting() -> Iterator[list[Any]]:
    """The compiled kernels that are launched within the block."""
    from triton.runtime import jit

    launched: list[Any] = []
    run: Callable[..., Any] = jit.JITFunction.run

    def collect(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        launched.append(kernel)
        return kernel

    jit.JITFunction.run = collect
    try:
        yield launched
    finally:
        jit.JITFunction.run = run


def launch_and_compile(
    op: Op, dtype: torch.dtype, size: Size, architecture: str, device: str = "cuda"
) -> list[Pair]:
    """Run `op` with its Triton backend, compile the same launches ahead of time, and pair them.

    Raises:
        RuntimeError: If there were not as many launches as were foretold.
    """
    with _collecting() as ran:
        call(op, "triton", dtype, size, device)
    module = import_module(op.backends["triton"].module)
    with compiling_only(ARCHITECTURES[architecture]) as ahead:
        for name, args in backend_calls(op, "triton", dtype, size):
            getattr(module, name)(*args)
    if len(ran) != len(ahead):
        raise RuntimeError(
            f"launched: {op.name} must launch {len(ahead)} kernels for {dict(size)}, got {len(ran)}"
        )
    word = str(dtype).removeprefix("torch.")
    pairs = []
    for place, (kernel, launch) in enumerate(zip(ran, ahead, strict=True)):
        about = {"op": op.name, "dtype": word, "size": dict(size), "launch": place}
        row = inspect(launch, ARCHITECTURES[architecture], **about)
        same = kernel.asm.get("cubin") == launch.compiled.asm.get("cubin")
        pairs.append(Pair(row, *_of_the_driver(kernel), same))
    return pairs


def _of_the_driver(kernel: Any) -> tuple[str, int, int, int]:
    return kernel.metadata.name, kernel.n_regs, kernel.n_spills, kernel.metadata.shared


def summary(pairs: Sequence[Pair]) -> str:
    """In one line."""
    differ, same = sum(bool(pair.differences) for pair in pairs), sum(p.same_code for p in pairs)
    return (
        f"{len(pairs)} launches, {differ} otherwise than compiled ahead of time, "
        f"{same} the same machine code"
    )

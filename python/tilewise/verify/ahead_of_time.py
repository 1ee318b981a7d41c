"""Triton kernels compiled ahead of time, for a GPU that is not there.

Every configuration goes through its real launch path: the op is called on fake tensors, what it
asks of its backend is recorded, and the kernel's own launcher runs on meta tensors under a driver
that names the target but never launches. So the specialisation is the one a launch would have.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise.op import CPU, INTERPRETED, Op, Size

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one configuration.

    Attributes:
        kernel: Name of the Triton function.
        registers: A thread's.
        spills: Loads and stores of local memory, in instructions.
        shared: Bytes of shared memory a block.
        warps: Warps a block.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    warps: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tilewise":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


def backend_calls(
    op: Op, backend: str, dtype: torch.dtype, size: Size
) -> list[tuple[str, tuple[Any, ...]]]:
    """What `op` asks of `backend`, forward and backward: names and arguments, on meta tensors."""
    present, recorder = op.backends, _Recorder()
    offered = {name: replace(b, devices=CPU) for name, b in present.items()}
    object.__setattr__(op, "backends", offered)  # the op must not say that it runs on cuda alone
    try:
        with FakeTensorMode(), recorder:
            tensors, options = op.inputs(**size, device="cpu", dtype=dtype)
            leaves = [
                t if t is None or not t.is_floating_point() or i in op.constants
                else t.requires_grad_()
                for i, t in enumerate(tensors)
            ]  # fmt: skip
            result = op.call(*leaves, **options, backend=backend)
            outs = result if isinstance(result, tuple) else (result,)
            loss = [out.sum() for out in outs if out.requires_grad]
            if loss:
                torch.stack(loss).sum().backward()
    finally:
        object.__setattr__(op, "backends", present)
    return [(name, tuple(map(_on_meta, args[:-1]))) for name, args in recorder.calls]


def _on_meta(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device="meta"
    )


class _OfflineDriver:
    """Just enough of a driver for a launch that stops after compiling."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device: one for each target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def is_active(self) -> bool:
        return True


@contextmanager
def _compiling_only(architecture: int) -> Iterator[list[Any]]:
    """Within the block a launch compiles for `architecture`, and the list gets what came of it."""
    from triton.runtime import driver, jit

    compiled: list[Any] = []
    run: Callable[..., Any] = jit.JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    before = driver._active  # not driver.active, which looks for a GPU
    driver.set_active(_OfflineDriver(architecture))
    jit.JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        jit.JITFunction.run = run
        driver._active = before


def compile_triton(op: Op, dtype: torch.dtype, size: Size, architecture: int) -> list[Compiled]:
    """Compile every Triton kernel that `op` launches for this size, forward and backward.

    Raises:
        RuntimeError: In a process where Triton interprets, or if there is nothing to launch.
    """
    if INTERPRETED:
        raise RuntimeError("compile_triton: TRITON_INTERPRET must be off, got on")
    module = import_module(op.backends["triton"].module)
    calls = backend_calls(op, "triton", dtype, size)
    if not calls:
        raise RuntimeError(f"compile_triton: {op.name} must launch something, got {size}")
    with _compiling_only(architecture) as kernels:
        for name, args in calls:
            getattr(module, name)(*args)
    return [_inspect(kernel) for kernel in kernels]


def _inspect(kernel: Any) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Compiled(
        kernel=kernel.metadata.name,
        registers=int(registers.group(1)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
    )


def _output(*command: Any) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return run.stdout + run.stderr

"""Triton kernels compiled ahead of time, for a GPU that is not there.

Every configuration goes through its real launch path: the op is called on fake tensors, what it
asks of its backend is recorded, and the kernel's own launcher runs on meta tensors under a driver
that names the target but never launches. So the specialisation is the one a launch would have.
"""

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise.op import CPU, Op, Size
from tilewise.verify.architectures import Architecture

Call = tuple[str, tuple[Any, ...]]
Options = Mapping[str, Any]

# What a row is made by: a change of these makes every one that was kept out of date.
READERS = ("architectures.py", "disassembly.py", "kernel.py")

FEW = 2  # sizes

_DEVICES = count(1000)


# --- What an op asks of its backend.


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tilewise":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


def backend_calls(op: Op, backend: str, dtype: torch.dtype, size: Size) -> list[Call]:
    """What `op` asks of `backend`, forward and backward: names and arguments, on meta tensors.

    Nothing where the backend refuses.
    """
    present, recorder = op.backends, _Recorder()
    offered = {name: replace(b, devices=CPU) for name, b in present.items()}
    object.__setattr__(op, "backends", offered)  # the op must not say that it runs on cuda alone
    try:
        with FakeTensorMode(), recorder:
            tensors, options = op.inputs(**size, device="cpu", dtype=dtype)
            if present[backend].refuses(*tensors, **options):
                return []
            call(op, backend, dtype, size, "cpu")
    finally:
        object.__setattr__(op, "backends", present)
    return [(name, tuple(map(_on_meta, args[:-1]))) for name, args in recorder.calls]


def call(op: Op, backend: str, dtype: torch.dtype, size: Size, device: str) -> None:
    """Call `op` on its inputs of this size, forward and backward."""
    tensors, options = op.inputs(**size, device=device, dtype=dtype)
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


def _on_meta(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device="meta"
    )


def sizes_to_launch(op: Op) -> list[Size]:
    """The declared sizes with something to launch: those checked, and those timed."""
    timed = (*op.workloads, *op.gpu_workloads)
    return [size for size in (*op.sizes, *timed) if 0 not in size.values()]


def few_sizes(op: Op) -> list[Size]:
    """Of those checked only the first, and those timed: a third of all kernels."""
    return [*sizes_to_launch(op)[:FEW], *op.workloads, *op.gpu_workloads]


# --- Launches that only compile.


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: Name of the function.
        identity: The same for launches that share machine code, of all that it depends on.
        options: Its constants, warps and stages.
        compiled: What the compiler made of it; None where it was told not to compile.
        log: What ptxas said.
    """

    kernel: str
    identity: str
    options: Options
    compiled: Any = None
    log: str = ""


class _OfflineDriver:
    """Just enough of a driver for a launch that stops after compiling."""

    def __init__(self, architecture: Architecture) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        self.target = GPUTarget(architecture.backend, architecture.number, architecture.warp)
        self.device = next(_DEVICES)  # compiled kernels are kept by device: start afresh

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        number = self.architecture.number
        return divmod(number, 10) if isinstance(number, int) else (9, 4)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def is_active(self) -> bool:
        return True


@cache
def _versions() -> str:
    """Of all but the kernel's own source: triton, and how its output is read."""
    import triton

    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in READERS))
    return f"{triton.__version__} {digest.hexdigest()}"


@contextmanager
def compiling_only(
    architecture: Architecture,
    wanted: Callable[[int], bool] = lambda place: True,
    instead: Mapping[str, Options] | None = None,
) -> Iterator[list[Launch]]:
    """Within the block launches compile for `architecture` and do no more; the list gets them.

    Args:
        architecture: For what to compile.
        wanted: Whether to compile the launch of this place, counted from 0.
        instead: Options to take instead of the launcher's own, by the kernel's name.
    """
    from triton import knobs
    from triton.runtime import driver, jit

    launch_options = import_module("tilewise.kernels.triton._shared").launch_options
    launches: list[Launch] = []
    run: Callable[..., Any] = jit.JITFunction.run
    about: dict[str, Any] = {}

    def skip(*, compile: Any, **rest: Any) -> bool:
        about.update(compile)
        return not wanted(len(launches))

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name, log = self.fn.__name__, io.StringIO()
        about.clear()
        with redirect_stdout(log):
            other = dict((instead or {}).get(name, {}))
            if "maxnreg" in kwargs and "num_warps" in other:
                other |= launch_options(other["num_warps"])
            options = kwargs | other
            if architecture.backend != "cuda":  # the others know no such limit
                options.pop("maxnreg", None)
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not about:  # compiled before, in this block
            first = next(one for one in launches if one.compiled is kernel)
            launches.append(first)
            return kernel
        text = f"{_versions()} {self.cache_key} {about['key']} {active.target}"
        identity = hashlib.sha256(text.encode()).hexdigest()[:32]
        launches.append(Launch(name, identity, _options(self, about), kernel, log.getvalue()))
        return kernel

    before, active = driver._active, _OfflineDriver(architecture)  # not driver.active: needs a GPU
    with ExitStack() as stack:
        for part in (knobs.runtime, knobs.nvidia, knobs.compilation, knobs.cache):
            stack.enter_context(part.scope())
        knobs.runtime.jit_cache_hook = skip
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what is found compiled has no log
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        driver.set_active(active)
        jit.JITFunction.run = warm_up
        try:
            yield launches
        finally:
            jit.JITFunction.run = run
            driver._active = before


def _options(function: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that are options, not arguments Triton found to be 1 or None."""
    names = {p.name for p in function.params if p.is_constexpr}
    constants = {function.arg_names[path[0]]: value for path, value in about["constants"].items()}
    plain = (bool, int, float, str, type(None))  # what JSON takes; else, say, a dtype
    found = {
        name: value if isinstance(value, plain) else str(value)
        for name, value in constants.items()
        if name in names
    }
    return found | {"num_warps": about["num_warps"], "num_stages": about["num_stages"]}

"""What an op is: one record from which choice, checks, tests, benchmarks and docs are read."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from tilewise import native
from tilewise.recorder import recorder

Size = Mapping[str, Any]
Tensors = tuple[Tensor | None, ...]
Inputs = tuple[Tensors, dict[str, Any]]

HALVES = frozenset({torch.float16, torch.bfloat16})
FLOATS = HALVES | {torch.float32}
CPU_FLOATS = FLOATS | {torch.float64}
CUDA = frozenset({"cuda"})
CPU = frozenset({"cpu"})
CUDA_DEVICES = CPU if native.EMULATED else CUDA


def interpreting() -> bool:
    """Whether Triton interprets what is decorated from here on, as it reads the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


INTERPRETED = interpreting()
TRITON_DEVICES = frozenset({"cuda", "cpu"}) if INTERPRETED else CUDA


def stand_in(backend: str) -> str | None:
    """How a CPU does a GPU's work: "interpreted" Triton, "emulated" CUDA; None if it does not."""
    if backend == "triton" and INTERPRETED:
        return "interpreted"
    return "emulated" if backend == "cuda" and native.EMULATED else None


def takes_all(*tensors: Tensor | None, **options: Any) -> None:
    """What `refuses` and `declines` nothing."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        module: Import path of the module that holds `<op>_forward` and `<op>_backward`.
        needs: Importable module without which this backend is absent.
        devices: Torch device types it runs on.
        dtypes: Dtypes it accepts for the first tensor of floating point.
        refuses: Given the op's tensors and options, what it cannot do about them, or None.
        declines: Given the same, why another backend is faster, or None: only the automatic choice
            heeds it.
        leading: Which tensor has the device and the dtype: the first, unless indices come first.
    """

    module: str
    needs: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    refuses: Callable[..., str | None] = takes_all
    declines: Callable[..., str | None] = takes_all
    leading: int = 0


@dataclass(frozen=True)
class Op:
    """An op, declared once.

    Attributes:
        name: The word for this op in every room: file, symbol, test id, benchmark row.
        call: The public function.
        reference: The same function in plain, differentiable PyTorch. It is the specification.
        backends: Implementations by name, best first.
        inputs: Builds `(tensors, options)` for a size, on a device, in a dtype.
        sizes: Sizes where kernels go wrong; checked by the tests.
        workloads: Sizes worth the clock; timed by the benchmarks.
        bytes_moved: Bytes one forward must move, given tensors and options, for the roofline.
        flops: Floating-point operations of one forward that a matrix product would count.
        native: PyTorch's own function on the same arguments, where there is one.
        constants: Positions of the tensors that have no gradient.
        gpu_workloads: Those of a GPU's own, too large for a CPU; there they come first.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    backends: Mapping[str, Backend]
    inputs: Callable[..., Inputs]
    sizes: Sequence[Size]
    workloads: Sequence[Size]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int] | None = None
    native: Callable[..., Any] | None = None
    constants: frozenset[int] = frozenset()
    gpu_workloads: Sequence[Size] = ()
    leading: int = field(init=False)  # which tensor has the device and the dtype, as its backends

    def __post_init__(self) -> None:
        object.__setattr__(self, "leading", next(iter(self.backends.values())).leading)

    def timed_on(self, device: str) -> list[Size]:
        """The sizes worth the clock of a "cpu" or "cuda", the most important first."""
        return [*(self.gpu_workloads if device == "cuda" else ()), *self.workloads]


OPS: dict[str, Op] = {}


def declare(op: Op) -> Op:
    """Enter an op in the table that checks, tests, benchmarks and docs iterate over."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is declared twice")
    OPS[op.name] = op
    return op


def backends_of(
    op: str,
    *,
    cuda: Callable[..., str | None] | None = None,
    numba: Callable[..., str | None] | None = None,
    triton: Callable[..., str | None] | None = None,
    leading: int = 0,
    cuda_dtypes: frozenset[torch.dtype] = FLOATS,
) -> dict[str, Backend]:
    """The backends of an op by the house's rule, in the automatic order: cuda, numba, triton.

    Each argument is that backend's `refuses`; None means the op has no such kernel.
    """
    table = {
        "cuda": (cuda, native.MODULE, CUDA_DEVICES, cuda_dtypes),
        "numba": (numba, "numba", CPU, CPU_FLOATS),
        "triton": (triton, "triton", TRITON_DEVICES, FLOATS),
    }
    return {
        name: Backend(
            f"tilewise.kernels.{name}.{op}", needs, devices, dtypes, refuses, leading=leading
        )
        for name, (refuses, needs, devices, dtypes) in table.items()
        if refuses is not None
    }


# --- What PyTorch sees.

_LIBRARY = torch.library.Library("tilewise", "FRAGMENT")


def register(
    schema: str, backends: Mapping[str, Backend], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Make `torch.ops.tilewise.<name>`, whose last argument names the backend to run.

    The op is what torch.compile sees. The backend is already chosen, so running it is a lookup.
    """
    # Exact strides: a kernel is promised rows one after the other, and Inductor must keep that.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(schema, tags=tags)
    name = schema.partition("(")[0]
    op = getattr(torch.ops.tilewise, name).default
    kernels: dict[str, Callable[..., Any]] = {}
    written = [
        i
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def find(chosen: str, device: str) -> Callable[..., Any]:
        if backends[chosen].needs == native.MODULE:
            native.load()
        elif "cuda" in backends and device == "cuda" and not native.EMULATED:
            native.mention_unbuilt()
        kernel: Callable[..., Any] = getattr(import_module(backends[chosen].module), name)
        return kernels.setdefault(chosen, kernel)

    def run_cpu(*args: Any) -> Any:
        kernel = kernels.get(args[-1]) or find(args[-1], "cpu")
        for i in written:
            count_write(args[i])
        return kernel(*args[:-1])

    def run_cuda(*args: Any) -> Any:
        kernel = kernels.get(args[-1]) or find(args[-1], "cuda")
        for i in written:
            count_write(args[i])
        with torch.cuda.device(args[0].device):
            return kernel(*args[:-1])

    _LIBRARY.impl(name, run_cpu, "CPU")
    _LIBRARY.impl(name, run_cuda, "CUDA")
    torch.library.register_fake(f"tilewise::{name}", fake, lib=_LIBRARY)
    return _straight(op, run_cpu, run_cuda)


def _straight(
    op: torch._ops.OpOverload, run_cpu: Callable[..., Any], run_cuda: Callable[..., Any]
) -> Callable[..., Any]:
    """`op`, without PyTorch's dispatcher where nobody looks at what is called.

    The dispatcher has nothing to decide about our ops, but takes 2.9 us a call, and the questions
    here 0.4 (AMD Zen 5, 2026-11).
    """
    plain: set[tuple[type, ...]] = set()  # kinds of arguments that are as the schema has them

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (is_observed() and not _is_recorded(args[-1])):
            return op(*args)
        kinds = tuple(map(type, args))
        if is_batched(args[0]):
            return op(*args)
        if kinds not in plain:
            if not all(map(_is_plain, kinds, op._schema.arguments)):
                return op(*args)
            plain.add(kinds)
        return (run_cuda if args[0].is_cuda else run_cpu if args[0].is_cpu else op)(*args)

    return call


def _is_recorded(backend: str) -> bool:
    """Whether a mode is looking that notes the launches of this backend's kernels."""
    noting = recorder()
    return noting is not None and backend in noting.backends


def count_write(x: Tensor) -> None:
    """So that autograd sees when what it has saved is written over; it counts its own ops only."""
    if (noting := recorder()) is not None:
        noting.writes.append(x)
    elif not x.is_inference():
        torch.autograd.graph.increment_version(x)


def is_batched(x: Tensor | None) -> bool:
    """Whether it is many at once, as `torch.autograd.grad` with `is_grads_batched` hands down."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def is_observed() -> bool:
    """Whether a mode, a trace or the profiler looks at the ops that are called."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or profiler._is_profiler_enabled
    )


def _is_plain(kind: type, argument: Any) -> bool:
    """Whether an argument is as the schema says without being converted; no subclass of a tensor,
    which may have its own idea of an op."""
    wanted = str(argument.type)
    if kind is type(None):
        return wanted.startswith("Optional")
    if wanted in ("Tensor", "Optional[Tensor]"):
        return kind in (Tensor, torch.nn.Parameter)
    return wanted == {int: "int", float: "float", bool: "bool", str: "str"}.get(kind)


# --- What a front door asks.


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compiler.assume_constant_result, without the second it takes to import Dynamo and Triton.
# Unmarked, this is True under Dynamo, and a compiled model silently runs the reference.
_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transforming() -> bool:
    """Whether torch.func or forward-mode AD is at work, to which our ops are opaque.

    The front door then returns the reference, which is right to any order.
    """
    return forward_ad._current_level >= 0 or _in_functorch()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether to pay for an autograd.Function: 3.5 us a call beside the 4.0 of the op alone."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def backward_is_last() -> bool:
    """Whether the backward pass that is running lets go of the graph, so that what an op has saved
    may be written over. What is traced by torch.compile may not."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def differentiable_gradients(
    reference: Callable[..., Any],
    douts: Tensor | Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients for `create_graph=True`: those of the reference, to be differentiated again.

    One for each of `tensors`, None for those that are None or not floating point. Each is taken by
    an alias: a tensor that the op itself returned must not lead back to the others.
    """
    with torch.enable_grad():
        inputs = [
            t if t is None or not t.is_floating_point()
            else t.view_as(t) if t.requires_grad
            else t.detach().requires_grad_()
            for t in tensors
        ]  # fmt: skip
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        outs = reference(*inputs, *options)
        grads = iter(
            torch.autograd.grad(outs, wanted, douts, create_graph=True, materialize_grads=True)
        )
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in inputs)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """View `[..., cols]` as `[rows, cols]`, each row contiguous; copy only if there is no view."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """`y`, which was computed of `as_rows(x)`, in the shape of `x`."""
    return y if x.ndim == y.ndim else y.view(x.shape)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The lower precision of autocast where it is on for the device of `x`, else None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

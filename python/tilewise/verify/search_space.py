"""Which configurations of a kernel's search space survive compilation: no spill, and they fit.

A kernel's module declares its space beside its option tables, as SEARCH_SPACE: by the function's
name, the values of each option that are worth a try.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from importlib import import_module
from itertools import product

import torch

from tilewise.op import OPS
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel
from tilewise.verify.kernel_report import Task, plan, report
from tilewise.verify.promises import broken

Space = Mapping[str, Mapping[str, Sequence[int]]]


def ops_to_prune() -> list[str]:
    """Ops whose Triton module declares a search space; in a process where triton can be imported.

    The modules are only read: what they decorate does not matter.
    """
    return [name for name in OPS if "triton" in OPS[name].backends and space_of(name)]


def space_of(op: str) -> Space:
    """The search space of an op's kernels by name; empty if it declares none."""
    module = import_module(OPS[op].backends["triton"].module)
    return getattr(module, "SEARCH_SPACE", {})


def candidates(
    pool: Executor, op: str, dtype: torch.dtype, architecture: str, workload: int
) -> list[Task]:
    """One task for each kernel in the search space and each combination of its options.

    The kernels are launched by the workload of this number, of those timed on a GPU; those that it
    does not need, by the last declared size that does.
    """
    shipped = plan(pool, [op], [dtype], [architecture])
    wanted, space = dict(OPS[op].timed_on("cuda")[workload]), space_of(op)
    chosen = {task.kernel: task for task in shipped}
    chosen |= {
        task.kernel: task for task in plan(pool, [op], [dtype], [architecture], lambda _: [wanted])
    }
    found = []
    for task in chosen.values():
        options = space.get(task.kernel, {})
        for values in product(*options.values()) if options else ():
            instead = dict(zip(options, values, strict=True))
            identity = hashlib.sha256(f"{task.identity} {instead}".encode()).hexdigest()[:32]
            found.append(replace(task, instead=instead, identity=identity))
    return found


def is_shipped(task: Task) -> bool:
    """Whether this combination is the one that the launcher takes."""
    return all(task.options.get(name) == value for name, value in task.instead.items())


def prune(pool: Executor, tasks: Sequence[Task]) -> Iterator[tuple[Task, Kernel, str]]:
    """Tasks, their kernels, and why each does not survive, or ""."""
    for place, kernel in report(pool, tasks):
        reasons = broken(replace(kernel, op=""))  # its promises are made of what is shipped
        if not kernel.error and not kernel.blocks and ARCHITECTURES[kernel.architecture].tensor:
            reasons.append("must fit a multiprocessor, got no block that does")
        yield tasks[place], kernel, "; ".join(reasons)


def merit(kernel: Kernel) -> float:
    """How busy the tensor cores are at most, or without such work the memory: to sort by."""
    longest = max(kernel.cycles.values(), default=0.0)
    work = kernel.cycles.get("tensor") or kernel.cycles.get("memory") or 0.0
    return work / longest if longest else 0.0

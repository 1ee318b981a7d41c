"""The kernel report: every shipped configuration compiled ahead of time, each distinct one once.

Compilation happens in processes of its own, in which Triton does not interpret whatever it does in
this one. What was measured is kept in the user's cache, by all that it depends on.
"""

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from tilewise import toolchain
from tilewise.op import OPS, Op, Size, interpreting
from tilewise.verify.ahead_of_time import (
    Call,
    Launch,
    Options,
    backend_calls,
    compiling_only,
    sizes_to_launch,
)
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel, inspect, inspect_all

PROCESSES = 2
TOGETHER = 6  # kernels of which one process reads the machine code at once
KEPT_SECONDS = 30 * 24 * 3600  # unused, in the cache

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One kernel to compile: a launch of an op, by its place among those of a size.

    Attributes:
        op: Name of the op.
        dtype: Such as "bfloat16".
        architecture: Such as "sm_90".
        size: The declared size.
        place: Of the launch, counted from 0.
        kernel: The function's name.
        options: Its own.
        identity: Of the machine code.
        instead: Options to take instead of the launcher's.
    """

    op: str
    dtype: str
    architecture: str
    size: Size
    place: int
    kernel: str
    options: Options
    identity: str
    instead: Options = field(default_factory=dict)

    def failed(self, error: str) -> Kernel:
        """The row of a kernel that there is not."""
        about = (self.op, self.kernel, "triton", self.architecture, self.dtype, self.size)
        return Kernel(*about, self.place, {**self.options, **self.instead}, error=error)


# --- Processes that compile.


@contextmanager
def processes(number: int = PROCESSES) -> Iterator[Executor]:
    """Processes in which Triton compiles."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"  # read where a process imports a kernel
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=_be_quiet)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _be_quiet() -> None:
    warnings.simplefilter("ignore")  # of triton, on its next version: once for each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer


def spread(
    pool: Executor, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[int, Result | None]]:
    """Places and results as they come; None where the compiler took its process with it."""
    waiting = dict(enumerate(items))
    try:
        futures = {pool.submit(function, item): place for place, item in waiting.items()}
        for future in as_completed(futures):
            result, place = future.result(), futures[future]
            del waiting[place]
            yield place, result
    except BrokenProcessPool:
        pass
    while waiting:  # whose fault it was is seen one at a time
        with processes(1) as alone:
            for place in list(waiting):
                try:
                    yield place, alone.submit(function, waiting.pop(place)).result()
                except BrokenProcessPool:
                    yield place, None
                    break


# --- What there is to compile.


def plan(
    pool: Executor,
    ops: Iterable[str],
    dtypes: Sequence[torch.dtype],
    architectures: Sequence[str],
    sizes: Callable[[Op], Sequence[Size]] = sizes_to_launch,
) -> list[Task]:
    """One task for each distinct Triton kernel that `ops` launch, forward and backward."""
    each = [
        (op, str(dtype).removeprefix("torch."), tuple(architectures), sizes(OPS[op]))
        for op in ops
        for dtype in dtypes
        if "triton" in OPS[op].backends and dtype in OPS[op].backends["triton"].dtypes
    ]
    found = dict(spread(pool, _tasks, each))
    once: dict[str, Task] = {}
    for place in range(len(each)):
        for task in found[place] or ():
            once.setdefault(task.op + task.identity, task)
    return list(once.values())


@lru_cache(64)
def _calls(op: str, dtype: str, size: tuple[tuple[str, Any], ...]) -> list[Call]:
    return backend_calls(OPS[op], "triton", getattr(torch, dtype), dict(size))


def _launches(
    op: str, dtype: str, size: Size, architecture: str, wanted: Callable[[int], bool],
    instead: Mapping[str, Options] | None = None,
) -> list[Launch]:  # fmt: skip
    module = import_module(OPS[op].backends["triton"].module)
    with compiling_only(ARCHITECTURES[architecture], wanted, instead) as launches:
        for name, args in _calls(op, dtype, tuple(size.items())):
            getattr(module, name)(*args)
    return launches


def _tasks(asked: tuple[str, str, tuple[str, ...], Sequence[Size]]) -> list[Task]:
    op, dtype, architectures, sizes = asked
    return [
        Task(op, dtype, architecture, size, place, one.kernel, one.options, one.identity)
        for architecture in architectures
        for size in sizes
        for place, one in enumerate(_launches(op, dtype, size, architecture, lambda place: False))
    ]


# --- Compiling it.


def report(pool: Executor, tasks: Sequence[Task]) -> Iterator[tuple[int, Kernel]]:
    """Places among `tasks` and their kernels, as they are compiled, or found in the cache.

    What two ops launch alike is compiled once.
    """
    folder = _cache_folder()
    missing, twins = dict[str, int](), dict[int, list[int]]()
    for place, task in enumerate(tasks):
        if (kernel := _kept(folder / f"{task.identity}.json", task)) is not None:
            yield place, kernel
        elif (first := missing.setdefault(task.identity, place)) != place:
            twins.setdefault(first, []).append(place)
    for place, kernel in _made(pool, tasks, list(missing.values())):
        yield place, kernel
        for twin in twins.get(place, ()):
            yield twin, _named(kernel, tasks[twin])


def _made(
    pool: Executor, tasks: Sequence[Task], places: Sequence[int]
) -> Iterator[tuple[int, Kernel]]:
    """These places among `tasks` and their kernels, as they are compiled."""
    folder = _cache_folder()
    groups = _groups(tasks, places)
    alone = []
    work = [[tasks[place] for place in group] for group in groups]
    for i, rows in spread(pool, _compile, work):
        if rows is None and len(groups[i]) > 1:
            alone += groups[i]  # to see whose fault it was
            continue
        failed = [tasks[place].failed("the compiler ended its process") for place in groups[i]]
        for place, kernel in zip(groups[i], rows or failed, strict=True):
            if not kernel.error:
                _keep(folder / f"{tasks[place].identity}.json", kernel)
            yield place, kernel
    for place in alone:
        with processes(1) as other:
            yield from ((place, kernel) for _, kernel in report(other, [tasks[place]]))


def _groups(tasks: Sequence[Task], places: Sequence[int]) -> list[list[int]]:
    """Places of tasks whose machine code is read together; those that take longest first."""
    found: dict[tuple[bool, str], list[int]] = {}
    for place in places:
        task = tasks[place]
        found.setdefault((task.op != "attention", task.architecture), []).append(place)
    return [
        of_one[i : i + TOGETHER]
        for _, of_one in sorted(found.items())
        for i in range(0, len(of_one), TOGETHER)
    ]


def _compile(tasks: Sequence[Task]) -> list[Kernel]:
    """The rows of tasks for one architecture."""
    made: dict[int, tuple[Launch, dict[str, Any]]] = {}
    rows: dict[int, Kernel] = {}
    for i, task in enumerate(tasks):
        instead = {task.kernel: task.instead} if task.instead else None
        about = {"op": task.op, "dtype": task.dtype, "size": dict(task.size), "launch": task.place}
        wanted = {task.place}.__contains__
        try:
            launches = _launches(task.op, task.dtype, task.size, task.architecture, wanted, instead)
            made[i] = launches[task.place], about
        except Exception as error:  # of many kinds, from a compiler
            rows[i] = task.failed(_sentence(error))
    try:
        read = inspect_all(list(made.values()), ARCHITECTURES[tasks[0].architecture])
        rows |= dict(zip(made, read, strict=True))
    except Exception as error:
        rows |= {i: tasks[i].failed(_sentence(error)) for i in made}
    return [rows[i] for i in range(len(tasks))]


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"


@cache
def _cache_folder() -> Path:
    folder = toolchain.cache_folder("kernels")
    with suppress(OSError):  # of a home that cannot be written: nothing is kept
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.json"):
            if file.stat().st_atime < time.time() - KEPT_SECONDS:
                file.unlink(missing_ok=True)
    return folder


def _kept(file: Path, task: Task) -> Kernel | None:
    try:
        found = Kernel(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return _named(found, task)


def _named(kernel: Kernel, task: Task) -> Kernel:
    """The kernel as that of another task which launches it."""
    size = dict(task.size)
    return replace(kernel, op=task.op, dtype=task.dtype, size=size, launch=task.place)


def _keep(file: Path, kernel: Kernel) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        part.write_text(json.dumps(asdict(kernel)))
        part.replace(file)


def compile_report(kernel: Any, *args: Any, architecture: str = "sm_90", **options: Any) -> Kernel:
    """Compile any `@triton.jit` function ahead of time, and say what its machine code is.

    Args:
        kernel: The function.
        args: As for a launch; tensors on the device "meta".
        architecture: One of "sm_80", "sm_90", "sm_100", "sm_120", "gfx942".
        options: Constants, `num_warps`, `num_stages`.

    Returns:
        Registers, spills, shared memory, instructions, loop model: see `Kernel`.

    Raises:
        ValueError: If the architecture is unknown.
        RuntimeError: In a process where Triton interprets. What triton raises of a kernel that
            does not compile is left as it is.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"compile_report: architecture must be one of {known}, got {architecture}")
    if interpreting() or not hasattr(kernel, "warmup"):
        raise RuntimeError("compile_report: TRITON_INTERPRET must be off, got on")
    with compiling_only(ARCHITECTURES[architecture]) as launches:
        kernel[(1,)](*args, **options)
    return inspect(launches[0], ARCHITECTURES[architecture], op="", dtype="")

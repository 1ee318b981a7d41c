"""A launch in the interpreter: arguments become tagged pointers, programs run in any order."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tilewise.verify import intrinsics, session
from tilewise.verify.memory import TAG_SHIFT, Argument, describe, shadow_of, view_of
from tilewise.verify.patching import STOCK, replace
from tilewise.verify.poison import written_bytes

_given: set[frozenset[str]] = set()  # names of the language's modules, in a function that is called


def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel, watched if a session is open."""
    _given.clear()
    intrinsics.rebind(self.fn)
    now = session.active
    if now is None:
        return STOCK["__call__"](self, *args, **kwargs)
    outer, now.launch = now.launch, session.Launch(self.fn.__name__)
    now.report.launches += 1
    try:
        return STOCK["__call__"](self, *args, **kwargs)
    finally:
        now.launch = outer


def patch_language(fn: Any) -> Any:
    """As stock, but once in a launch: to look through the language again, at each call of one
    jitted function by another, took half of the time of a kernel that is made of them."""
    names = frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)
    if names in _given:
        return None
    _given.add(names)
    return STOCK["_patch_lang"](fn)


def host_arguments(self: Any, args: Any, kwargs: Any) -> Any:
    """Note what each argument is a view of, and mark it with its tag."""
    args_host, kwargs_host = STOCK["_init_args_hst"](self, args, kwargs)
    watched = session.active and session.active.launch
    if watched:
        given = inspect.getcallargs(self.fn, *args_host, **kwargs_host)
        origin = inspect.getcallargs(self.fn, *args, **kwargs)
        for name, value in given.items():
            for path, here, there in _tensors(name, value, origin[name]):
                _note_argument(watched, path, here, there)
    return args_host, kwargs_host


def _tensors(name: str, here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(here, interpreter.TensorDescriptor):
        yield name, here.base, there.base
    elif isinstance(here, tuple):
        for i, (a, b) in enumerate(zip(here, there, strict=True)):
            yield from _tensors(f"{name}[{i}]", a, b)
    elif hasattr(here, "data_ptr"):
        yield name, here, there


def _note_argument(watched: session.Launch, name: str, here: Any, there: Any) -> None:
    tensor = interpreter._unwrap_tensor(here)
    start = tensor.untyped_storage().data_ptr()
    shadow = watched.shadows.get(start)
    if shadow is None:
        shadow = shadow_of(tensor, written_bytes(interpreter._unwrap_tensor(there)))
        watched.shadows[start] = shadow
    span, valid = view_of(tensor)
    here.tilewise_tag = len(watched.arguments) + 1
    tagged = np.uint64(here.tilewise_tag) << TAG_SHIFT
    address = tensor.data_ptr()
    watched.arguments.append(
        Argument(
            name, describe(tensor), np.uint64(address) + tagged, span, tensor.itemsize, valid,
            address - start, shadow,
        )
    )  # fmt: skip


def implicit_convert(argument: Any) -> Any:
    """As stock, and the pointer of an argument carries its tag."""
    converted = STOCK["_implicit_cvt"](argument)
    tag = getattr(argument, "tilewise_tag", None)
    if tag is not None and session.active and session.active.launch:
        converted.handle.data = converted.handle.data + (np.uint64(tag) << TAG_SHIFT)
    return converted


def set_grid_dim(self: Any, x: int, y: int, z: int) -> None:
    STOCK["set_grid_dim"](self, x, y, z)
    now = session.active
    if now and now.launch:
        session.start_grid(now, now.launch, (int(x), int(y), int(z)))


def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
    now = session.active
    if now and now.launch:
        turn = (x * now.launch.grid[1] + y) * now.launch.grid[2] + z
        x, y, z = session.start_program(now.launch, turn)
    STOCK["set_grid_idx"](self, x, y, z)


def install() -> None:
    """Watch launches, for all of this process."""
    replace(interpreter, "_implicit_cvt", implicit_convert)
    replace(interpreter, "_patch_lang", patch_language)
    replace(interpreter.GridExecutor, "_init_args_hst", host_arguments)
    replace(interpreter.GridExecutor, "__call__", launch)
    replace(interpreter.InterpreterBuilder, "set_grid_dim", set_grid_dim)
    replace(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)

"""Triton's interpreter, repaired where it computes wrongly, and watched where it touches memory.

That of 3.6 also fails on every loop to a runtime bound beside NumPy 2.4 or newer.
"""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter

from tilewise.verify import arithmetic, intrinsics, reductions, session
from tilewise.verify.arithmetic import is_narrow
from tilewise.verify.checks import check_atomic, check_load, check_store
from tilewise.verify.formats import decode, encode
from tilewise.verify.memory import (
    ADDRESS,
    TAG_SHIFT,
    Argument,
    describe,
    shadow_of,
    view_of,
)
from tilewise.verify.patching import MISSING, STOCK, replace
from tilewise.verify.poison import written_bytes

OLDEST, NEWEST = (3, 6), (3, 9)
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_raw = interpreter._interpreter


def repair() -> None:
    """Give the interpreter of this process the arithmetic and the functions of the hardware."""
    if STOCK:
        return
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    arithmetic.install()
    reductions.install()
    intrinsics.install()
    for function in (
        create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas,
        create_barrier, create_assert, create_assume, create_make_tensor_descriptor,
        set_grid_dim, set_grid_idx,
    ):  # fmt: skip
        replace(Builder, function.__name__, function)
    if version >= (3, 9):
        for function in (create_atomic_load, create_atomic_store, create_atomic_poll):
            replace(Builder, function.__name__, function)
    Builder.create_descriptor_reduce = create_descriptor_reduce
    replace(interpreter, "_implicit_cvt", implicit_convert)
    replace(interpreter, "_patch_lang_tensor", patch_tensor)
    replace(interpreter, "_patch_lang_core", patch_core)
    replace(interpreter.GridExecutor, "_init_args_hst", host_arguments)
    replace(interpreter.GridExecutor, "__call__", launch)
    if MISSING or not OLDEST <= version <= NEWEST:
        untested = ", ".join(MISSING) or "bfloat16, reductions, memory checks, descriptors, atomics"
        warnings.warn(
            f"sanitize: triton must be 3.6 to 3.9 to be tested, got {triton.__version__}; "
            f"untested: {untested}",
            RuntimeWarning,
            stacklevel=2,
        )


# --- Launches.


def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel, watched if a session is open."""
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


# --- Memory.


def _size(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _plain(pointers: Any) -> Any:
    return Handle(pointers.data & ADDRESS, pointers.dtype)


def _same_shape(mask: Any, pointers: Any) -> Any:
    data = mask.data
    return data if data.shape == pointers.data.shape else np.broadcast_to(data, pointers.data.shape)


def create_masked_load(
    self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any
) -> Any:
    now = session.active
    if now and now.launch:
        volatile = bool(named["is_volatile"] if "is_volatile" in named else rest[-1])
        lanes = _same_shape(mask, pointers)
        lanes = check_load(now.launch, pointers.data, lanes, _size(pointers), volatile)
        pointers, mask = _plain(pointers), Handle(lanes, mask.dtype)
    return STOCK["create_masked_load"](self, pointers, mask, other, *rest, **named)


def create_masked_store(
    self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
) -> Any:
    now = session.active
    if now and now.launch:
        lanes = _same_shape(mask, pointers)
        lanes = check_store(now.launch, pointers.data, lanes, _size(pointers), value.data)
        pointers, mask = _plain(pointers), Handle(lanes, mask.dtype)
    return STOCK["create_masked_store"](self, pointers, value, mask, *rest, **named)


def create_barrier(self: Any) -> None:
    now = session.active
    if now and now.launch:
        now.launch.barrier += 1


def _checked_atomic(pointers: Any, mask: Any, sem: Any, reads: bool) -> tuple[Any, Any]:
    """The plain pointers, and the lanes that may go on."""
    now = session.active
    lanes = _same_shape(mask, pointers)
    if not (now and now.launch):
        return pointers, Handle(lanes, mask.dtype)
    order = str(sem).upper()
    lanes = check_atomic(now.launch, pointers.data, lanes, _size(pointers), order, reads)
    return _plain(pointers), Handle(np.ascontiguousarray(lanes), mask.dtype)


def create_atomic_rmw(
    self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
) -> Any:
    exchange = operation == interpreter._ir.ATOMIC_OP.XCHG
    pointers, mask = _checked_atomic(pointers, mask, sem, not exchange)
    if not is_narrow(value):
        return STOCK["create_atomic_rmw"](self, operation, pointers, value, mask, sem, scope)
    return _narrow_atomic(operation, pointers, value, mask)


def _narrow_atomic(operation: Any, pointers: Any, value: Any, mask: Any) -> Any:
    """One lane after the other, for the formats that NumPy does not have."""
    kinds = interpreter._ir.ATOMIC_OP
    combine = {kinds.FADD: np.add, kinds.MAX: np.fmax, kinds.MIN: np.fmin}.get(operation)
    name, kind = value.dtype.scalar.name, value.data.dtype
    before = np.zeros(pointers.data.shape, kind)
    given = np.broadcast_to(value.data, pointers.data.shape)
    one, zero = np.ones(1, bool), np.zeros(1, kind)
    for index in zip(*np.nonzero(mask.data), strict=True):
        pointer = pointers.data[index].reshape(1)
        old, new = _raw.load(pointer, one, zero, kind), given[index].reshape(1)
        before[index] = old[0]
        if combine is not None:
            new = encode(combine(decode(old, name), decode(new, name)), name)
        _raw.store(pointer, new, one)
    return Handle(before, value.dtype.scalar)


def create_atomic_cas(
    self: Any, pointers: Any, expected: Any, value: Any, sem: Any, scope: Any
) -> Any:
    mask = Handle(np.ones(pointers.data.shape, bool), interpreter.tl.int1)
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    if not mask.data.all():
        return Handle(np.zeros_like(expected.data), expected.dtype.scalar)
    return STOCK["create_atomic_cas"](self, pointers, expected, value, sem, scope)


def create_atomic_load(self: Any, pointers: Any, mask: Any, sem: Any, scope: Any) -> Any:
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    return STOCK["create_masked_load"](self, pointers, mask, None, None, True)


def create_atomic_store(
    self: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
) -> Any:
    pointers, mask = _checked_atomic(pointers, mask, sem, False)
    return STOCK["create_masked_store"](self, pointers, value, mask, None)


def create_atomic_poll(
    self: Any, pointers: Any, expected: Any, timeout: Any, sem: Any, scope: Any
) -> Any:
    """Programs run one after the other: what is not there now will not come."""
    mask = Handle(np.ones(pointers.data.shape, bool), interpreter.tl.int1)
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    values = STOCK["create_masked_load"](self, pointers, mask, None, None, True)
    matched = values.data == expected.data
    if timeout is None and not matched.all():
        session.found("race", "a program waits for one that has not run: no order makes it end")
    return Handle(matched, interpreter.tl.int1)


def create_descriptor_reduce(
    self: Any, kind: Any, descriptor: Any, value: Any, indices: Any
) -> Any:
    pointers, mask = descriptor.materialize_pointers(indices)
    name = str(kind).upper().rpartition(".")[2]
    if name == "ADD" and value.dtype.scalar.is_floating():
        name = "FADD"
    operation = getattr(interpreter._ir.ATOMIC_OP, name)
    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED
    return self.create_atomic_rmw(operation, pointers, value, mask, relaxed, None)


def create_make_tensor_descriptor(self: Any, *args: Any, **named: Any) -> Any:
    try:
        return STOCK["create_make_tensor_descriptor"](self, *args, **named)
    except AssertionError as wrong:
        session.found("descriptor", str(wrong))
        raise


# --- What a kernel claims.


def _first_false(condition: Any) -> tuple[int, ...] | None:
    data = np.asarray(condition.data if isinstance(condition, Handle) else condition)
    if data.all():
        return None
    return tuple(int(i) for i in np.argwhere(~np.atleast_1d(data.astype(bool)))[0])


def create_assert(self: Any, condition: Any, message: Any, *rest: Any) -> Any:
    if session.active is None:
        return STOCK["create_assert"](self, condition, message, *rest)
    lane = _first_false(condition)
    if lane is not None:
        session.found("assertion", f"tl.device_assert: {message}", lane=lane)
    return None


def create_assume(self: Any, condition: Any) -> Any:
    if session.active is None:
        return STOCK["create_assume"](self, condition)
    lane = _first_false(condition)
    if lane is not None:
        session.found("assertion", "tl.assume is given what does not hold", lane=lane)
    return None


def patch_core(language: Any, scope: Any) -> None:
    from tilewise.verify.hints import HINTS, checked

    STOCK["_patch_lang_core"](language, scope)
    for name in HINTS:
        scope.set_attr(language, name, checked(name, getattr(language, name)))


def patch_tensor(tensor: Any, scope: Any) -> None:
    STOCK["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

"""Loads, stores, atomics, barriers and descriptors of a kernel, each checked before it is made."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tilewise.verify import session
from tilewise.verify.arithmetic import is_narrow
from tilewise.verify.checks import check_atomic, check_load, check_store
from tilewise.verify.formats import decode, encode
from tilewise.verify.memory import ADDRESS
from tilewise.verify.patching import STOCK, replace

Handle = interpreter.TensorHandle
_raw = interpreter._interpreter


def _size(pointers: Any) -> int:
    bits: int = pointers.get_element_ty().primitive_bitwidth
    return max(1, bits // 8)


def _plain(pointers: Any) -> Any:
    return Handle(pointers.data & ADDRESS, pointers.dtype)


def _same_shape(mask: Any, pointers: Any) -> Any:
    data = mask.data if isinstance(mask, Handle) else mask  # 3.6 has plain arrays for descriptors
    return data if data.shape == pointers.data.shape else np.broadcast_to(data, pointers.data.shape)


def _undefined(pointers: Any, lanes: Any) -> Any:
    """What a load without `other` gives where the mask is False: here NaN, of integers -1."""
    data = np.zeros(pointers.data.shape, interpreter._get_np_dtype(pointers.get_element_ty()))
    data[~lanes] = np.frombuffer(b"\xff" * data.itemsize, data.dtype)[0]
    return Handle(data, pointers.get_element_ty())


def create_masked_load(
    self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any
) -> Any:
    now = session.active
    if now and now.launch:
        volatile = bool(named["is_volatile"] if "is_volatile" in named else rest[-1])
        lanes = _same_shape(mask, pointers)
        if other is None and not lanes.all():
            other = _undefined(pointers, lanes)
        lanes = check_load(now.launch, pointers.data, lanes, _size(pointers), volatile)
        pointers, mask = _plain(pointers), Handle(lanes, tl.int1)
        if volatile:
            loaded = STOCK["create_masked_load"](self, pointers, mask, other, *rest, **named)
            return _answered(loaded)
    return STOCK["create_masked_load"](self, pointers, mask, other, *rest, **named)


def create_masked_store(
    self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
) -> Any:
    now = session.active
    if now and now.launch:
        lanes = _same_shape(mask, pointers)
        lanes = check_store(now.launch, pointers.data, lanes, _size(pointers), value.data)
        pointers, mask = _plain(pointers), Handle(lanes, tl.int1)
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
        return pointers, Handle(lanes, tl.int1)
    order = str(sem).upper()
    lanes = check_atomic(now.launch, pointers.data, lanes, _size(pointers), order, reads)
    return _plain(pointers), Handle(np.ascontiguousarray(lanes), tl.int1)


def _answered(answer: Any) -> Any:
    now = session.active
    if now and now.launch:
        session.note_answer(now.launch, answer.data)
    return answer


def create_atomic_rmw(
    self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
) -> Any:
    exchange = operation == interpreter._ir.ATOMIC_OP.XCHG
    pointers, mask = _checked_atomic(pointers, mask, sem, not exchange)
    if not is_narrow(value):
        arguments = operation, pointers, value, mask, sem, scope
        return _answered(STOCK["create_atomic_rmw"](self, *arguments))
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
    mask = Handle(np.ones(pointers.data.shape, bool), tl.int1)
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    if not mask.data.all():
        return Handle(np.zeros_like(expected.data), expected.dtype.scalar)
    return _answered(STOCK["create_atomic_cas"](self, pointers, expected, value, sem, scope))


def create_atomic_load(self: Any, pointers: Any, mask: Any, sem: Any, scope: Any) -> Any:
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    return _answered(STOCK["create_masked_load"](self, pointers, mask, None, None, True))


def create_atomic_store(
    self: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
) -> Any:
    pointers, mask = _checked_atomic(pointers, mask, sem, False)
    return STOCK["create_masked_store"](self, pointers, value, mask, None)


def create_atomic_poll(
    self: Any, pointers: Any, expected: Any, timeout: Any, sem: Any, scope: Any
) -> Any:
    """Programs run one after the other: what is not there now will not come."""
    mask = Handle(np.ones(pointers.data.shape, bool), tl.int1)
    pointers, mask = _checked_atomic(pointers, mask, sem, True)
    values = STOCK["create_masked_load"](self, pointers, mask, None, None, True)
    matched = values.data == expected.data
    if timeout is None and not matched.all():
        while True:
            _answered(values)  # until its patience ends
    return Handle(matched, tl.int1)


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


def install() -> None:
    """Watch memory, for all of this process."""
    builder = interpreter.InterpreterBuilder
    for function in (
        create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas,
        create_barrier, create_make_tensor_descriptor,
    ):  # fmt: skip
        replace(builder, function.__name__, function)
    for later in (create_atomic_load, create_atomic_store, create_atomic_poll):  # not in 3.6
        if hasattr(builder, later.__name__):
            replace(builder, later.__name__, later)
    builder.create_descriptor_reduce = create_descriptor_reduce

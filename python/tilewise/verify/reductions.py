"""Reductions and scans with a function of the kernel's own, over whole arrays at once.

As shipped, the interpreter calls that function once an element. It must be associative, as Triton
demands anyway: neighbours are combined first.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tilewise.verify.formats import NARROW
from tilewise.verify.patching import STOCK, replace

Handle = interpreter.TensorHandle


def _block(data: Any, scalar: Any) -> Any:
    data = np.ascontiguousarray(data)
    return tl.core.tensor(Handle(data, scalar), tl.block_type(scalar, list(data.shape)))


def _slice(tensor: Any, axis: int, part: slice) -> Any:
    where = [slice(None)] * tensor.handle.data.ndim
    where[axis] = part
    return _block(tensor.handle.data[tuple(where)], tensor.dtype.scalar)


def _combine(function: Any, left: list[Any], right: list[Any]) -> list[Any]:
    result = function(*left, *right)
    return list(result) if isinstance(result, tuple) else [result]


def generic_reduce(self: Any, given: Any) -> Any:
    rank = given[0].handle.data.ndim
    tensors, axis = self.unravel(given, self.axis)
    current = list(tensors)
    while (length := current[0].handle.data.shape[axis]) > 1:
        paired = length // 2 * 2
        left = [_slice(t, axis, slice(0, paired, 2)) for t in current]
        right = [_slice(t, axis, slice(1, paired, 2)) for t in current]
        combined = _combine(self.combine_fn.fn, left, right)
        if paired < length:  # the last has no neighbour
            rest = [_slice(t, axis, slice(paired, None)) for t in current]
            combined = [
                _block(np.concatenate([c.handle.data, r.handle.data], axis), r.dtype.scalar)
                for c, r in zip(combined, rest, strict=True)
            ]
        current = combined
    return [
        _reduced(c, t, axis, self.axis, self.keep_dims, rank)
        for c, t in zip(current, tensors, strict=True)
    ]


def _reduced(result: Any, tensor: Any, axis: int, given: Any, keep: bool, rank: int) -> Any:
    data, scalar = result.handle.data, tensor.dtype.scalar
    if keep:
        data = data if given is not None else data.reshape((1,) * rank)
    else:
        data = np.squeeze(data, axis)
    data = np.asarray(data).astype(interpreter._get_np_dtype(scalar))
    if data.ndim == 0:
        return tl.core.tensor(Handle(data.reshape(1), scalar), scalar)
    return _block(data, scalar)


def generic_scan(self: Any, given: Any) -> Any:
    axis, current = self.axis, [_slice(t, self.axis, slice(None)) for t in given]
    data = current[0].handle.data
    place = np.arange(data.shape[axis]).reshape([-1 if i == axis else 1 for i in range(data.ndim)])
    distance = 1
    while distance < data.shape[axis]:
        before = [_block(np.roll(t.handle.data, distance, axis), t.dtype.scalar) for t in current]
        combined = _combine(self.combine_fn.fn, before, current)
        current = [
            _block(np.where(place < distance, t.handle.data, c.handle.data), t.dtype.scalar)
            for t, c in zip(current, combined, strict=True)
        ]
        distance *= 2
    return current


def reduce_impl(self: Any, given: Any) -> Any:
    """NumPy's own reductions know nothing of the narrow formats."""
    if any(t.dtype.scalar.name in NARROW for t in given):
        return generic_reduce(self, given)
    return STOCK["reduce_impl"](self, given)


def scan_impl(self: Any, given: Any) -> Any:
    if not any(t.dtype.scalar.name in NARROW for t in given):
        return STOCK["scan_impl"](self, given)
    turned = [_flip(t, self.axis) for t in given] if self.reverse else list(given)
    result = generic_scan(self, turned)
    return [_flip(t, self.axis) for t in result] if self.reverse else result


def _flip(tensor: Any, axis: int) -> Any:
    return _block(np.flip(tensor.handle.data, axis), tensor.dtype.scalar)


def install() -> None:
    """Replace the slow forms, for all of this process."""
    replace(interpreter.ReduceOps, "generic_reduce", generic_reduce)
    replace(interpreter.ScanOps, "generic_scan", generic_scan)
    for owner, function in ((interpreter.ReduceOps, reduce_impl), (interpreter.ScanOps, scan_impl)):
        replace(owner, "apply_impl", function)
        STOCK[function.__name__] = STOCK.pop("apply_impl")

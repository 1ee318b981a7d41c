"""Memory that torch.empty hands out, filled so that a read before any write is seen."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tilewise.verify.memory import POISON_WORD, bytes_of

MAKERS: list[tuple[Any, str]] = [
    (torch, n) for n in ("empty", "empty_like", "empty_strided", "empty_permuted")
]
MAKERS += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]

# Elements of 8 bits have no bits to spare. By address: the tensor, its version, which were written.
_BYTES: dict[int, tuple[Any, int, Any]] = {}


@contextmanager
def poisoned_empties() -> Iterator[None]:
    """Fill what is made by torch.empty and its like, unless a block around this one does."""
    if hasattr(torch.empty, "poisons"):
        yield
        return
    _device_constructors()  # `with torch.device(...)` knows torch.empty by what it is now
    stock = [getattr(owner, name) for owner, name in MAKERS]
    for (owner, name), function in zip(MAKERS, stock, strict=True):
        setattr(owner, name, _poisoning(function, TRACED.get(name, function)))
    try:
        yield
    finally:
        for (owner, name), function in zip(MAKERS, stock, strict=True):
            setattr(owner, name, function)
        _BYTES.clear()


def _poisoning(function: Callable[..., Tensor], traced: Callable[..., Tensor]) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return traced(*args, **kwargs)
        made = function(*args, **kwargs)
        if type(made) is Tensor and made.layout == torch.strided and made.numel():
            _fill(made)
        return made

    make.poisons = True  # type: ignore[attr-defined]
    return make


# The methods, in terms that torch.compile can trace: their originals it cannot, once replaced.


def _new_empty(
    like: Tensor, *size: Any, dtype: Any = None, device: Any = None, **rest: Any
) -> Tensor:
    dtype, device = dtype or like.dtype, device or like.device
    return torch.empty(*size, dtype=dtype, device=device, **rest)


def _new_empty_strided(
    like: Tensor, *size: Any, dtype: Any = None, device: Any = None, **rest: Any
) -> Tensor:
    dtype, device = dtype or like.dtype, device or like.device
    return torch.empty_strided(*size, dtype=dtype, device=device, **rest)


TRACED = {"new_empty": _new_empty, "new_empty_strided": _new_empty_strided}


def _fill(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if tensor.dtype == torch.bool:
        bytes_of(address, size).fill(1)
    else:
        bytes_of(address, size // 2 * 2).view(np.uint16).fill(POISON_WORD)
    if tensor.itemsize == 1:
        _BYTES[address] = (weakref.ref(tensor), tensor._version, np.zeros(size, bool))


def written_bytes(tensor: Tensor) -> Any:
    """Which elements of 8 bits of torch.empty were written; None if that is not known."""
    address = tensor.untyped_storage().data_ptr()
    made, version, written = _BYTES.get(address, (None, 0, None))
    if tensor.itemsize != 1 or made is None:
        return None
    if made() is None or made()._version != version:  # torch has written, who knows where
        del _BYTES[address]
        return None
    words = np.full(-(-len(written) // 2), POISON_WORD, np.uint16).view(np.uint8)[: len(written)]
    poison = 1 if made().dtype == torch.bool else words
    written |= bytes_of(address, len(written)) != poison
    return written

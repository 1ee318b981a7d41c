"""What a kernel may touch: the exact views it was given, and what has been written of them.

A pointer carries in its upper 16 bits which argument it came from, through all arithmetic. So one
that lands in another argument is still seen as leaving its own.
"""

import gc
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilewise.verify.session import Launch, found

TAG_SHIFT = np.uint64(48)  # addresses of a process have 47 bits
ADDRESS = np.uint64((1 << 48) - 1)

# torch.empty is filled with this within a block: a NaN in every floating-point format of 16 bits or
# more, and one that no arithmetic yields. What still has these bits was never written.
POISON_WORD = 0xFFD5
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(slots=True)
class Shadow:
    """What is known of one piece of memory during one launch, by grain of its bytes.

    Attributes:
        start: Its address.
        size: Its bytes.
        grain: Bytes a grain: the smallest element that it has been seen as.
        initialised: Whether each grain was ever written; None if all were.
        writers: The last access that wrote it, -1 for none; None if nothing has.
        earlier_writers: The last of a program other than that of `writers`; None if there are none.
        readers: The last that read it; None until something is written.
        earlier_readers: The last of a program other than that of `readers`.
        reads: Those before anything was written, not entered yet: (access, offsets, size).
        pending: How many offsets they hold.
    """

    start: int
    size: int
    grain: int
    initialised: Any = None
    writers: Any = None
    earlier_writers: Any = None
    readers: Any = None
    earlier_readers: Any = None
    reads: list[tuple[int, Any, int]] = field(default_factory=list)
    pending: int = 0


@dataclass(slots=True)
class Argument:
    """A tensor that a kernel was given.

    Attributes:
        name: Of the parameter, with the index within a tuple.
        described: Its dtype, shape and strides.
        start: The tagged address of its first element.
        span: Bytes from there to the end of the last element.
        itemsize: Bytes an element.
        valid: Which elements of the span are of the view; None if all are.
        base: Where it starts in its shadow, in bytes.
        shadow: The memory it is a view of.
    """

    name: str
    described: str
    start: Any
    span: int
    itemsize: int
    valid: Any
    base: int
    shadow: Shadow


@dataclass(slots=True)
class Part:
    """The lanes of one access that came from one argument: offsets in bytes from its start."""

    argument: Argument
    offsets: Any
    lanes: Any  # None for all


def describe(tensor: Tensor) -> str:
    """`float32 [4, 50], strides (64, 1)`."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return text if tensor.is_contiguous() else f"{text}, strides {tuple(tensor.stride())}"


def view_of(tensor: Tensor) -> tuple[int, Any]:
    """Bytes from the first element to the end of the last, and which elements are there."""
    if tensor.numel() == 0:
        return 0, None
    axes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s]
    elements = sum((n - 1) * s for n, s in axes) + 1
    count = 1
    for n, _ in axes:
        count *= n
    if count == elements:
        return elements * tensor.itemsize, None
    valid = np.zeros(elements, bool)
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    np.lib.stride_tricks.as_strided(valid, shape, strides)[...] = True
    return elements * tensor.itemsize, None if valid.all() else valid


def bytes_of(address: int, size: int) -> Any:
    """Memory as an array of bytes, past torch and what may be recording it."""
    interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def shadow_of(tensor: Tensor, written: Any) -> Shadow:
    """Of the whole storage, with what of it was never written, if that is known already."""
    storage = tensor.untyped_storage()
    shadow = Shadow(storage.data_ptr(), storage.nbytes(), tensor.itemsize)
    grain = shadow.grain
    if grain in _WORDS and shadow.size >= grain:
        whole = bytes_of(shadow.start, shadow.size // grain * grain)
        poison = np.frombuffer(POISON_WORD.to_bytes(2, sys.byteorder) * (grain // 2), _WORDS[grain])
        written = whole.view(_WORDS[grain]) != poison
    if written is not None and not written.all():
        shadow.initialised = written
    return shadow


def refine(shadow: Shadow, grain: int) -> None:
    """Keep book of smaller pieces, for an access smaller than those before."""
    for name in ("initialised", "writers", "earlier_writers", "readers", "earlier_readers"):
        if (kept := getattr(shadow, name)) is not None:
            setattr(shadow, name, np.repeat(kept, shadow.grain // grain))
    shadow.grain = grain


def grains(shadow: Shadow, base: int, offsets: Any, size: int) -> Any:
    """The grains that an access touches: a slice where they lie side by side, else indices."""
    if size < shadow.grain:
        refine(shadow, size)
    grain = shadow.grain
    count = len(offsets)
    first, last = int(offsets[0]), int(offsets[-1])
    if last - first == (count - 1) * size and (count < 3 or bool((np.diff(offsets) == size).all())):
        return slice((first + base) // grain, (last + base + size) // grain)
    indices = (offsets + base) // grain
    if size > grain:
        indices = (indices[:, None] + np.arange(size // grain)).reshape(-1)
    return indices


def locate(
    launch: Launch, pointers: Any, mask: Any, size: int, action: str
) -> tuple[list[Part], Any]:
    """Split an access by argument, and report what lies outside.

    Returns:
        What is inside, and the mask of those lanes if it is not the one given.
    """
    flat, lanes = pointers.reshape(-1), None
    if not mask.all():
        lanes = np.flatnonzero(mask)
        flat = flat[lanes]
    if flat.size == 0:
        return [], None
    tag = int(flat[0]) >> 48
    if 0 < tag <= len(launch.arguments):
        argument = launch.arguments[tag - 1]
        offsets = (flat - argument.start).view(np.int64)
        inside = offsets.min() >= 0 and offsets.max() <= argument.span - size
        if inside and argument.valid is None and argument.itemsize == size:
            return [Part(argument, offsets, lanes)], None
    return _locate_each(launch, flat, lanes, pointers.shape, size, action)


def _locate_each(
    launch: Launch, flat: Any, lanes: Any, shape: tuple[int, ...], size: int, action: str
) -> tuple[list[Part], Any]:
    parts, allowed = [], np.zeros(int(np.prod(shape)), bool)
    tags = flat >> TAG_SHIFT
    every = np.arange(flat.size) if lanes is None else lanes
    for tag in np.unique(tags).tolist():
        here = tags == tag
        some = every[here]
        argument = _argument(launch, tag, int(flat[here][0]))
        if argument is None:
            lane = _index(some[0], shape)
            found("out of bounds", f"{action} through a pointer into no tensor", lane=lane)
            continue
        offsets = (flat[here] - argument.start).view(np.int64)
        good = _inside(argument, offsets, size)
        if not good.all():
            _report_outside(argument, offsets, good, some, shape, size, action)
        if good.any():
            allowed[some[good]] = True
            parts.append(Part(argument, offsets[good], some[good]))
    return parts, allowed.reshape(shape)


def _inside(argument: Argument, offsets: Any, size: int) -> Any:
    good = (offsets >= 0) & (offsets <= argument.span - size) & (offsets % size == 0)
    if argument.valid is not None:
        first = np.where(good, offsets, 0) // argument.itemsize
        for step in range(max(size // argument.itemsize, 1)):
            good &= argument.valid[np.minimum(first + step, len(argument.valid) - 1)]
    return good


def _report_outside(
    argument: Argument, offsets: Any, good: Any, lanes: Any, shape: Any, size: int, action: str
) -> None:
    worst = int(np.flatnonzero(~good)[0])
    offset, count = int(offsets[worst]), int((~good).sum())
    kind, where = "out of bounds", "outside"
    if 0 <= offset <= argument.span - size and offset % size:
        kind, where = "misaligned", "not at a multiple of the element in"
    lane = "lane" if count == 1 else "lanes"
    found(
        kind,
        f"{action} of {size} bytes by {count} {lane} {where} {argument.name}, {argument.described}",
        argument=argument.name,
        lane=_index(lanes[worst], shape),
        offset=offset // size,
        address=offset,
    )


def _index(lane: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(lane), shape))


def _argument(launch: Launch, tag: int, address: int) -> Argument | None:
    if 0 < tag <= len(launch.arguments):
        return launch.arguments[tag - 1]
    if tag:
        return None
    for known in launch.adopted:
        if known.shadow.start <= address < known.shadow.start + known.shadow.size:
            return known
    return _adopt(launch, address)


def _adopt(launch: Launch, address: int) -> Argument | None:
    """The tensor that a pointer read from memory points into: it is no argument."""
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, torch.nn.Parameter) or thing.device.type != "cpu":
            continue
        if thing.layout != torch.strided or thing.numel() == 0:
            continue
        if torch._is_functional_tensor(thing):  # has no memory, and raises if asked for it
            continue
        storage = thing.untyped_storage()
        start = storage.data_ptr()
        if start <= address < start + storage.nbytes():
            shadow = launch.shadows.get(start) or shadow_of(thing, None)
            launch.shadows[start] = shadow
            text = describe(thing)
            adopted = Argument(
                "a pointer from memory", text, np.uint64(start), shadow.size, 1, None, 0, shadow
            )
            launch.adopted.append(adopted)
            return adopted
    return None

"""Every load, store and atomic of a kernel, held to what the memory is and who else touches it.

Each returns the lanes that may go on, so that a wrong access is reported and never made.
"""

from typing import Any

import numpy as np

from tilewise.verify.findings import shown
from tilewise.verify.memory import Part, Shadow, grains, locate
from tilewise.verify.session import (
    Access,
    Launch,
    found,
    is_ordered,
    note_access,
    place_of,
    synchronise,
)

PENDING = 1 << 22  # offsets of reads kept before they are entered, 8 bytes each


def check_load(launch: Launch, pointers: Any, mask: Any, size: int, volatile: bool) -> Any:
    """In bounds, written before, and by nobody else in this launch without order."""
    parts, allowed = locate(launch, pointers, mask, size, "load")
    for part in parts:
        shadow = part.argument.shadow
        access = note_access(launch, volatile)
        if shadow.initialised is None and shadow.writers is None:
            base = part.argument.base
            shadow.reads.append((access, part.offsets + base if base else part.offsets, size))
            shadow.pending += len(part.offsets)
            if shadow.pending > PENDING:
                _enter_reads(launch, shadow)
            continue
        where = grains(shadow, part.argument.base, part.offsets, size)
        if shadow.initialised is not None:
            _check_written(part, where, size, pointers.shape, "load")
        if shadow.writers is not None:
            _check_writers(launch, part, where, size, pointers.shape, volatile)
        _enter_read(launch, shadow, where, access)
    return mask if allowed is None else allowed


def check_store(launch: Launch, pointers: Any, mask: Any, size: int, values: Any) -> Any:
    """In bounds, one value an address, and nobody else has read or written there without order."""
    parts, allowed = locate(launch, pointers, mask, size, "store")
    for part in parts:
        shadow = part.argument.shadow
        _enter_reads(launch, shadow)  # first: it may make the grains smaller
        where = grains(shadow, part.argument.base, part.offsets, size)
        if not isinstance(where, slice):
            _check_lanes(part, size, pointers.shape, values)
        _write(launch, part, where, size, pointers.shape, atomic=False)
    return mask if allowed is None else allowed


def check_atomic(
    launch: Launch, pointers: Any, mask: Any, size: int, order: str, reads: bool
) -> Any:
    """As a store, but other atomics may touch the same; with an order it orders programs."""
    parts, allowed = locate(launch, pointers, mask, size, "atomic")
    mask = mask if allowed is None else allowed
    for part in parts:
        shadow = part.argument.shadow
        _enter_reads(launch, shadow)
        where = grains(shadow, part.argument.base, part.offsets, size)
        if reads and shadow.initialised is not None:
            _check_written(part, where, size, pointers.shape, "atomic")
        _write(launch, part, where, size, pointers.shape, atomic=True)
    acquire, release = "ACQ" in order, "REL" in order.replace("RELAXED", "")
    if (acquire or release) and mask.any():
        synchronise(launch, pointers[mask], acquire, release)
    return mask


def _write(
    launch: Launch, part: Part, where: Any, size: int, shape: tuple[int, ...], atomic: bool
) -> None:
    shadow = part.argument.shadow
    access = note_access(launch, atomic)
    for name, what in _BEFORE_A_WRITE:
        before = getattr(shadow, name)
        if before is not None:
            _report(launch, part, before[where], size, shape, atomic, what)
    shadow.writers, shadow.earlier_writers = _entered(
        launch, shadow, shadow.writers, shadow.earlier_writers, where, access
    )
    if shadow.initialised is not None:
        shadow.initialised[where] = True


_BEFORE_A_WRITE = (
    ("writers", "also written"),
    ("earlier_writers", "also written"),
    ("readers", "also read"),
    ("earlier_readers", "also read"),
)


def _enter_reads(launch: Launch, shadow: Shadow) -> None:
    reads, shadow.reads, shadow.pending = shadow.reads, [], 0
    for access, offsets, size in reads:
        _enter_read(launch, shadow, grains(shadow, 0, offsets, size), access)


def _enter_read(launch: Launch, shadow: Shadow, where: Any, access: int) -> None:
    shadow.readers, shadow.earlier_readers = _entered(
        launch, shadow, shadow.readers, shadow.earlier_readers, where, access
    )


def _entered(
    launch: Launch, shadow: Shadow, last: Any, earlier: Any, where: Any, access: int
) -> tuple[Any, Any]:
    """The last access of each grain, and the last of another program than that one's."""
    if last is None:
        last = np.full(-(-shadow.size // shadow.grain), -1, np.int32)
    before = last[where]
    if before.max() >= 0:
        other = (before >= 0) & (launch.owners[before] != launch.owners[access])
        if other.any():
            if earlier is None:
                earlier = np.full(len(last), -1, np.int32)
            earlier[where] = np.where(other, before, earlier[where])
    last[where] = access
    return last, earlier


def _check_written(part: Part, where: Any, size: int, shape: tuple[int, ...], action: str) -> None:
    written = part.argument.shadow.initialised[where]
    if not written.all():
        first = _lane(part, int(np.flatnonzero(~written)[0]), size)
        what = f"{action} of memory of {part.argument.name} that nothing was ever written to"
        _found(part, "uninitialised", what, first, size, shape)


def _check_writers(
    launch: Launch, part: Part, where: Any, size: int, shape: tuple[int, ...], volatile: bool
) -> None:
    shadow = part.argument.shadow
    before = shadow.writers[where]
    _report(launch, part, before, size, shape, volatile, "written")
    if shadow.earlier_writers is not None:
        _report(launch, part, shadow.earlier_writers[where], size, shape, volatile, "written")
    for index in np.unique(before[before >= 0]).tolist():
        access = launch.accesses[index]
        own = access.program == launch.program and access.barrier == launch.barrier
        if own and not access.atomic:
            first = _lane(part, int(np.flatnonzero(before == index)[0]), size)
            line = shown(access.code, access.line)
            what = f"load of what this program stored at {line}, with no tl.debug_barrier() between"
            _found(part, "barrier", what, first, size, shape, access)
            return


def _report(
    launch: Launch, part: Part, before: Any, size: int, shape: Any, atomic: bool, what: str
) -> None:
    """Report the first access of another program that nothing orders before this one."""
    last = int(before.max())
    if last < 0:
        return
    indices = [last] if last == int(before.min()) else np.unique(before[before >= 0]).tolist()
    for index in indices:
        access = launch.accesses[index]
        if not _conflicts(launch, access, atomic):
            continue
        first = _lane(part, int(np.flatnonzero(before == index)[0]), size)
        line = shown(access.code, access.line)
        other = place_of(launch, access.program)
        text = f"{part.argument.name} is {what} by program {other} at {line}, in no order with this"
        _found(part, "race", text, first, size, shape, access)
        return


def _conflicts(launch: Launch, access: Access, atomic: bool) -> bool:
    if access.program == launch.program or (atomic and access.atomic):
        return False
    return not is_ordered(launch, access)


def _check_lanes(part: Part, size: int, shape: tuple[int, ...], values: Any) -> None:
    """Two lanes that store to one address must store one value."""
    offsets = part.offsets
    step = np.diff(offsets)
    if (step > 0).all() or (step < 0).all():
        return
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return
    flat = np.broadcast_to(values, shape).reshape(-1)
    flat = np.ascontiguousarray(flat if part.lanes is None else flat[part.lanes])
    bits = flat.view(f"u{flat.itemsize}")[order]
    wrong = same & (bits[1:] != bits[:-1])
    if wrong.any():
        second = int(order[int(np.flatnonzero(wrong)[0]) + 1])
        what = f"lanes of one store write different values to one element of {part.argument.name}"
        _found(part, "lanes", what, second, size, shape)


def _lane(part: Part, grain: int, size: int) -> int:
    """The position in the access of its n-th grain."""
    return grain // max(size // part.argument.shadow.grain, 1)


def _found(
    part: Part,
    kind: str,
    what: str,
    position: int,
    size: int,
    shape: tuple[int, ...],
    other: Access | None = None,
) -> None:
    lane = position if part.lanes is None else int(part.lanes[position])
    offset = int(part.offsets[position])
    found(
        kind,
        what,
        argument=part.argument.name,
        lane=tuple(int(i) for i in np.unravel_index(lane, shape)),
        offset=offset // size,
        address=offset,
        other=other,
    )

"""Which two accesses of different programs are in order, and which are the same memory."""

import pytest
import torch
import triton
import triton.language as tl

from tilewise.op import INTERPRETED
from tilewise.verify import sanitize

if not INTERPRETED:
    pytest.skip("Triton compiles in this process", allow_module_level=True)


def races(kernel, programs, *arguments, order="forward"):
    """What races are found, as (argument, offset, text of the line)."""
    with sanitize(order) as report:
        kernel[(programs,)](*arguments)
        found = [(f.kind, f.argument, f.offset, f.text) for f in report.findings]
        report.clear()
    assert {kind for kind, *_ in found} <= {"race"}
    return [(argument, offset, text) for _, argument, offset, text in found]


@triton.jit
def touch(x_ptr, sink_ptr, READERS: tl.constexpr, WRITER: tl.constexpr):
    program = tl.program_id(0)
    if program < READERS:
        tl.store(sink_ptr + program, tl.load(x_ptr))
    if program == WRITER:
        tl.store(x_ptr, 1.0)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("readers, writer", [(1, 1), (2, 1), (2, 0), (3, 1)])
def test_a_write_races_with_every_reader_but_the_writer_itself(readers, writer, order):
    found = races(touch, 3, torch.zeros(1), torch.zeros(4), readers, writer, order=order)
    assert [argument for argument, _, _ in found] == ["x_ptr"] * len(found)
    assert len(found) == len({text for _, _, text in found}) > 0


@pytest.mark.parametrize("readers, writer", [(1, 0), (3, 5), (0, 1)])
def test_a_write_of_what_only_the_writer_reads_is_no_race(readers, writer):
    assert races(touch, 3, torch.zeros(1), torch.zeros(4), readers, writer) == []


@triton.jit
def handed_over(x_ptr, flag_ptr, y_ptr, WRITE: tl.constexpr, READ: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(x_ptr + tl.arange(0, 16), tl.zeros([16], tl.float32) + 1)
        tl.atomic_add(flag_ptr, 1, sem=WRITE)
    else:
        tl.atomic_add(flag_ptr, 0, sem=READ)
        tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + tl.arange(0, 16)))


SEMANTICS = ["relaxed", "acquire", "release", "acq_rel"]


@pytest.mark.parametrize("read", SEMANTICS)
@pytest.mark.parametrize("write", SEMANTICS)
def test_a_release_and_an_acquire_make_an_order(write, read):
    arguments = torch.zeros(16), torch.zeros(1, dtype=torch.int32), torch.empty(16), write, read
    ordered = write in ("release", "acq_rel") and read in ("acquire", "acq_rel")
    found = races(handed_over, 2, *arguments)
    assert [(argument, offset) for argument, offset, _ in found] == (
        [] if ordered else [("x_ptr", 0)]
    )


@triton.jit
def handed_on(x_ptr, flags_ptr, y_ptr):
    """From program 0 to 1 to 2, each by its own flag."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(x_ptr, 1.0)
    if program > 0:
        tl.atomic_add(flags_ptr + program - 1, 0, sem="acquire")
    tl.atomic_xchg(flags_ptr + program, 1, sem="release")
    if program == 2:
        tl.store(y_ptr, tl.load(x_ptr))


def test_order_is_handed_on():
    flags = torch.zeros(3, dtype=torch.int32)
    assert races(handed_on, 3, torch.zeros(1), flags, torch.empty(1)) == []


@triton.jit
def written_after_the_release(x_ptr, flag_ptr, y_ptr):
    if tl.program_id(0) == 0:
        tl.atomic_xchg(flag_ptr, 1, sem="release")
        tl.store(x_ptr, 1.0)
    else:
        tl.atomic_add(flag_ptr, 0, sem="acquire")
        tl.store(y_ptr, tl.load(x_ptr))


def test_what_follows_a_release_is_not_in_order():
    flag = torch.zeros(1, dtype=torch.int32)
    [found] = races(written_after_the_release, 2, torch.zeros(1), flag, torch.empty(1))
    assert found == ("x_ptr", 0, "tl.store(y_ptr, tl.load(x_ptr))")


@triton.jit
def counted(count_ptr, y_ptr):
    tl.atomic_add(count_ptr, 1, sem="relaxed")
    if tl.program_id(0) == 2:
        tl.store(y_ptr, tl.load(count_ptr))


def test_ones_own_atomic_does_not_hide_those_of_others():
    count = torch.zeros(1, dtype=torch.int32)
    [found] = races(counted, 3, count, torch.empty(1, dtype=torch.int32))
    assert found == ("count_ptr", 0, "tl.store(y_ptr, tl.load(count_ptr))")


@triton.jit
def watched_flag(flag_ptr, y_ptr, VOLATILE: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.atomic_xchg(flag_ptr, 1)
    else:
        tl.store(y_ptr, tl.load(flag_ptr, volatile=VOLATILE))


def test_a_volatile_load_may_meet_atomics():
    flag, y = torch.zeros(2, 1, dtype=torch.int32)
    assert races(watched_flag, 2, flag, y, True) == []
    assert len(races(watched_flag, 2, flag, y, False)) == 1


@triton.jit
def two_views(a_ptr, b_ptr, sink_ptr, STEP: tl.constexpr):
    lane = tl.arange(0, 16)
    if tl.program_id(0) == 0:
        tl.store(a_ptr + lane * STEP, lane.to(a_ptr.dtype.element_ty))
    else:
        tl.store(sink_ptr + lane, tl.load(b_ptr + lane * STEP))


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 16, 47, 48, 64])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_views_of_one_storage_meet_where_they_overlap(start, step, order):
    whole = torch.zeros(128)
    a, b = whole[48:], whole[start:]
    written = {48 + step * i for i in range(16)}
    read = {start + step * i for i in range(16)}
    found = races(two_views, 2, a, b, torch.empty(16), step, order=order)
    assert bool(found) == bool(written & read)
    for argument, offset, _ in found:
        place = {"a_ptr": 48, "b_ptr": start}[argument] + offset
        assert place == min(written & read)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("wide_first", [True, False])
def test_an_element_is_all_of_its_bytes(wide_first, step):
    """The third byte of the twelfth int32, as one program's byte."""
    whole = torch.zeros(256, dtype=torch.int8)
    wide, third = whole.view(torch.int32), whole[step * 4 * 11 + 2 :][:1]
    order = "forward" if wide_first else "reverse"
    arguments = wide, third, torch.empty(1, dtype=torch.int8), step
    assert len(races(wide_and_byte, 2, *arguments, order=order)) == 1
    assert races(wide_and_byte, 2, wide, whole[255:], arguments[2], step, order=order) == []


@triton.jit
def wide_and_byte(wide_ptr, byte_ptr, sink_ptr, STEP: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(wide_ptr + tl.arange(0, 16) * STEP, tl.arange(0, 16))
    else:
        tl.store(sink_ptr, tl.load(byte_ptr))


@triton.jit
def lanes_to_one(y_ptr, value_ptr):
    lane = tl.arange(0, 16)
    tl.store(y_ptr + lane % 4, tl.load(value_ptr + lane))


def test_lanes_may_write_one_value_to_one_address():
    assert races(lanes_to_one, 1, torch.empty(4), torch.arange(16.0) % 4) == []
    with sanitize() as report:
        lanes_to_one[(1,)](torch.empty(4), torch.arange(16.0))
        [found] = report.findings
        report.clear()
    assert (found.kind, found.lane, found.offset) == ("lanes", (4,), 0)

"""Kernels with one bug each, on the line that says so, and without it if BUG is False."""

# ruff: noqa: SIM108 (a line of its own for the bug)

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def unmasked_load(y_ptr, x_ptr, n, BUG: tl.constexpr):
    col = tl.program_id(0) * 64 + tl.arange(0, 64)
    if BUG:
        x = tl.load(x_ptr + col)  # bug
    else:
        x = tl.load(x_ptr + col, mask=col < n, other=0.0)
    tl.store(y_ptr + col, x, mask=col < n)


@triton.jit
def unmasked_store(y_ptr, x_ptr, n, BUG: tl.constexpr):
    col = tl.program_id(0) * 64 + tl.arange(0, 64)
    x = tl.load(x_ptr + col, mask=col < n, other=0.0)
    if BUG:
        tl.store(y_ptr + col, x)  # bug
    else:
        tl.store(y_ptr + col, x, mask=col < n)


@triton.jit
def past_the_row(y_ptr, x_ptr, cols, x_stride, BUG: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, 64)
    end = cols + 1 if BUG else cols
    x = tl.load(x_ptr + row * x_stride + col, mask=col < end, other=0.0)  # bug
    tl.store(y_ptr + row * cols + col, x, mask=col < cols)


@triton.jit
def into_another(y_ptr, x_ptr, other_ptr, BUG: tl.constexpr):
    col = tl.arange(0, 64)
    start = 64 if BUG else 0
    x = tl.load(x_ptr + start + col)  # bug
    tl.store(y_ptr + col, x + tl.load(other_ptr + col))


@triton.jit
def before_the_start(y_ptr, x_ptr, BUG: tl.constexpr):
    col = tl.program_id(0) * 64 + tl.arange(0, 64)
    if BUG:
        left = tl.load(x_ptr + col - 1)  # bug
    else:
        left = tl.load(x_ptr + col - 1, mask=col > 0, other=0.0)
    tl.store(y_ptr + col, left)


@triton.jit
def wrong_stride(y_ptr, x_ptr, rows, cols, x_stride, BUG: tl.constexpr):
    row, col = tl.arange(0, 8)[:, None], tl.arange(0, 16)[None, :]
    inside = (row < rows) & (col < cols)
    stride = rows if BUG else x_stride
    x = tl.load(x_ptr + row * stride + col, mask=inside, other=0.0)  # bug
    tl.store(y_ptr + row * cols + col, x, mask=inside)


@triton.jit
def index_too_large(count_ptr, x_ptr, bins, BUG: tl.constexpr):
    index = tl.load(x_ptr + tl.arange(0, 64))
    if BUG:
        tl.atomic_add(count_ptr + index, 1)  # bug
    else:
        tl.atomic_add(count_ptr + index, 1, mask=index < bins)


@triton.jit
def never_written(y_ptr, scratch_ptr, x_ptr, BUG: tl.constexpr):
    col = tl.arange(0, 64)
    if not BUG:
        tl.store(scratch_ptr + col, tl.load(x_ptr + col))
        tl.debug_barrier()
    tl.store(y_ptr + col, tl.load(scratch_ptr + col))  # bug


@triton.jit
def sum_of_nothing(y_ptr, x_ptr, BUG: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * 64 + tl.arange(0, 64))
    tl.atomic_add(y_ptr + tl.arange(0, 64), x)  # bug


@triton.jit
def one_row_short(y_ptr, x_ptr, rows):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(x_ptr + row), mask=row < rows)


@triton.jit
def reads_all_rows(y_ptr, x_ptr, rows, BUG: tl.constexpr):
    row = tl.arange(0, 16)
    x = tl.load(x_ptr + row, mask=row < rows, other=0.0)  # bug
    tl.store(y_ptr + row, x)


@triton.jit
def plain_sum(y_ptr, x_ptr, BUG: tl.constexpr):
    col = tl.arange(0, 64)
    x = tl.load(x_ptr + tl.program_id(0) * 64 + col)
    if BUG:
        tl.store(y_ptr + col, tl.load(y_ptr + col) + x)  # bug
    else:
        tl.atomic_add(y_ptr + col, x)


@triton.jit
def overlapping_blocks(y_ptr, x_ptr, BUG: tl.constexpr):
    step = 63 if BUG else 64
    col = tl.program_id(0) * step + tl.arange(0, 64)
    tl.store(y_ptr + col, tl.load(x_ptr + col))  # bug


@triton.jit
def shift_in_place(y_ptr, x_ptr, n, BUG: tl.constexpr):
    col = tl.program_id(0) * 64 + tl.arange(0, 64)
    next_one = tl.load(x_ptr + col + 1, mask=col + 1 < n, other=0.0)
    if BUG:
        tl.store(x_ptr + col, next_one, mask=col < n)  # bug
    else:
        tl.store(y_ptr + col, next_one, mask=col < n)


@triton.jit
def last_program(y_ptr, part_ptr, count_ptr, x_ptr, BUG: tl.constexpr):
    program = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + program * 64 + tl.arange(0, 64)), 0)
    tl.store(part_ptr + program, total)
    if BUG:
        done = tl.atomic_add(count_ptr, 1, sem="relaxed")
        tl.debug_barrier()
    else:
        done = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        parts = tl.load(part_ptr + tl.arange(0, 8))  # bug
        tl.store(y_ptr, tl.sum(parts, 0))


@triton.jit
def locked_sum(y_ptr, lock_ptr, x_ptr, BUG: tl.constexpr):
    col = tl.arange(0, 64)
    x = tl.load(x_ptr + tl.program_id(0) * 64 + col)
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
        pass
    y = tl.load(y_ptr + col) + x  # bug
    tl.store(y_ptr + col, y)
    tl.debug_barrier()
    if BUG:
        tl.atomic_xchg(lock_ptr, 0, sem="relaxed")
    else:
        tl.atomic_xchg(lock_ptr, 0, sem="release")


@triton.jit
def read_of_a_counter(y_ptr, count_ptr, BUG: tl.constexpr):
    count = tl.atomic_add(count_ptr, 1, sem="relaxed")
    if BUG:
        count = tl.load(count_ptr)  # bug
    tl.store(y_ptr + tl.program_id(0), count)


@triton.jit
def own_scratch(y_ptr, scratch_ptr, x_ptr, BUG: tl.constexpr):
    col = tl.arange(0, 64)
    tl.store(scratch_ptr + col, tl.load(x_ptr + col))
    if not BUG:
        tl.debug_barrier()
    tl.store(y_ptr + col, tl.load(scratch_ptr + 63 - col))  # bug


@triton.jit
def two_values(y_ptr, BUG: tl.constexpr):
    lane = tl.arange(0, 16)
    place = lane // 2 if BUG else lane
    tl.store(y_ptr + place, lane)  # bug


@triton.jit
def not_a_multiple(y_ptr, x_ptr, start, BUG: tl.constexpr):
    start = tl.multiple_of(start, 16)  # bug
    col = start + tl.arange(0, 16)
    tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + col))


@triton.jit
def not_contiguous(y_ptr, x_ptr, index_ptr, BUG: tl.constexpr):
    col = tl.load(index_ptr + tl.arange(0, 16))
    col = tl.max_contiguous(col, 16)  # bug
    tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + col))


@triton.jit
def not_constant(y_ptr, x_ptr, divisor, BUG: tl.constexpr):
    group = tl.max_constancy(tl.arange(0, 16) // divisor, 4)  # bug
    tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + group))


@triton.jit
def offset_in_32_bits(y_ptr, x_ptr, stride, BUG: tl.constexpr):
    row = tl.program_id(0)
    if BUG:
        start = row * stride  # bug
    else:
        start = tl.cast(row, tl.int64) * stride
    col = (start + tl.arange(0, 64)) % 64
    tl.store(y_ptr + row * 64 + tl.arange(0, 64), tl.load(x_ptr + tl.abs(col)))


@triton.jit
def descriptor_too_tall(y_ptr, x_ptr, rows, BUG: tl.constexpr):
    height = rows + 4 if BUG else rows
    x = tl.make_tensor_descriptor(x_ptr, [height, 16], [16, 1], [8, 16])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 16], [16, 1], [8, 16])
    y.store([tl.program_id(0) * 8, 0], x.load([tl.program_id(0) * 8, 0]))  # bug


@triton.jit
def host_descriptor(y, x, start, BUG: tl.constexpr):
    tile = x.load([start, 0])  # bug
    y.store([0, 0], tile)


@triton.jit
def wide_words(y_ptr, x_ptr, BUG: tl.constexpr):
    start = 2 if BUG else 4
    words = (x_ptr + start).to(tl.pointer_type(tl.int32))
    x = tl.load(words + tl.arange(0, 8))  # bug
    tl.store(y_ptr + tl.arange(0, 8), x)


@triton.jit
def wrong_assertion(y_ptr, x_ptr, BUG: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    limit = 15 if BUG else 16
    tl.device_assert(x < limit, "an index past the end")  # bug
    tl.store(y_ptr + tl.arange(0, 16), x)


@triton.jit
def waits_for_the_next(y_ptr, flag_ptr):
    flag = tl.program_id(0)
    tl.atomic_xchg(flag_ptr + flag, 1, sem="release")
    while tl.atomic_add(flag_ptr + flag + 1, 0, sem="acquire") == 0:  # bug
        pass
    tl.store(y_ptr + flag, 1)


@dataclass(frozen=True)
class Seeded:
    """What must be found, and a launch with the bug or without."""

    kernel: object
    kind: str
    argument: str | None
    run: Callable[[bool], None]


def _normal(*shape):
    return torch.randn(shape)


def _empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def _counter(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def _short_then_all(bug):
    y = _empty(11)
    one_row_short[(11,)](y, _normal(11), 10 if bug else 11)
    reads_all_rows[(1,)](_empty(16), y, 11, bug)


def _adjacent(bug):
    both = _normal(128)
    into_another[(1,)](_empty(64), both[:64], both[64:], bug)


def _described(bug):
    x = TensorDescriptor.from_tensor(_normal(16, 16), [8, 16])
    if bug:
        x.shape = [24, 16]
    y = TensorDescriptor.from_tensor(_empty(8, 16), [8, 16])
    host_descriptor[(1,)](y, x, 16 if bug else 8, bug)


def _halves(bug):
    x = torch.arange(64, dtype=torch.int8)
    wide_words[(1,)](_empty(8, dtype=torch.int32), x, bug)


SEEDED = [
    Seeded(unmasked_load, "out of bounds", "x_ptr",
           lambda bug: unmasked_load[(4,)](_empty(200), _normal(200), 200, bug)),
    Seeded(unmasked_store, "out of bounds", "y_ptr",
           lambda bug: unmasked_store[(4,)](_empty(200), _normal(200), 200, bug)),
    Seeded(past_the_row, "out of bounds", "x_ptr",
           lambda bug: past_the_row[(4,)](_empty(4, 50), _normal(4, 64)[:, :50], 50, 64, bug)),
    Seeded(into_another, "out of bounds", "x_ptr", _adjacent),
    Seeded(before_the_start, "out of bounds", "x_ptr",
           lambda bug: before_the_start[(2,)](_empty(128), _normal(128), bug)),
    Seeded(wrong_stride, "out of bounds", "x_ptr",
           lambda bug: wrong_stride[(1,)](_empty(7, 12), _normal(7, 20)[:, :12], 7, 12, 20, bug)),
    Seeded(index_too_large, "out of bounds", "count_ptr",
           lambda bug: index_too_large[(2,)](_counter(60), torch.arange(64), 60, bug)),
    Seeded(never_written, "uninitialised", "scratch_ptr",
           lambda bug: never_written[(1,)](_empty(64), _empty(64), _normal(64), bug)),
    Seeded(sum_of_nothing, "uninitialised", "y_ptr",
           lambda bug: sum_of_nothing[(4,)](
               _empty(64) if bug else torch.zeros(64), _normal(256), bug)),
    Seeded(reads_all_rows, "uninitialised", "x_ptr", _short_then_all),
    Seeded(plain_sum, "race", "y_ptr",
           lambda bug: plain_sum[(4,)](torch.zeros(64), _normal(256), bug)),
    Seeded(overlapping_blocks, "race", "y_ptr",
           lambda bug: overlapping_blocks[(4,)](_empty(256), _normal(256), bug)),
    Seeded(shift_in_place, "race", "x_ptr",
           lambda bug: shift_in_place[(4,)](_empty(256), _normal(256), 256, bug)),
    Seeded(last_program, "race", "part_ptr",
           lambda bug: last_program[(8,)](_empty(1), _empty(8), _counter(1), _normal(512), bug)),
    Seeded(locked_sum, "race", "y_ptr",
           lambda bug: locked_sum[(4,)](torch.zeros(64), _counter(1), _normal(256), bug)),
    Seeded(read_of_a_counter, "race", "count_ptr",
           lambda bug: read_of_a_counter[(4,)](_empty(4, dtype=torch.int32), _counter(1), bug)),
    Seeded(own_scratch, "barrier", "scratch_ptr",
           lambda bug: own_scratch[(1,)](_empty(64), _empty(64), _normal(64), bug)),
    Seeded(two_values, "lanes", "y_ptr",
           lambda bug: two_values[(1,)](_empty(16, dtype=torch.int32), bug)),
    Seeded(not_a_multiple, "hint", None,
           lambda bug: not_a_multiple[(1,)](_empty(16), _normal(64), 8 if bug else 16, bug)),
    Seeded(not_contiguous, "hint", None,
           lambda bug: not_contiguous[(1,)](
               _empty(16), _normal(64), torch.arange(0, 64, 2 if bug else 1), bug)),
    Seeded(not_constant, "hint", None,
           lambda bug: not_constant[(1,)](_empty(16), _normal(16), 3 if bug else 4, bug)),
    Seeded(offset_in_32_bits, "overflow", None,
           lambda bug: offset_in_32_bits[(3,)](_empty(192), _normal(64), 2**30 + 1, bug)),
    Seeded(descriptor_too_tall, "out of bounds", "x_ptr",
           lambda bug: descriptor_too_tall[(2,)](_empty(12, 16), _normal(12, 16), 12, bug)),
    Seeded(host_descriptor, "out of bounds", "x", _described),
    Seeded(wide_words, "misaligned", "x_ptr", _halves),
    Seeded(wrong_assertion, "assertion", None,
           lambda bug: wrong_assertion[(1,)](
               _empty(16, dtype=torch.int64), torch.arange(16), bug)),
]  # fmt: skip

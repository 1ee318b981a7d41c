"""What the sanitizer takes for written, for inside, and for the same memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilewise.op import INTERPRETED
from tilewise.verify import sanitize, session

if not INTERPRETED:
    pytest.skip("Triton compiles in this process", allow_module_level=True)

BYTES = [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
WORDS = [torch.float16, torch.bfloat16, torch.int16, torch.float32, torch.int32, torch.int64]


@triton.jit
def copy(y_ptr, x_ptr, n, N: tl.constexpr):
    col = tl.arange(0, N)
    tl.store(y_ptr + col, tl.load(x_ptr + col, mask=col < n), mask=col < n)


def found_by(function):
    """What is found when it runs, as (kind, argument, lane)."""
    with sanitize() as report:
        function()
        found = [(f.kind, f.argument, f.lane) for f in report.findings]
        report.clear()
    return found


def test_every_test_here_is_watched():
    assert session.active is not None
    assert session.active.order == "random"


@pytest.mark.parametrize("dtype", BYTES + WORDS)
def test_memory_is_written_by_kernels_and_read_by_the_next(dtype):
    def run():
        x, y = torch.zeros(64).to(dtype), torch.empty(64, dtype=dtype)
        copy[(1,)](y, x, 32, 64)
        copy[(1,)](torch.empty(64, dtype=dtype), y, 32, 64)
        copy[(1,)](torch.empty(64, dtype=dtype), y, 33, 64)

    assert found_by(run) == [("uninitialised", "x_ptr", (32,))]


@triton.jit
def copy_all(y_ptr, x_ptr, n, OTHER: tl.constexpr, N: tl.constexpr):
    col = tl.arange(0, N)
    tl.store(y_ptr + col, tl.load(x_ptr + col, mask=col < n, other=OTHER))


@pytest.mark.parametrize("other", [None, 0])
@pytest.mark.parametrize("dtype", WORDS)
def test_what_a_mask_leaves_out_is_undefined_without_other(dtype, other):
    x, y = torch.ones(64).to(dtype), torch.zeros(64).to(dtype)
    copy_all[(1,)](y, x, 20, other, 64)
    assert torch.equal(y[:20], x[:20])
    undefined = y[20:].isnan() if dtype.is_floating_point else y[20:] == -1
    assert bool(undefined.all()) == (other is None)


WRITES = {
    "fill_": lambda t: t.fill_(0),
    "copy_": lambda t: t.copy_(torch.zeros(64).to(t.dtype)),
    "a slice": lambda t: t[:].zero_(),
    "numpy": lambda t: t.view(torch.uint8).numpy().fill(0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32])
def test_memory_written_on_the_host_is_written(dtype, write):
    def run():
        x = torch.empty(64, dtype=dtype)
        write(x)
        copy[(1,)](torch.empty(64, dtype=dtype), x, 64, 64)

    assert found_by(run) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool])
def test_bytes_that_look_empty_are_written_if_torch_wrote_them(dtype):
    """Every byte is a number: nothing can be kept for memory that was never written."""

    def run():
        x = torch.empty(64, dtype=dtype)
        x.copy_(x.clone())
        copy[(1,)](torch.empty(64, dtype=dtype), x, 64, 64)

    assert found_by(run) == []


MAKERS = {
    "empty": lambda: torch.empty(64),
    "empty_like": lambda: torch.empty_like(torch.ones(64)),
    "empty_strided": lambda: torch.empty_strided((64,), (1,)),
    "empty_permuted": lambda: torch.empty_permuted((64,), (0,)),
    "new_empty": lambda: torch.ones(1).new_empty(64),
    "new_empty_strided": lambda: torch.ones(1).new_empty_strided((64,), (1,)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_each_way_to_empty_memory(make):
    def run():
        copy[(1,)](torch.zeros(64), make(), 64, 64)

    assert found_by(run) == [("uninitialised", "x_ptr", (0,))]
    with sanitize():
        assert make().isnan().all()  # and so an output that nobody wrote is seen


ALONE = """
import torch
from tilewise.verify import sanitize

before = torch.empty, torch.Tensor.new_empty
with sanitize():
    assert torch.empty is not before[0]
    with torch.device("meta"), sanitize():
        assert torch.empty(2).is_meta and torch.empty_strided((2,), (1,)).is_meta
        assert not torch.empty(2, device="cpu").is_meta
    assert torch.empty(2).isnan().all()
assert (torch.empty, torch.Tensor.new_empty) == before
"""


def test_a_default_device_is_obeyed_and_all_is_put_back():
    """In a process of its own: PyTorch remembers the first functions that it was asked about."""
    subprocess.run([sys.executable, "-c", ALONE], check=True)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -1])
def test_numbers_that_look_empty_are_not(special):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((64,), special, dtype=dtype)
        assert found_by(lambda x=x: copy[(1,)](torch.empty_like(x), x, 64, 64)) == []


def test_the_view_decides_not_the_storage():
    x = torch.zeros(8, 64)
    views = [x[2], x.T[3], x[:, ::2][1], x[1].expand(2, 64)[0], x.view(-1)[5:70]]
    for view in views:
        inside = view.stride(0) == 1 and view.numel() >= 64
        found = found_by(lambda v=view: copy[(1,)](torch.empty(64), v, 64, 64))
        assert found == ([] if inside else [("out of bounds", "x_ptr", found[0][2])])
    assert found_by(lambda: copy[(1,)](torch.empty(64), x[:0], 1, 64)) == [
        ("out of bounds", "x_ptr", (0,))
    ]


@triton.jit
def of_a_tuple(out_ptr, pair, n):
    for i in tl.static_range(2):
        col = tl.arange(0, 64)
        tl.store(out_ptr + i * 64 + col, tl.load(pair[i] + col, mask=col < n))


def test_tensors_within_a_tuple_are_named_by_their_index():
    pair = torch.zeros(64), torch.zeros(60)
    assert found_by(lambda: of_a_tuple[(1,)](torch.empty(128), pair, 60)) == []
    found = found_by(lambda: of_a_tuple[(1,)](torch.empty(128), pair, 61))
    assert found == [("out of bounds", "pair[1]", (60,))]


@triton.jit
def through_a_table(out_ptr, table_ptr, n, past):
    program, col = tl.program_id(0), tl.arange(0, 16)
    x_ptr = tl.load(table_ptr + program).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + program * 16 + col, tl.load(x_ptr + past + col, mask=col < n))


def test_pointers_read_from_memory_must_lead_to_a_tensor():
    tensors = [torch.ones(16) * i for i in range(3)]
    table, out = torch.tensor([t.data_ptr() for t in tensors]), torch.empty(48)
    assert found_by(lambda: through_a_table[(3,)](out, table, 16, 0)) == []
    assert out.tolist() == [i // 16 for i in range(48)]
    without_memory = torch._to_functional_tensor(torch.ones(3))  # as torch.compile leaves behind
    found = found_by(lambda: through_a_table[(1,)](out, torch.tensor([64]), 16, 0))
    assert found == [("out of bounds", None, (0,))]
    del without_memory


@triton.jit
def swap_halves(x_ptr, y_ptr, N: tl.constexpr):
    col = tl.program_id(0) * N + tl.arange(0, N)
    other = (1 - tl.program_id(0)) * N + tl.arange(0, N)
    tl.store(y_ptr + col, tl.load(x_ptr + other))


def test_two_arguments_may_be_the_same_memory():
    x = torch.arange(32.0)
    assert found_by(lambda: swap_halves[(2,)](x, torch.empty(32), 16)) == []
    kinds = {kind for kind, _, _ in found_by(lambda: swap_halves[(2,)](x, x, 16))}
    assert kinds == {"race"}


@triton.jit
def bytes_and_words(words_ptr, bytes_ptr, start, WORDS_FIRST: tl.constexpr):
    """One program writes the words, the other the bytes from `start` on."""
    if (tl.program_id(0) == 0) == WORDS_FIRST:
        tl.store(words_ptr + tl.arange(0, 8), tl.zeros([8], tl.int32))
    else:
        tl.store(bytes_ptr + start + tl.arange(0, 16), tl.zeros([16], tl.int8))


@pytest.mark.parametrize("words_first", [True, False])
def test_memory_seen_as_elements_of_different_sizes(words_first):
    x = torch.zeros(12, dtype=torch.int32)
    raw = x.view(torch.int8)
    assert found_by(lambda: bytes_and_words[(2,)](x, raw, 32, words_first)) == []
    found = found_by(lambda: bytes_and_words[(2,)](x, raw, 31, words_first))
    assert found == [("race", "bytes_ptr", (0,)) if words_first else ("race", "words_ptr", (7,))]


@triton.jit
def narrow_casts(y_ptr, x_ptr):
    col = tl.arange(0, 32)
    low = tl.load((x_ptr).to(tl.pointer_type(tl.int16)) + col)
    tl.store(y_ptr.to(tl.pointer_type(tl.int8)) + col, low.to(tl.int8))


def test_pointers_that_were_cast():
    x, y = torch.arange(16, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    assert found_by(lambda: narrow_casts[(1,)](y, x)) == []
    assert y.view(torch.int8).tolist() == x.view(torch.int16).tolist()
    found = found_by(lambda: narrow_casts[(1,)](y, x[:15]))
    assert found == [("out of bounds", "x_ptr", (30,))]


@triton.jit
def chosen(y_ptr, a_ptr, b_ptr):
    col = tl.arange(0, 32)
    place = tl.where(col < 16, a_ptr + col, b_ptr + col)
    tl.store(y_ptr + col, tl.load(place))


def test_lanes_of_one_load_may_come_from_different_arguments():
    a, b, y = torch.zeros(16), torch.ones(32), torch.empty(32)
    assert found_by(lambda: chosen[(1,)](y, a, b)) == []
    assert torch.equal(y, (torch.arange(32) >= 16).float())
    assert found_by(lambda: chosen[(1,)](y, a[:12], b[:30])) == [
        ("out of bounds", "a_ptr", (12,)),
        ("out of bounds", "b_ptr", (30,)),
    ]


@triton.jit
def gathered(y_ptr, x, index_ptr):
    rows = tl.load(index_ptr + tl.arange(0, 8))
    tile = x.gather(rows, 0)
    place = tl.arange(0, 8)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(y_ptr + place, tile)


@triton.jit
def reduced(y, x_ptr):
    place = tl.arange(0, 8)[:, None] * 32 + tl.arange(0, 32)[None, :]
    y.atomic_add([0, 0], tl.load(x_ptr + place))


def test_gathers_and_reductions_of_descriptors():
    x, rows = (
        torch.randint(-9, 9, (16, 32)).float(),
        torch.tensor([3, 1, 15, 0, 2, 2, 9, 8], dtype=torch.int32),
    )
    y, total = torch.empty(8, 32), torch.ones(8, 32)
    with sanitize():
        gathered[(1,)](y, TensorDescriptor.from_tensor(x, [1, 32]), rows)
        reduced[(2,)](TensorDescriptor.from_tensor(total, [8, 32]), y)
    assert torch.equal(y, x[rows.long()])
    assert torch.equal(total, 1 + 2 * y)


@triton.jit
def described(y_ptr, x_ptr, stride):
    x = tl.make_tensor_descriptor(x_ptr, [8, 30], [stride, 1], [8, 32])
    place = tl.arange(0, 8)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(y_ptr + place, x.load([0, 0]))


def test_a_descriptor_that_hardware_cannot_have():
    with sanitize() as report:
        with pytest.raises(Exception, match="16-byte aligned"):
            described[(1,)](torch.empty(8, 32), torch.zeros(8, 30), 30)
        [found] = report.findings
        report.clear()
    assert (found.kind, found.what) == ("descriptor", "stride must be 16-byte aligned")
    assert found.text.startswith("x = tl.make_tensor_descriptor(")


def test_a_function_under_compile_may_make_empty_memory():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return torch.empty(4).fill_(1) + x.new_empty(4).fill_(2)

    with sanitize():
        assert torch.equal(function(torch.zeros(4)), torch.full((4,), 3.0))
        assert np.asarray(torch.vmap(lambda t: t.new_empty(2).fill_(1) + t)(torch.ones(3, 2))).all()

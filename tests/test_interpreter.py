"""The repaired interpreter computes as PyTorch and the hardware do, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tilewise.check import compare
from tilewise.op import INTERPRETED
from tilewise.verify import formats, sanitize

if not INTERPRETED:
    pytest.skip("Triton compiles in this process", allow_module_level=True)

from tilewise.verify.intrinsics import LIBDEVICE, register_inline_assembly

SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, 500.0, -1e9, 3e38, 1e-40, 448.0, 464.0, 465.0]
SPECIAL += [57344.0, 61440.0, 61441.0, 2.0**-9, 2.0**-10, 3 * 2.0**-11, float("nan")]
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def values(count=4096):
    torch.manual_seed(0)
    x = torch.randn(count) * torch.exp2(torch.randint(-20, 20, (count,)))
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


def same(ours, theirs):
    """The same bits, but for those of a NaN."""
    ours, theirs = ours.double(), theirs.double()
    return torch.equal(ours.nan_to_num(1e300), theirs.nan_to_num(1e300)) and torch.equal(
        ours.signbit()[~ours.isnan()], theirs.signbit()[~theirs.isnan()]
    )


@triton.jit
def cast(y_ptr, x_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    tl.store(y_ptr + col, tl.load(x_ptr + col).to(y_ptr.dtype.element_ty))


def casted(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    cast[(1,)](y, x, x.numel())
    return y


FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("source, target", list(itertools.permutations(FLOATS, 2)))
def test_casts_between_floats(source, target):
    x = values().to(source)
    assert same(casted(x, target), x.to(target))


@pytest.mark.parametrize("target", FLOAT8)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_to_8_bits_saturate(source, target):
    x = values().to(source)
    x[len(SPECIAL)] = torch.inf
    limit = FLOAT8[target]
    assert same(casted(x, target).float(), x.float().clamp(-limit, limit).to(target).float())


@pytest.mark.parametrize("source", FLOAT8)
def test_casts_from_8_bits(source):
    x = torch.arange(256, dtype=torch.uint8).view(source)
    for target in FLOATS:
        assert same(casted(x, target), x.to(target))


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_casts_of_integers_to_bfloat16_and_back(kind):
    largest = min(torch.iinfo(kind).max, 2**24)  # PyTorch goes through fp32
    x = torch.randint(-largest, largest, (4096,)).to(kind)
    y = casted(x, torch.bfloat16)
    assert torch.equal(y, x.to(torch.bfloat16))
    assert torch.equal(casted(y, torch.int32), y.to(torch.int32))


def test_fp64_is_rounded_once_to_bfloat16():
    half = 2.0**-8  # of a step at 1; in fp32 the first and the third are ties already
    x = torch.tensor(
        [1 + half + 2.0**-40, 1 + half, 1 + 3 * half - 2.0**-40, 1e300], dtype=torch.float64
    )
    expected = torch.tensor([1 + 2.0**-7, 1.0, 1 + 2.0**-7, torch.inf])
    assert torch.equal(casted(x, torch.bfloat16).float(), expected)


@triton.jit
def cut(y_ptr, x_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    x = tl.load(x_ptr + col)
    tl.store(y_ptr + col, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_rounding_towards_zero(target):
    x = values()
    x = x[x.abs() < 6e4][:2048]
    y = torch.empty(x.shape, dtype=target)
    cut[(1,)](y, x, 2048)
    assert (y.float().abs() <= x.abs()).all()
    further = torch.nextafter(y, torch.full_like(x, torch.inf).copysign(x).to(target))
    assert (further.float().abs() > x.abs()).all()


@triton.jit
def arithmetic(out_ptr, x_ptr, y_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    x, y = tl.load(x_ptr + col), tl.load(y_ptr + col)
    tl.store(out_ptr + col, x + y)
    tl.store(out_ptr + N + col, x - y)
    tl.store(out_ptr + 2 * N + col, x * y)
    tl.store(out_ptr + 3 * N + col, -x)
    tl.store(out_ptr + 4 * N + col, tl.abs(x))
    tl.store(out_ptr + 5 * N + col, tl.maximum(x, y))
    tl.store(out_ptr + 6 * N + col, tl.where(x < y, x, y))
    tl.store(out_ptr + 7 * N + col, tl.where((x >= 0) & (x != y), x, y))
    tl.store(out_ptr + 8 * N + col, tl.fma(x, y, x))


def test_bfloat16_arithmetic():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1024).bfloat16()
    out = torch.empty(9, 1024, dtype=torch.bfloat16)
    arithmetic[(1,)](out, x, y, 1024)
    fma = (x.double() * y.double() + x.double()).bfloat16()
    chosen = torch.where((x >= 0) & (x != y), x, y)
    expected = [x + y, x - y, x * y, -x, x.abs(), torch.maximum(x, y), torch.minimum(x, y), chosen]
    for row, (ours, theirs) in enumerate(zip(out, [*expected, fma], strict=True)):
        assert torch.equal(ours, theirs), row


@triton.jit
def quotient(out_ptr, x_ptr, y_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    tl.store(out_ptr + col, tl.load(x_ptr + col) / tl.load(y_ptr + col))


def test_bfloat16_division():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1024).bfloat16()
    out = torch.empty_like(x)
    quotient[(1,)](out, x, y, 1024)
    assert torch.equal(out, x / y)


@triton.jit
def product(out_ptr, x_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + row * N + col), tl.load(y_ptr + row * N + col)
    tl.store(out_ptr + row * N + col, tl.dot(x, y, input_precision=PRECISION))


def multiplied(x, y, precision="ieee"):
    out = torch.empty(64, 64)
    product[(1,)](out, x, y, 64, precision)
    return out


def assert_as_in_fp32(ours, x, y):
    error, allowed = compare(ours, x.float() @ y.float(), x.double() @ y.double())
    assert error <= allowed


def test_bfloat16_products_accumulate_in_fp32():
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, 64).bfloat16()
    assert_as_in_fp32(multiplied(x, y), x, y)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_8_bit_products(dtype):
    torch.manual_seed(0)
    x, y = (t.to(dtype) for t in torch.randn(2, 64, 64))
    assert_as_in_fp32(multiplied(x, y), x, y)


def test_tf32_products_read_no_more_than_tf32():
    """Integers of 11 bits are exact in TF32; what lies below is not read."""
    torch.manual_seed(0)
    x, y = torch.randint(1024, 2048, (2, 64, 64)).float()
    below = torch.rand(64, 64) * 0.999
    assert torch.equal(multiplied(x + below, y, "tf32"), multiplied(x, y, "ieee"))
    assert not torch.equal(multiplied(x + below, y, "ieee"), multiplied(x, y, "ieee"))
    assert_as_in_fp32(multiplied(x + below, y, "tf32x3"), x + below, y)


@triton.jit
def atomic_sum(out_ptr, x_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    tl.atomic_add(out_ptr + col % 4, tl.load(x_ptr + col))


def test_bfloat16_atomics_add_one_after_the_other():
    torch.manual_seed(0)
    x, out = torch.randn(64).bfloat16(), torch.zeros(4, dtype=torch.bfloat16)
    atomic_sum[(1,)](out, x, 64)
    expected = torch.zeros(4, dtype=torch.bfloat16)
    for row in x.view(16, 4):
        expected += row
    assert torch.equal(out, expected)


@triton.jit
def _logaddexp(x, x_sum, y, y_sum):
    top = tl.maximum(x, y)
    return top, x_sum * tl.exp(x - top) + y_sum * tl.exp(y - top)


@triton.jit
def _concatenated(x, y):
    return tl.where(y < 0, x, y)  # the last that is not negative: associative, not commutative


@triton.jit
def own_functions(lse_ptr, last_ptr, suffix_ptr, x_ptr, i_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
    x, i = tl.load(x_ptr + row * N + col), tl.load(i_ptr + row * N + col)
    top, total = tl.reduce((x, x * 0 + 1), 1, _logaddexp)
    tl.store(lse_ptr + tl.arange(0, ROWS), top + tl.log(total))
    tl.store(last_ptr + row * N + col, tl.associative_scan(i, 1, _concatenated))
    tl.store(suffix_ptr + row * N + col, tl.associative_scan(i, 1, _concatenated, reverse=True))


def test_reductions_and_scans_with_functions_of_the_kernel():
    torch.manual_seed(0)
    x, i = torch.randn(4, 32), torch.randint(-5, 5, (4, 32))
    lse, last, suffix = torch.empty(4), torch.empty_like(i), torch.empty_like(i)
    own_functions[(1,)](lse, last, suffix, x, i, 4, 32)
    assert torch.allclose(lse, x.logsumexp(1))
    for ours, sequence in ((last, i), (suffix.flip(1), i.flip(1))):
        for row, given in zip(ours.tolist(), sequence.tolist(), strict=True):
            running = list(itertools.accumulate(given, lambda a, b: a if b < 0 else b))
            assert row == running


@triton.jit
def ranks(sorted_ptr, best_ptr, sum_ptr, x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(sorted_ptr + tl.arange(0, N), tl.sort(x, descending=True))
    tl.store(best_ptr + tl.arange(0, 8), tl.topk(x, 8))
    tl.store(sum_ptr + tl.arange(0, N), tl.cumsum(x, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sort_and_topk(dtype):
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (256,)).to(dtype)  # all sums are exact
    ordered, best, total = torch.empty_like(x), torch.empty(8, dtype=dtype), torch.empty_like(x)
    ranks[(1,)](ordered, best, total, x, 256)
    assert torch.equal(ordered, x.sort(descending=True).values)
    assert torch.equal(best, ordered[:8])
    assert torch.equal(total, x.cumsum(0))


@triton.jit
def of_libdevice(y_ptr, x_ptr, N: tl.constexpr):
    col = tl.arange(0, N)
    x = tl.load(x_ptr + col)
    tl.store(y_ptr + col, libdevice.tanh(x))
    tl.store(y_ptr + N + col, libdevice.erf(x))
    tl.store(y_ptr + 2 * N + col, tl.where(libdevice.isnan(x) != 0, 1.0, libdevice.pow(x, x)))
    tl.store(y_ptr + 3 * N + col, libdevice.popc(col).to(tl.float32))


def test_functions_of_libdevice():
    x, y = torch.rand(64) + 0.5, torch.empty(4, 64)
    of_libdevice[(1,)](y, x, 64)
    assert torch.allclose(y[:3], torch.stack([x.tanh(), x.erf(), x**x]))
    assert y[3].tolist() == [i.bit_count() for i in range(64)]
    assert len(LIBDEVICE) >= 40


@triton.jit
def unknown_function(y_ptr):
    tl.store(y_ptr, libdevice.j0(tl.load(y_ptr)))


@triton.jit
def unknown_assembly(y_ptr):
    x = tl.load(y_ptr)
    x = tl.inline_asm_elementwise("neg.f32  $0, $1;", "=f,f", [x], tl.float32, True, 1)
    tl.store(y_ptr, x)


@pytest.mark.parametrize(
    "kernel, says",
    [
        (
            unknown_function,
            r"libdevice.j0 must be emulated, but is not, at .*: tl.store\(y_ptr, lib",
        ),
        (
            unknown_assembly,
            r"inline assembly must be known by .*, got .*neg.f32 .* at .*py:\d+: x = tl.inl",
        ),
    ],
)
def test_what_is_not_emulated_says_so_and_where(kernel, says):
    with pytest.raises(Exception, match=says):
        kernel[(1,)](torch.ones(1))


@triton.jit
def own_assembly(y_ptr, x_ptr):
    col = tl.arange(0, 16)
    x = tl.load(x_ptr + col)
    y = tl.inline_asm_elementwise("abs.f32 $0,   $1;", "=f,f", [x], tl.float32, True, 1)
    tl.store(y_ptr + col, y)


def test_inline_assembly_can_be_registered():
    register_inline_assembly("abs.f32 $0, $1;", abs)
    x, y = torch.randn(16), torch.empty(16)
    own_assembly[(1,)](y, x)
    assert torch.equal(y, x.abs())


@triton.autotune(
    configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})],
    key=["n"],
    reset_to_zero=["count_ptr"],
)
@triton.jit
def tuned(y_ptr, count_ptr, n, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(count_ptr, 1)
    tl.store(y_ptr + col, BLOCK, mask=col < n)


def test_autotuning_takes_one_configuration():
    seen = []
    for seed in range(2):
        y, count = torch.empty(200, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        with sanitize("random", seed):
            tuned[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](y, count, 200)
        seen.append((y.unique().tolist(), count.item()))
    assert seen == [([64], 4), ([128], 2)]


def test_encoding_is_the_inverse_of_decoding():
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = formats.decode(every, "bf16")
    known = ~np.isnan(numbers)
    assert (formats.encode(numbers, "bf16")[known] == every[known]).all()

"""The microkernels that multiply on a CPU, each by itself; and ops with each of those it has."""

import pytest
import torch

from tilewise.check import check, failures
from tilewise.op import OPS

pytest.importorskip("numba")

from tilewise.kernels.numba import attention
from tilewise.kernels.numba._amx import multiplies_tiles, release_tiles, use_tiles
from tilewise.kernels.numba._matmul import ADD, HEIGHT, LANES, SET, UNIT, multiply
from tilewise.kernels.numba._operands import MULTIPLIES_PAIRS, PAIR, TILED_PAIR
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._simd import address, kind, pointer

NUMBER = kind(torch.zeros(0))
BEYOND = 7.0  # what lies around a result


@Kernel
def _multiply(
    task, c_at, c_stride, a_at, a_row, b_at, b_stride, rows, cols, depth, old, c_kind, word_kind
):
    a, b = pointer(a_at, word_kind), pointer(b_at, word_kind)
    use_tiles(a)
    multiply(pointer(c_at, c_kind), c_stride, a, a_row, UNIT, b, b_stride, rows, cols, depth, old)
    release_tiles(a)


def _kinds():
    yield pytest.param(NUMBER, id="numbers")
    lacking = "" if MULTIPLIES_PAIRS else "this CPU multiplies no pairs of bf16"
    yield pytest.param(PAIR, id="pairs", marks=pytest.mark.skipif(bool(lacking), reason=lacking))
    lacking = "" if multiplies_tiles() else "this CPU has no AMX, or the system does not let us"
    yield pytest.param(
        TILED_PAIR, id="tiles", marks=pytest.mark.skipif(bool(lacking), reason=lacking)
    )


def words(a, b):
    """Both in pairs along the depth, the last with zeros beside it, up to whole tiles of words."""
    pad = -a.shape[1] % 32
    a, b = torch.nn.functional.pad(a, (0, pad)), torch.nn.functional.pad(b, (0, 0, 0, pad))
    b = b.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1)
    return a.bfloat16().view(torch.int32), b.contiguous().bfloat16().view(torch.int32)


@pytest.mark.parametrize("word_kind", list(_kinds()))
@pytest.mark.parametrize("old", [SET, ADD], ids=["set", "added"])
@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 130])
@pytest.mark.parametrize("rows, cols", [(16, 16), (16, 32), (32, 16), (48, 80), (64, 64)])
def test_products_of_whole_numbers_are_exact(word_kind, old, depth, rows, cols):
    """And nothing is written beside them."""
    assert rows % HEIGHT == 0 and cols % LANES == 0
    generator = torch.Generator().manual_seed(depth)
    a = torch.randint(-9, 10, (rows, depth), generator=generator).float()
    b = torch.randint(-9, 10, (depth, cols), generator=generator).float()
    c = torch.full((rows + 1, cols + 16), BEYOND)
    expected = c.clone()
    expected[:rows, :cols] = a @ b + (BEYOND if old == ADD else 0)
    x, y = (a, b) if word_kind is NUMBER else words(a, b)
    count = depth if word_kind is NUMBER else -(-depth // 2)
    _multiply(
        1, 0, address(c), c.stride(0), address(x), x.stride(0), address(y), y.stride(0),
        rows, cols, count, old, kind(c), word_kind,
    )  # fmt: skip
    assert torch.equal(c, expected)


@pytest.mark.skipif(not multiplies_tiles(), reason="the CPU has no AMX: vectors are all there is")
@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_attention_is_right_with_words_in_vectors_too(op, monkeypatch):
    monkeypatch.setattr(attention, "multiplies_tiles", lambda: False)
    for size in OPS[op].sizes:
        results = check(OPS[op], "numba", torch.bfloat16, size, "cpu")
        assert not failures(results)

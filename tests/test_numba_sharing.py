"""How the Numba kernels share out work and memory: chunks, lines of the caches, or past them."""

import pytest
import torch

import tilewise  # noqa: F401  (declares the ops)
from tilewise.check import Result, outputs_and_grads, standard_of
from tilewise.kernels.numba import _parallel, _stream
from tilewise.kernels.numba._elements import CHUNK, chunks
from tilewise.kernels.numba._shared import (
    CACHE_LINE,
    PARTIAL_SUMS,
    ROWS_SUMMED,
    partial_sums,
    sum_parts_for,
    summed,
    thread_scratch,
)
from tilewise.op import OPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [1, 16, 17, 100])
def test_partial_sums_lie_on_cache_lines_of_their_own(dtype, cols):
    sums = partial_sums(torch.empty(2, 5, cols), 3, dtype)
    width = sums.shape[1]
    assert sums.dtype == dtype and len(sums) == 3 and not sums.any()
    assert width * dtype.itemsize % CACHE_LINE == 0
    assert cols <= width < cols + CACHE_LINE // dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 3])
def test_partial_sums_are_added_up_in_the_dtype_of_the_weight(dtype, parts):
    weight = torch.empty(17, dtype=dtype)
    sums = partial_sums(weight, parts, torch.float32) + 2
    total = summed(sums, weight)
    assert total.dtype == dtype and total.tolist() == [2 * parts] * 17


def test_chains_of_sums_are_short_unless_rows_are_wide():
    assert sum_parts_for(ROWS_SUMMED * 1000, 64) == 1000
    assert sum_parts_for(ROWS_SUMMED * 1000, 1 << 18) == PARTIAL_SUMS >> 18
    assert sum_parts_for(ROWS_SUMMED * 1000, PARTIAL_SUMS + 1) == 1


@pytest.mark.parametrize("elements", [1, 64, 65, 1000])
def test_scratch_of_threads_lies_on_cache_lines_of_their_own(elements):
    counter, scratch, size = thread_scratch(torch.empty(3), elements)
    assert counter.dtype == torch.int64 and counter.tolist() == [0]
    assert elements <= size < elements + CACHE_LINE and size * 4 % CACHE_LINE == 0
    assert scratch.dtype == torch.float32 and scratch.shape == (torch.get_num_threads() * size,)


def test_elements_without_gaps_are_one_row():
    assert chunks(torch.empty(6, 8)) == (1, 1, 48, CHUNK // 48, 48)
    assert chunks(torch.empty(6, CHUNK)) == (6, 1, 6 * CHUNK, 1, CHUNK)
    assert chunks(torch.empty(1, 8)[:, :5]) == (1, 1, 5, CHUNK // 5, 5)


@pytest.mark.parametrize("tensors", [1, 2])
def test_elements_with_gaps_are_chunks_of_rows(tensors):
    def cut(*size):
        return chunks(
            *(torch.empty(size) for _ in range(tensors - 1)), torch.empty(*size, 2)[..., 0]
        )

    assert cut(6, 1) == (1, 6, 1, CHUNK, 1)
    assert cut(300, 100) == (8, 300, 100, 40, 100)
    assert cut(3, CHUNK + 1) == (6, 3, CHUNK + 1, 1, CHUNK)


NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
ROWS = {"rows": 5, "cols": 1184}  # more than a chunk of each, on cache lines in every dtype
STREAMING = [
    *((name, ROWS) for name in (*NORMS, "softmax", "log_softmax", "glu_packed", "gelu")),
    ("softmax", ROWS | {"mask": "qk", "causal": True, "softcap": 0.7, "fully_masked": "zero"}),
    ("log_softmax", ROWS | {"bias": "qk", "causal": True}),
    ("glu", ROWS | {"limit": 0.3, "alpha": 1.5}),
    ("glu", ROWS | {"packed": True}),
    ("bias_gelu", ROWS),
    ("bias_gelu", ROWS | {"dropout_p": 0.3, "seed": 2}),
    ("dropout_add", ROWS | {"residual": "wide"}),
    ("dropout_add", ROWS | {"p": 0.0}),
    ("embed", {"batch": 1, "seq": 5, "vocab": 3, "cols": 160, "norm": "like x"}),
    ("embed", {"batch": 1, "seq": 5, "vocab": 3, "cols": 160, "norm": "like x", "dropout": 0.2}),
    ("rotary", {"batch": 2, "heads": 3, "seq": 5, "dim": 128}),
    ("qk_norm_rotary", {"batch": 2, "heads": 3, "seq": 5, "dim": 128}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name, size", STREAMING)
def test_past_the_caches_goes_the_same(name, size, dtype, monkeypatch):
    tensors, options = OPS[name].inputs(**size, device="cpu", dtype=dtype)
    found = []
    for least in (_stream.STREAMED_BYTES, 0):
        monkeypatch.setattr(_stream, "STREAMED_BYTES", least)
        options["backend"] = "numba"
        found.append(outputs_and_grads(OPS[name], OPS[name].call, tensors, options))
    assert _stream.streamed(found[1][0])  # nothing but the size stood in the way
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if "numba" in op.backends])
def test_no_bit_depends_on_where_tensors_lie(name):
    """Of small ones the next may lie just behind the last."""
    op = OPS[name]
    tensors, options = op.inputs(**op.sizes[0], device="cpu", dtype=torch.float32)
    options["backend"] = "numba"
    first, *others = (
        [*outputs_and_grads(op, op.call, tensors, options), torch.empty(16 * i)] for i in range(40)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[:-1], other[:-1], strict=True))


MANY_ROWS = [
    ("layer_norm", {"rows": 65536, "cols": 16, "bias": True}),
    ("bias_gelu", {"rows": 65536, "cols": 16}),
    ("qk_norm_rotary", {"batch": 1, "heads": 16, "seq": 4096, "dim": 16}),
]


@pytest.mark.parametrize("name, size", MANY_ROWS)
def test_sums_over_many_rows_keep_the_rule(name, size):
    op = OPS[name]
    tensors, options = op.inputs(**size, device="cpu", dtype=torch.float32)
    standard = standard_of(op, tensors, options)
    found = outputs_and_grads(op, op.call, tensors, options | {"backend": "numba"})
    for result in standard.judge(found, Result(name, "numba", "float32", "", {})):
        assert result.ok, result


# Enough rows that threads meet; where the last declared size has few.
LARGE = {
    "embed": {"batch": 8, "seq": 40, "vocab": 9, "cols": 200, "positions": 40, "norm": "like x",
              "dropout": 0.1},
    **{name: {"rows": 300, "cols": 200} for name in NORMS},
    **{
        name: {"batch": 2, "heads": 4, "kv_heads": 2, "seq_q": 150, "seq_k": 300, "dim": 8,
               "causal": True}
        for name in ("attention", "attention_with_lse")
    },
    **{
        name: {"lengths": ((150, 300), (1, 200), (64, 64), (90, 10)), "heads": 4, "kv_heads": 2,
               "dim": 8, "causal": True}
        for name in ("attention_varlen", "attention_varlen_with_lse")
    },
    **{
        name: {"lengths": (2000, 17, 900), "heads": 8, "kv_heads": 2, "dim": 24, "q_len": 3}
        for name in ("attention_decode", "attention_decode_with_lse")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if "numba" in op.backends])
def test_threads_change_no_bit(name, monkeypatch):
    """Even of rows that one thread has done before another begins, so that what is scratch for one
    is not another's."""
    op = OPS[name]
    tensors, options = op.inputs(**LARGE.get(name, op.sizes[-1]), device="cpu", dtype=torch.float32)
    options["backend"] = "numba"
    monkeypatch.setattr(_parallel, "SERIAL_BELOW", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outputs_and_grads(op, op.call, tensors, options)
        torch.set_num_threads(4)
        for _ in range(3):
            together = outputs_and_grads(op, op.call, tensors, options)
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)

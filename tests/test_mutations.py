"""The breaker of kernels: the same breaks for a seed, one place each, of every kind."""

import ast
from dataclasses import replace
from types import SimpleNamespace

import mutants
import pytest
import trials
from mutations import Mutation, draw, of_cuda, of_python

from tilewise.op import OPS

KERNEL = '''
def kernel(y_ptr, x_ptr, y_stride, x_stride, cols):
    """One row."""
    row = tl.program_id(0)
    mask = tl.arange(0, 4) < cols
    x = tl.load(x_ptr + row * x_stride, mask=mask, other=0.0)
    total = tl.sum(tl.where(mask, -x, 0.0))
    total *= 2
    tl.store(y_ptr, tl.maximum(total, x))


def row_options(cols):
    return cols + 1
'''
LAUNCH = "__global__ void kernel(float* y, int y_stride, int x_stride) {"
CUDA = LAUNCH + " if (x_stride < 3) return; y[0] = fmaxf(y[1] * 2.0f, 1); __syncthreads(); }"


def changes(source, find=of_python):
    return {(m.kind, m.before, m.after) for m in find(source, "file")}


@pytest.mark.parametrize(
    "change",
    [
        ("operator", "row * x_stride", "(row) + (x_stride)"),
        ("dropped", "row * x_stride", "(row)"),
        ("comparison", "tl.arange(0, 4) < cols", "(tl.arange(0, 4)) <= (cols)"),
        ("forgotten", "tl.load(x_ptr + row * x_stride, mask=mask, other=0.0)",
         "tl.load(x_ptr + row * x_stride, other=0.0)"),
        ("function", "tl.sum(tl.where(mask, -x, 0.0))", "tl.max(tl.where(mask, -x, 0.0))"),
        ("no condition", "tl.where(mask, -x, 0.0)", "(-x)"),
        ("no limit", "tl.maximum(total, x)", "(total)"),
        ("no accumulation", "total *= 2", "total = 2"),
        ("sign", "-x", "(x)"),
        ("constant", "4", "5"),
        ("left out", "tl.store(y_ptr, tl.maximum(total, x))", "pass"),
        ("wrong argument", "x_stride", "y_stride"),
    ],
    ids=lambda change: change[0],
)  # fmt: skip
def test_python_is_broken_in_every_way(change):
    assert change in changes(KERNEL)


def test_what_changes_no_result_is_left_alone():
    assert all("cols + 1" not in before for _, before, _ in changes(KERNEL))
    assert all("One row" not in before for _, before, _ in changes(KERNEL))


@pytest.mark.parametrize(
    "change",
    [
        ("operator", "y[1] * 2.0f", "y[1] + 2.0f"),
        ("dropped", "y[1] * 2.0f", "y[1]"),
        ("operator", "x_stride < 3", "x_stride <= 3"),
        ("constant", "3", "4"),
        ("function", "fmaxf(y[1] * 2.0f, 1)", "fminf(y[1] * 2.0f, 1)"),
        ("left out", "__syncthreads();", ";"),
        ("wrong argument", "x_stride", "y_stride"),
    ],
    ids=lambda change: f"{change[0]}-{change[1]}",
)
def test_cuda_is_broken_in_every_way(change):
    assert change in changes(CUDA, of_cuda)


def test_a_mutation_changes_its_place_alone():
    source = (mutants.ROOT / "kernels/triton/softmax.py").read_text()
    for mutation in of_python(source, "softmax.py"):
        broken = mutation.apply(source)
        assert broken != source
        assert broken.startswith(source[: mutation.start])
        assert broken.endswith(source[mutation.end :])
        ast.parse(broken)


def test_a_seed_draws_the_same_again():
    path = mutants.ROOT / "kernels/numba/rotary.py"
    first, again, other = (draw(path, "rotary.py", 10, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 10


def test_every_kernel_is_broken():
    found = {kernel.path: kernel for kernel in mutants.kernels()}
    assert found["kernels/triton/_norm_wide.py"].backend == "triton"
    online = found["kernels/numba/_online_softmax.py"]
    family = tuple(sorted(n for n in OPS if n.startswith(("attention", "append_kv_"))))
    assert online.users == {online.path: family}
    scored = "csrc/cuda/scored_softmax.cu"
    assert found[scored].users == {scored: ("log_softmax", "softmax")}
    assert list(found["csrc/cuda/norm.cuh"].users) == [
        "csrc/cuda/rms_norm.cu", "csrc/cuda/layer_norm.cu"
    ]  # fmt: skip
    for kernel in found.values():
        path = mutants.ROOT / kernel.path
        drawn = len(draw(path, kernel.path, 10, 0))
        # What only hands tensors on to another file has little to break.
        assert drawn == 10 or len(path.read_text().splitlines()) < 130, kernel


def test_a_header_is_broken_for_one_file():
    kernel = next(k for k in mutants.kernels() if k.path == "csrc/cuda/norm.cuh")
    mutation = draw(mutants.ROOT / kernel.path, kernel.path, 1, 0)[0]
    for user in kernel.users:
        whole = mutants.with_headers(user, {})
        assert '#include "cuda/' not in whole and "#pragma once" not in whole
        broken = kernel.broken(user, mutation)
        assert broken != whole
        source = (mutants.ROOT / kernel.path).read_text()
        for text, header in ((whole, source), (broken, mutation.apply(source))):
            inner = header[header.rindex("#include") :].partition("\n")[2]
            assert text.count(inner) == 1


def test_what_pytest_is_asked_to_run():
    path = "kernels/triton/_philox.py"
    files, wanted = set(mutants.asked("triton", ["embed"], path)[:-2]), "embed-triton"
    assert {"tests/test_ops.py", "tests/test_rng.py", "tests/properties/test_embed.py"} <= files
    expression = mutants.asked("triton", ["embed"], path)[-1]
    assert wanted in expression and "(test_rng.py and triton)" in expression
    expression = mutants.asked("numba", ["cross_entropy_with_lse"])[-1]
    assert "(test_cross_entropy_options.py and numba)" in expression
    assert "(test_numba_sharing.py and cross_entropy_with_lse)" in expression
    *files, _, expression = mutants.asked("numba", ["softmax"], "kernels/numba/_stream.py")
    assert files.count("tests/test_numba_sharing.py") == 1
    assert "(test_numba_sharing.py and numba)" in expression


ENDS = {
    trials.PASSED: "pass",
    "test_it.py::test_it": "assert False",
    trials.STILLBORN: "raise numba.core.errors.TypingError('no such function')",
    trials.CRASHES: "os.abort()",
    trials.HANGS: "while True: pass",
}
ONE_SECOND = -(trials.SLACK - 1) / 10  # for what takes so long, it is the limit


@pytest.fixture
def environment(monkeypatch):
    for name, value in trials.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("end", ENDS)
def test_how_a_trial_ends(end, environment, tmp_path):
    """In one process after the other, forked from the same: what it was before does not matter."""
    (tmp_path / "test_it.py").write_text(f"import os, numba\ndef test_it():\n    {ENDS[end]}\n")
    seconds = {"test_it.py::test_it": ONE_SECOND}
    outcome = trials.run_tests(tmp_path, ["test_it.py"], seconds)
    assert outcome.noticed == end
    assert set(outcome.seconds) <= set(seconds)


def test_a_file_that_cannot_be_imported_is_noticed(environment, tmp_path):
    (tmp_path / "test_it.py").write_text("import no_such_module\n")
    assert trials.run_tests(tmp_path, ["test_it.py"], {}).noticed == "test_it.py"


def test_no_tests_are_no_verdict(environment, tmp_path):
    (tmp_path / "test_it.py").write_text("")
    with pytest.raises(RuntimeError, match=r"a trial ended with 1, see .*\.log"):
        trials.run_tests(tmp_path, ["test_it.py"], {})


def test_the_most_telling_tests_come_first():
    def item(name, op, dtype, size):
        params = {"op": OPS[op], "dtype": dtype, "size": OPS[op].sizes[size]}
        callspec, nodeid = SimpleNamespace(params=params), f"tests/test_ops.py::{op}"
        return SimpleNamespace(originalname=name, callspec=callspec, nodeid=nodeid)

    def plain(nodeid):
        return SimpleNamespace(originalname="test_without_parameters", nodeid=nodeid)

    values, single, half = "test_matches_reference", "torch.float32", "torch.bfloat16"
    wanted = [
        plain("tests/test_rng.py"),
        item(values, "gelu", single, 0),
        item(values, "gelu", single, 2),
        item(values, "gelu", half, 0),
        item(values, "attention", single, 0),
        plain("tests/properties/test_softmax.py"),
        item("test_same_input_same_bits", "gelu", single, 1),
    ]
    items = [*reversed(wanted), item("test_compiled_by_inductor", "gelu", single, 0)]
    seconds = {"tests/test_ops.py::gelu": 0.2, "tests/test_ops.py::attention": 3.0}
    trials._Watch(seconds).pytest_collection_modifyitems(items)
    assert [vars(i) for i in items] == [vars(i) for i in wanted]


def test_an_explanation_outlives_a_new_line_number(tmp_path, monkeypatch):
    file = tmp_path / "equivalent.txt"
    file.write_text("# only a threshold\na.py: constant: 1 -> 2   in: x + 1\n")
    monkeypatch.setattr(mutants, "EQUIVALENT", file)
    mutation = Mutation("a.py", 77, "constant", 0, 1, "1", "2", "x + 1")
    assert mutants.explained()[mutants.unnumbered(mutation)] == "only a threshold"
    elsewhere = replace(mutation, within="y + 1")
    assert mutants.unnumbered(elsewhere) not in mutants.explained()


def test_what_is_explained_has_a_reason_and_is_tried():
    """An explanation of what is not drawn any more explains nothing."""
    drawn = {
        mutants.unnumbered(mutation)
        for kernel in mutants.kernels()
        for mutation in draw(mutants.ROOT / kernel.path, kernel.path, 10, 0)
    }
    assert mutants.explained().keys() <= drawn
    assert all(mutants.explained().values())

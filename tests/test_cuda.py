"""The compiled module on any machine with nvcc, with a GPU or without: what it offers and refuses.

It is compiled once into the user's cache and found there by every later run with the same sources.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import assert_selftest_is_right, selftested

import tilewise
from tilewise import native, toolchain

ROOT = Path(__file__).parent.parent
OPS = ("rms_norm", "layer_norm", "softmax", "glu", "gelu", "dropout_add", "rotary",
       "qk_norm_rotary")  # fmt: skip
HEADERS = "".join(
    (ROOT / f"csrc/{name}launchers.h").read_text() for name in ("", "attention_", "sample_")
)
DECLARED = dict(re.findall(r"^cudaError_t (\w+)\((.*?)\);", HEADERS, re.M | re.S))
LAUNCHERS = list(DECLARED)
WEIGHTED = [name for name, arguments in DECLARED.items() if arguments.count("DType ") > 1]
SPILL_ARCHS = ("80-real", "90a-real", "100a-real")

# One architecture where there is no GPU to run on; those of the GPUs where there is.
QUICK = None if torch.cuda.is_available() else "90a-real"


@pytest.fixture(scope="module", autouse=True)
def not_emulated():
    """Even where the process runs the CUDA backend on the CPU, these tests mean what nvcc made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "EMULATED", False)
        patch.setattr(tilewise, "_cuda", None, raising=False)
        yield


def built(archs):
    if lacks := native.missing():
        pytest.skip(f"cuda: needs {lacks}")
    return native.build(archs=archs)


@pytest.fixture(scope="module")
def cuda():
    built(QUICK)
    return native.load()


def arguments(launcher, cuda, dtype, weight_dtype):
    """Of a launch of nothing at all, with one of no rows: no address is ever followed."""
    count = len(re.findall(r"\(arg\d+: |, arg\d+: ", getattr(cuda, launcher).__doc__))
    others = DECLARED[launcher].count("DType ") - 1
    return [*[0] * (count - others - 2), dtype, *[weight_dtype] * others, 0]


def test_imports_in_a_fresh_process(cuda):
    code = "from tilewise import native; print(native.is_built()); m = native.load();"
    code += "from tilewise import _cuda; print(_cuda is m, m.sources)"
    plain = os.environ | {"TILEWISE_EMULATE": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert run.stdout.split() == ["True", "True", toolchain.digest(ROOT)], run.stderr


def test_offers_every_launcher_that_is_declared(cuda):
    assert {f"{op}_forward" for op in OPS} <= set(LAUNCHERS)
    assert [name for name in LAUNCHERS if not callable(getattr(cuda, name, None))] == []


def test_the_selftest_is_compiled_too(cuda):
    """It needs neither Python nor PyTorch, so all that it can lack is a GPU."""
    program = native.build_selftest(QUICK)
    done = subprocess.run([program, "--orders", "1"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if torch.cuda.is_available():
        assert_selftest_is_right(done, selftested())
    else:
        assert (done.returncode, len(lines)) == (3, 1), done.stdout
        assert lines[0].startswith('{"fatal": "cudaMalloc: ')


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failed_launch_is_an_error_that_names_the_launcher(cuda, launcher):
    """No rows make no grid; and without a driver no launch succeeds anyway."""
    with pytest.raises(RuntimeError, match=rf"^{launcher}: \w+"):
        getattr(cuda, launcher)(*arguments(launcher, cuda, cuda.f16, cuda.f16))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_unknown_dtype_is_refused(cuda, launcher):
    with pytest.raises(RuntimeError, match=f"^{launcher}: invalid argument"):
        getattr(cuda, launcher)(*arguments(launcher, cuda, 99, cuda.f32))


@pytest.mark.parametrize("launcher", WEIGHTED)
def test_weight_of_another_half_is_refused(cuda, launcher):
    with pytest.raises(RuntimeError, match=f"^{launcher}: invalid argument"):
        getattr(cuda, launcher)(*arguments(launcher, cuda, cuda.f16, cuda.bf16))


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_called_alike_in_every_backend(op):
    family = op.removeprefix("add_")
    cuda, numba = (
        {
            node.name: [argument.arg for argument in node.args.args]
            for node in ast.parse((ROOT / "kernels" / room / f"{family}.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        for room in ("cuda", "numba")
    )
    for name in (f"{op}_forward", f"{op}_backward"):
        assert cuda[name] == numba[name]


@pytest.mark.parametrize(
    "archs", [QUICK, *(pytest.param(arch, marks=pytest.mark.slow) for arch in SPILL_ARCHS)]
)
def test_no_kernel_spills(archs):
    log = built(archs).with_name("build.log").read_text()
    kernels = re.findall(r"Compiling entry function '\w+ward_kernel\w+' for", log)
    # Three dtypes, exact and not, few accesses held too; of what adds, five pairs of dtypes.
    assert len(kernels) >= 3 * 3 * (3 + 2) + 2 * 5 * (2 + 2)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.slow
def test_a_spill_fails_the_build(tmp_path):
    """The flags that promise it: a kernel that must keep more alive than it may have registers."""
    if lacks := native.missing():
        pytest.skip(f"cuda: needs {lacks}")
    flags = re.search(r"-Xptxas=\S*warn-spills\S*?(?=>)", (ROOT / "CMakeLists.txt").read_text())
    (tmp_path / "spill.cu").write_text(
        "__global__ void __launch_bounds__(1024, 2) kernel(float* x) {\n"
        "  float v[128];\n#pragma unroll\n"
        "  for (int i = 0; i < 128; ++i) v[i] = x[i * threadIdx.x];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 128; ++i) x[i + threadIdx.x * 129] = v[127 - i];\n}"
    )
    command = [toolchain.nvcc(), "-cubin", "-arch=sm_90", flags[0], "spill.cu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "spill" in (run.stdout + run.stderr).lower()

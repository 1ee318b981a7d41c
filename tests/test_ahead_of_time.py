"""Every shipped Triton configuration compiles for every architecture, without a spill."""

import os
import subprocess
import sys

import pytest
import torch

import tilewise  # noqa: F401  (declares the ops)
from tilewise.op import INTERPRETED, OPS
from tilewise.verify.ahead_of_time import ARCHITECTURES, SHARED_LIMIT, compile_triton

SPILLS = pytest.mark.xfail(
    strict=True, reason="dk and dv of fp32 heads up to 64 wide keep 2 to 8 values in local memory"
)


def marks(op, dtype, architecture):
    """By default one dtype on one architecture; the others differ in the width of a load."""
    found = [] if (dtype, architecture) == (torch.bfloat16, 90) else [pytest.mark.slow]
    return [*found, SPILLS] if (op.name, dtype) == ("attention", torch.float32) else found


CASES = [
    pytest.param(
        op, dtype, architecture,
        id=f"{op.name}-{dtype}-sm_{architecture}".replace("torch.", ""),
        marks=marks(op, dtype, architecture),
    )
    for op in OPS.values()
    if "triton" in op.backends
    for dtype in sorted(op.backends["triton"].dtypes, key=str)
    for architecture in ARCHITECTURES
]  # fmt: skip


def launches(op):
    """Sizes with something to launch: those checked, and those timed."""
    empty = [size for size in op.sizes if 0 in size.values()]
    return [size for size in (*op.sizes, *op.workloads) if size not in empty]


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process")
@pytest.mark.parametrize("op, dtype, architecture", CASES)
def test_compiles_without_a_spill(op, dtype, architecture):
    for size in launches(op):
        for kernel in compile_triton(op, dtype, size, architecture):
            assert kernel.spills == 0, (size, kernel)
            assert kernel.registers <= 255
            assert kernel.shared <= SHARED_LIMIT[architecture], (size, kernel)


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles in this process")
def test_compiles_without_a_spill_in_a_process_that_compiles(request):
    """TRITON_INTERPRET is read where a kernel is decorated: the tests above need a new process."""
    slow = request.config.option.markexpr
    command = [sys.executable, "-m", "pytest", "-q", "-m", slow, "-n", "0", __file__]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def test_a_spill_would_be_seen():
    """The inspection itself: a kernel with more live values than registers."""
    if INTERPRETED:
        pytest.skip("Triton interprets in this process")
    import tilewise.kernels.triton.rms_norm as kernels

    options = kernels.row_options
    kernels.WIDEST_BLOCK, kernels.row_options = 2**20, lambda cols: options(cols) | {"num_warps": 4}
    try:
        size = {"rows": 3, "cols": 32768}
        compiled = compile_triton(OPS["rms_norm"], torch.float32, size, 90)
    finally:
        kernels.WIDEST_BLOCK, kernels.row_options = 8192, options
    assert sum(kernel.spills for kernel in compiled) > 0

"""The kernels of csrc/units/, one or more for each unit of the GPU that csrc/cuda/ wraps.

Here they run on the emulator: clean in every order, and with each bug that is planted into them
noticed. Each bug stands beside its clean twin in one source, `if constexpr (kFault == ...)`. On a
GPU the same program, `units`, checks the wrappers and with them what the emulator believes.
"""

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from tilewise import emulation, toolchain

ROOT = Path(__file__).parent.parent
UNITS = [*sorted((ROOT / "csrc/units").glob("*.cu")), ROOT / "csrc/selftest/array.cpp"]
CHECKS = {
    "copy": "copy bfloat16 swizzle 3 at 120",
    "wgmma": "wgmma bfloat16 128 cols, a in shared memory, b, swizzle 3",
    "mma": "mma bfloat16 70 x 104 x 72 transposed",
    "cluster": "cluster of 2",
    "gemm": "gemm bfloat16 128",
    "rules": "rules",
}
NUMBERS = r"\d+ of \d+ numbers are wrong"

# Each bug, and how it shows; that of the line it is on, where the emulator names one.
FAULTS = {
    "copy_not_awaited": r"load: on its way when its block ended.*copy\.cu",
    "copy_too_few_bytes": r"load: 16 bytes more came to the barrier than.*copy\.cu",
    "copy_too_many_bytes": r"deadlock.*64 of 64 threads wait in mbarrier\.try_wait at .*copy\.cu",
    "copy_wrong_swizzle": NUMBERS,
    "copy_store_not_awaited": r"store: on its way when its block ended.*copy\.cu",
    "copy_store_not_fenced": NUMBERS,
    "wgmma_not_awaited": NUMBERS + ".*nan",
    "wgmma_not_fenced": r"wgmma\.fence must come after.*wgmma\.cu",
    "wgmma_sums_changed": r"sum 0 was written while its wgmma was on its way.*wgmma\.cu",
    "wgmma_wrong_offset": NUMBERS,
    "wgmma_wrong_leading": NUMBERS,
    "wgmma_wrong_stride": NUMBERS,
    "wgmma_wrong_swizzle": NUMBERS,
    "mma_copy_not_awaited": NUMBERS + ".*nan",
    "mma_copy_awaited_late": NUMBERS + ".*nan",
    "mma_wrong_transpose": NUMBERS,
    "mma_buffer_overwritten": NUMBERS,
    "cluster_read_too_early": r"the barrier was never initialised.*cluster\.cu",
    "cluster_left_too_early": r"block \d of the cluster has ended.*cluster\.cu",
    "cluster_inbox_not_awaited": NUMBERS + ".*nan",
    "cluster_barrier_too_early": r"the barrier was never initialised.*cluster\.cu",
    "gemm_full_not_awaited": r"expect_tx: more than the 1 arrivals.*gemm\.cu",
    "gemm_slot_released_early": NUMBERS,
    "gemm_empty_parity": r"deadlock.*1 of 384 threads wait in mbarrier\.try_wait at .*gemm\.cu",
    "gemm_full_parity": r"expect_tx: more than the 1 arrivals.*gemm\.cu",
    "gemm_too_many_arrivals": NUMBERS,
    "gemm_wrong_bytes": r"bytes more came to the barrier|load: on its way when.*gemm\.cu",
    "gemm_barrier_not_initialised": r"try_wait: the barrier was never initialised.*gemm\.cu",
    "gemm_wrong_half": NUMBERS,
    "gemm_store_not_fenced": NUMBERS + ".*nan",
    "gemm_store_too_early": NUMBERS + ".*nan",
    "gemm_registers_not_released": r"deadlock.*threads wait in setmaxnreg\.inc at .*gemm\.cu",
}
# A rule of one instruction that is broken, and the words for it.
RULES = {
    "barrier_misaligned": "a barrier must be 8-byte aligned",
    "barrier_not_shared": "a barrier must be in shared memory",
    "barrier_of_nobody": "1 to 1048575 arrivals, got 0",
    "barrier_used_twice": "a phase of this barrier is under way",
    "barrier_parity": "a parity must be 0 or 1, got 2",
    "barrier_of_peer": "can only wait for a barrier of its own block",
    "peer_outside": "the rank must be below the cluster's 2, got 2",
    "cluster_arrived_twice": "a second time without a wait",
    "cluster_not_arrived": "without an arrive",
    "registers_fewer": "the warpgroup has 248 registers, got 24",
    "registers_differ": "threads of a warpgroup disagree",
    "map_by_hand": "the map must come from cuTensorMapEncodeTiled",
    "map_rank": "the map has 2 dimensions, got 3",
    "box_misaligned": "the box must be 128-byte aligned",
    "box_too_far": "shared memory must hold the bytes",
    "store_not_committed": "on its way when its block ended",
    "copy_misaligned": "both addresses must be 16-byte aligned",
    "copy_too_long": "0 to 16 bytes can be read, got 20",
    "copy_not_shared": "the address must be in this block's shared memory",
    "matrix_misaligned": "a row must be 16-byte aligned",
    "wgmma_differ": "must give the same descriptors",
    "wgmma_misplaced": "must begin with the swizzle's period of 1024 bytes",
    "wgmma_too_far": "shared memory must hold the bytes",
    "wgmma_bits": "bits that have no meaning",
    "wgmma_reshaped": "the same sums in another shape",
    "wgmma_named_early": "the sums that it names are still on their way",
    "wgmma_half_waits": "on its way when its block ended",
    "wgmma_never_waited": "on its way when its block ended",
    "wgmma_half_group": "needs a whole warpgroup",
}
FAULTS |= {f"rules_{rule}": rf"{words}.*rules\.cu" for rule, words in RULES.items()}

# What a sanitizer sees, even in the orders in which the numbers are right.
SANITIZED = {
    "copy_map_too_large": ("address", r"load: reads \d+ bytes at .*copy\.cu"),
    "mma_buffer_overwritten": ("thread", r"data race.*copy_async.*load_matrices"),
    "cluster_read_too_early": ("thread", r"data race.*cluster_kernel.*cluster\.cu"),
    "gemm_slot_released_early": ("thread", r"data race.*produce.*gemm\.cu.*consume.*gemm\.cu"),
    "gemm_store_too_early": ("thread", r"data race.*put.*gemm\.cu"),
}
# With the line, where the numbers had none.
CHECKED = {
    "copy_not_awaited": r"is still on its way.*copy\.cu",
    "copy_store_not_fenced": r"no fence\.proxy\.async has come since byte.*copy\.cu",
    "mma_copy_not_awaited": r"ldmatrix: .* is still on its way.*mma\.cu",
    "cluster_inbox_not_awaited": r"byte \d+ of dynamic shared .* never.*cluster\.cu",
    "gemm_full_not_awaited": r"wgmma: .* is still on its way.*gemm\.cu",
    "gemm_slot_released_early": r"wgmma: byte \d+ of .* was overwritten.*gemm\.cu",
    "gemm_store_too_early": r"store: uninitialised memory.*gemm\.cu",
    "gemm_store_not_fenced": r"store: no fence\.proxy\.async has come.*gemm\.cu",
}
ORDERS = ("forward", "reverse", "7", "9")


@cache
def program(sanitizer):
    if lacks := toolchain.lacking(module=False):
        pytest.skip(f"emulation: needs {lacks}")
    return emulation.build_program(UNITS, sanitizer)


def run(order, check="", fault="none", sanitizer="plain"):
    command = [program(sanitizer), check, fault]
    environment = os.environ | {"TILEWISE_EMULATION_ORDER": order}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def told(run):
    """What each check said, empty where it had nothing to complain of."""
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"check"')]
    assert lines, run.stderr
    return {line["check"]: line["told"] for line in lines}


@pytest.mark.parametrize("order", [*ORDERS[:2], *map(str, range(1, 21))])
def test_clean_kernels_are_right_in_every_order(order):
    done = run(order)
    said = told(done)
    assert {name: words for name, words in said.items() if words} == {}
    assert done.returncode == 0
    assert {name.split()[0] for name in said} == set(CHECKS)


def test_every_bug_is_listed_here():
    listed = subprocess.run([program("plain"), "--list"], capture_output=True, text=True)
    assert set(listed.stdout.split()) == {"none", *FAULTS, *SANITIZED}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_bug_is_noticed(fault):
    """In one order at least of four: what a kernel gets wrong may depend on who comes first."""
    check = CHECKS[fault.split("_")[0]]
    for order in ORDERS:
        noticed = [words for words in told(run(order, check, fault)).values() if words]
        assert all(re.search(f"{FAULTS[fault]}|{NUMBERS}", words) for words in noticed), noticed
        if any(re.search(FAULTS[fault], words) for words in noticed):
            return
    pytest.fail("no order showed it")


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitizer", ["address", "thread", "memory"])
def test_clean_kernels_are_clean_under_sanitizers(sanitizer, order):
    done = run(order, sanitizer=sanitizer)
    assert {words for words in told(done).values() if words} == set()
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("fault", SANITIZED)
def test_planted_bug_is_noticed_by_a_sanitizer(fault):
    sanitizer, words = SANITIZED[fault]
    check = CHECKS[fault.split("_")[0]]
    dones = [run(order, check, fault, sanitizer) for order in ORDERS]
    assert any(re.search(words, done.stdout + done.stderr, re.DOTALL) for done in dones)


@pytest.mark.slow
@pytest.mark.parametrize("fault", CHECKED)
def test_planted_bug_is_noticed_where_every_access_is_checked(fault):
    check = CHECKS[fault.split("_")[0]]
    found = [" ".join(told(run(order, check, fault, "memory")).values()) for order in ORDERS]
    assert any(re.search(CHECKED[fault], words) for words in found), found


# --- By nvcc, for GPUs.

# What must be in the machine code of each file for Hopper; on other GPUs its kernels only trap.
INSTRUCTIONS = {
    "copy": ["UTMALDG.2D", "UTMALDG.5D", "UTMASTG.2D", "SYNCS"],
    "wgmma": ["HGMMA.64x128x16.F32", "HGMMA.64x16x16.F32.BF16", "HGMMA.64x256x16.F32.BF16"],
    "mma": ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "HMMA.1688.F32.TF32", "LDSM.16.M88.4",
            "LDSM.16.MT88.2", "LDGSTS.E.BYPASS.128"],
    "cluster": ["UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS.ARRIVE"],
    "gemm": ["HGMMA.64x128x16.F32.BF16", "UTMALDG.2D", "UTMASTG.2D", "USETMAXREG", "SYNCS"],
    "rules": ["UCGABAR_ARV"],
}  # fmt: skip
EVERYWHERE = ["mma"]  # needs no more than sm_80
STRICT = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
STRICT += ["-Xptxas=-v,-warn-spills,-Werror"]


def compiled(unit, arch, folder):
    if toolchain.nvcc() is None:
        pytest.skip("cuda: needs nvcc, on PATH or in CUDA_HOME")
    source, target = ROOT / f"csrc/units/{unit}.cu", folder / f"{unit}.cubin"
    command = [toolchain.nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *STRICT, "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, done.stdout + done.stderr


def machine_code(cubin):
    folder = pytest.importorskip("triton", reason="cuobjdump comes with triton").__file__
    tool = Path(folder).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip(f"cuda: this triton brings no {tool.name}")
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    return done.stdout


def archs(quick, *others):
    return [quick, *(pytest.param(arch, marks=pytest.mark.slow) for arch in others)]


@pytest.mark.parametrize("arch", archs("90a", "80", "100a"))
@pytest.mark.parametrize("unit", INSTRUCTIONS)
def test_wrappers_become_the_instructions_they_name(unit, arch, tmp_path):
    cubin, log = compiled(unit, arch, tmp_path)
    assert not re.search(r"C75\d\d|[1-9]\d* bytes (stack frame|spill)", log), log
    code = machine_code(cubin)
    if arch == "90a":
        assert [name for name in INSTRUCTIONS[unit] if name not in code] == []
    elif unit in EVERYWHERE:
        assert "HMMA" in code and "LDSM" in code and "LDGSTS" in code
    else:
        assert "BPT.TRAP" in code and "HGMMA" not in code and "UTMALDG" not in code


def test_gpu_computes_what_the_emulator_does(tmp_path):
    """The same program by nvcc: a GPU that disagrees shows what the emulator has wrong."""
    if not torch.cuda.is_available():
        pytest.skip("cuda: needs a GPU")
    if lacks := toolchain.missing():
        pytest.skip(f"cuda: needs {lacks}")
    major, minor = torch.cuda.get_device_capability()
    hopper = (major, minor) == (9, 0)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": f"{major}{minor}{'a' * hopper}-real",
        "CMAKE_CUDA_COMPILER": toolchain.nvcc(),
    }
    toolchain.compile_targets(["units"], ROOT, tmp_path, options, tmp_path / "build.log")
    command = [tmp_path / "units", "" if hopper else "mma"]  # the others only trap elsewhere
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert {name: words for name, words in told(done).items() if words} == {}
    assert done.returncode == 0

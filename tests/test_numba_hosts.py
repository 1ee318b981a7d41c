"""Numba kernels as they are compiled for other CPUs than this one, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

OLD = "sse,sse2,sse3,ssse3,sse4.1,sse4.2,popcnt"
HOSTS = {
    # no instruction for bfloat16
    "haswell": f"{OLD},avx,avx2,fma,f16c,bmi,bmi2,lzcnt",
    # none for halves either, nor a fused multiplication
    "nehalem": OLD,
}
HAS = {"haswell": {"halves"}, "nehalem": set()}  # instructions for them

# What `tilewise check` finds wrong there: a sum 9 % above what it allows. It judges by the error of
# PyTorch, which is that of the CPU that is here, with a fused multiplication.
KNOWN = {"nehalem": {("layer_norm", "float64", "rows=3 cols=16389 bias=True", "dweight")}}

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="they are x86"
)


def run(code, host, cache):
    features = ",".join(f"+{name}" for name in HOSTS[host].split(","))
    environment = os.environ | {
        "NUMBA_CPU_NAME": host, "NUMBA_CPU_FEATURES": features, "TILEWISE_CACHE": str(cache),
    }  # fmt: skip
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


CONVERT = """
import numpy as np
import torch
from tilewise.kernels.numba._parallel import Kernel
from tilewise.kernels.numba._simd import address, kind, load, pointer, store
from tilewise.kernels.numba._sixteen import CONVERTS_HALVES, ROUNDS_TO_BRAIN
from tilewise.kernels.numba._stream import write

@Kernel
def in_vectors(task, to_at, from_at, to_kind, from_kind, count):
    write((pointer(to_at, to_kind),), (pointer(from_at, from_kind),), (), count, False)

@Kernel
def one_by_one(task, to_at, from_at, to_kind, from_kind, count):
    to, source = pointer(to_at, to_kind), pointer(from_at, from_kind)
    for i in range(count):
        store(to, i, load(source, i))

every = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    sixteen = every.view(dtype)
    wide = sixteen.float()
    bits = wide.view(torch.int32)
    # All that 16 bits hold, what is half way between two, and a last bit to both sides of these.
    half = 1 << (12 if dtype == torch.float16 else 15)
    near = torch.cat([bits + d for d in (-1, 0, 1, half - 1, half, half + 1)])
    anywhere = torch.arange(0, 1 << 32, 65537).to(torch.int32)
    values = torch.cat([near, anywhere]).view(torch.float32)
    for convert in (in_vectors, one_by_one):
        for source, wanted in ((sixteen, wide), (values, values.to(dtype))):
            found = torch.full_like(wanted, 7)
            convert(1, 0, address(found), address(source), kind(found), kind(source), len(source))
            as_bits = torch.int16 if wanted.itemsize == 2 else torch.int32
            same = (found.view(as_bits) == wanted.view(as_bits)) | (found.isnan() & wanted.isnan())
            assert bool(same.all()), (convert, dtype, source[~same][:5], found[~same][:5])
print(*["halves"] * CONVERTS_HALVES, *["brain"] * ROUNDS_TO_BRAIN)
"""


@pytest.mark.parametrize("host", HOSTS)
def test_every_16_bit_float_is_read_and_rounded_as_torch_does(host, tmp_path):
    done = run(CONVERT, host, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == HAS[host]


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_every_op_is_right(host, tmp_path):
    check = "from tilewise import cli; raise SystemExit(cli.main(['check', '--backend', 'numba']))"
    done = run(check, host, tmp_path)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    wrong = {(op, dtype, size, out) for op, _, dtype, size, out, *_ in filter(is_wrong, rows)}
    assert wrong == KNOWN.get(host, set()), done.stderr[-2000:]
    assert f" {len(wrong)} wrong, 0 cases skipped" in done.stdout


def is_wrong(row):
    return row[-1] == "wrong"

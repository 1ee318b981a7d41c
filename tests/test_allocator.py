"""The opt-in setting of the C library's allocator."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch, tilewise
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), tilewise.tune_allocator())
for _ in range(30):  # the heap grows until freed pieces fit
    faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_large_tensors_are_written_without_page_faults():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, taken, after = run.stdout.split()
    if taken == "False":
        pytest.skip("this C library has no such setting")
    assert int(after) < 100 < int(before)

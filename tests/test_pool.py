"""The pool of the Numba kernels: threads, forks, callers at once, and the cache between processes.

Each case runs in a process of its own: what is tested is state of the process.
"""

import os
import subprocess
import sys

import pytest

PREAMBLE = """
import os, sys, threading, time
import torch, tilewise
import tilewise.kernels.numba._norm as kernels
from tilewise.kernels.numba._parallel import Kernel, compiled
from tilewise.kernels.numba._simd import KINDS, address, kind, pointer, real, store

def norm(rows=512, cols=257):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator).requires_grad_()
    y = tilewise.rms_norm(x, torch.ones(cols), backend="numba")
    return [y.detach(), *torch.autograd.grad(y, x, y.detach())]

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

@Kernel
def busy(task, out_at, kind, steps):
    out, x = pointer(out_at, kind), real(kind, task)
    for _ in range(steps):  # each step waits for the one before: no compiler shortens it
        x = real(kind, 1) / (x + real(kind, 1))
    store(out, task, x)
"""


def run(script, *arguments, **environment):
    """What the script prints, in a fresh process."""
    process = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.strip()


@pytest.fixture(params=["torch", "numba"])
def pool(request):
    return request.param


def test_python_goes_on_while_a_kernel_runs(pool, tmp_path):
    """With the GIL held there would be no tick inside the call, only before and after it."""
    script = """
torch.set_num_threads(1)
out = torch.empty(1)
busy(1, 1, address(out), kind(out), 1)
ticks, done = [], threading.Event()

def tick():
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)

thread = threading.Thread(target=tick)
thread.start()
start = time.perf_counter()
busy(1, 1, address(out), kind(out), 200_000_000)
end = time.perf_counter()
done.set(); thread.join()
quarter = (end - start) / 4
print(end - start > 0.1, sum(start + quarter < t < end - quarter for t in ticks) > 5)
"""
    assert run(script, TILEWISE_POOL=pool, TILEWISE_CACHE=str(tmp_path)) == "True True"


THREADS = """
def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
alone, before = norm(), threads()
norm()
grown = threads() - before
torch.set_num_threads(2)
both = norm()
print(grown, threads() > before, same(alone, both))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_one_thread_if_torch_has_one_and_the_same_bits_with_two(pool):
    assert run(THREADS, TILEWISE_POOL=pool) == "0 True True"


def test_both_pools_give_the_same_bits():
    script = """
import hashlib
torch.set_num_threads(2)
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in norm())).hexdigest())
"""
    results = [run(script, TILEWISE_POOL=pool) for pool in ("torch", "numba")]
    assert results[0] == results[1] != ""


def test_four_callers_at_once(pool):
    script = """
torch.set_num_threads(2)
expected, wrong = norm(), []

def call():
    for _ in range(50):
        try:
            if not same(norm(), expected):
                wrong.append("differs")
        except BaseException as error:
            wrong.append(repr(error))

callers = [threading.Thread(target=call) for _ in range(4)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(wrong)
"""
    assert run(script, TILEWISE_POOL=pool) == "[]"


def test_a_child_after_a_fork(pool):
    """Its forward pass: torch's autograd and torch's own parallel loops do not survive a fork."""
    script = """
torch.set_num_threads(2)

def forward():
    x = torch.randn(512, 257, generator=torch.Generator().manual_seed(0))
    return tilewise.rms_norm(x, torch.ones(257), backend="numba").numpy().tobytes()

expected = forward()
child = os.fork()
if child == 0:
    os._exit(0 if forward() == expected else 3)
deadline = time.time() + 100
while time.time() < deadline:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    sys.exit("the child hangs")
print(os.waitstatus_to_exitcode(status), forward() == expected)
"""
    assert run(script, TILEWISE_POOL=pool) == "0 True"


def test_a_data_loader_worker(pool):
    script = """
x = torch.randn(8, 64, 257)

def prepare(rows):
    return tilewise.rms_norm(torch.stack(rows).flatten(0, 1), backend="numba")

torch.set_num_threads(2)
expected = [prepare(list(x[:4])), prepare(list(x[4:]))]
loader = torch.utils.data.DataLoader(
    list(x), batch_size=4, num_workers=1, collate_fn=prepare, timeout=100,
    multiprocessing_context="fork",
)
print(same(list(loader), expected))
"""
    assert run(script, TILEWISE_POOL=pool) == "True"


STATISTICS = """
norm()
kept = [d for k in (kernels._forward, kernels._backward) for d in (k.body, k._launch)]
print(sum(sum(d.stats.cache_hits.values()) for d in kept),
      sum(sum(d.stats.cache_misses.values()) for d in kept))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    first = run(STATISTICS, TILEWISE_CACHE=str(tmp_path), TILEWISE_POOL="torch").split()
    second = run(STATISTICS, TILEWISE_CACHE=str(tmp_path), TILEWISE_POOL="torch").split()
    assert first[0] == "0"
    assert int(first[1]) >= 2
    assert int(second[0]) >= 2
    assert second[1] == "0"


def test_what_is_kept_gives_the_bits_of_what_was_compiled(tmp_path):
    script = """
import hashlib
generator = torch.Generator().manual_seed(0)
x, residual, dy = torch.randn(3, 64, 1024, generator=generator).unbind()
weight, bias = torch.rand(2, 1024, generator=generator).unbind()
inputs = [t.requires_grad_() for t in (x, residual, weight, bias)]
y, total = tilewise.add_layer_norm(*inputs, backend="numba")
for t in (y, total, *torch.autograd.grad(y, inputs, dy)):
    print(hashlib.sha256(t.detach().numpy().tobytes()).hexdigest())
"""
    first, second = (run(script, TILEWISE_CACHE=str(tmp_path)) for _ in range(2))
    assert first == second and len(first.split()) == 6


def test_nowhere_to_write_the_cache(tmp_path):
    """A file where the folder would be: not even root can write there. Then nothing is kept, not
    even where Numba keeps code by itself, which an upgrade would find there."""
    (tmp_path / "file").touch()
    nowhere = {"TILEWISE_CACHE": str(tmp_path / "file" / "cache"), "HOME": str(tmp_path / "file")}
    expected = run("print(norm()[0].double().sum().item())")
    assert run("print(norm()[0].double().sum().item())", **nowhere) == expected
    assert run(STATISTICS, **nowhere).split()[0] == "0"


def test_compiling_warns_of_nothing(tmp_path):
    script = """
import warnings
warnings.simplefilter("error")
x = torch.ones(3, requires_grad=True)
tilewise.gelu(x, backend="numba").sum().backward()
"""
    run(script, TILEWISE_CACHE=str(tmp_path))

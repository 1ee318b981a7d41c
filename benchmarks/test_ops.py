"""Every workload of every op under pytest-benchmark, timed by the clock of `tilewise bench`.

The providers of a workload are timed together, interleaved; pytest-benchmark is then given each
one's samples to summarise, compare and store.
"""

from functools import cache

import pytest
import torch

import tilewise  # noqa: F401  (declares the ops)
from tilewise import bench, clock, libraries
from tilewise.check import standard_of
from tilewise.op import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS_EACH = 0.2

GROUPS = [
    (work, direction)
    for work in bench.works(list(OPS.values()), DEVICE, bench.DTYPES[DEVICE][0])
    for direction in bench.DIRECTIONS
]
CASES = [
    pytest.param(index, provider, id=f"{work}-{direction}-{provider}".replace(" ", "-"))
    for index, (work, direction) in enumerate(GROUPS)
    for provider in (*bench.PYTORCH, *libraries.ADAPTERS.get(work.op.name, ()), *work.op.backends)
]


@cache
def measured(index):
    """Samples by provider, or the reason why there are none."""
    work, direction = GROUPS[index]
    op = work.op
    torch.manual_seed(0)
    torch.compiler.reset()
    tensors, options = op.inputs(**work.size, device=DEVICE, dtype=work.dtype)
    standard = standard_of(op, tensors, options)
    calls, found = bench.providers(op, tensors, options, torch.get_num_threads(), None, True)
    if direction == "forward+backward" and standard.outputs == len(standard.names):
        return dict.fromkeys(calls, "has no gradient") | found
    green = {}
    for name, call in calls.items():
        verdict = bench.judge(op, call, tensors, options, standard)[direction != "forward"]
        found[name] = verdict.reason
        if bench.worth_timing(name, verdict):
            green[name] = bench.thunk(op, call, tensors, options, direction)
    cost = bench.cost_of(op, tensors, options, standard, direction)
    cold = DEVICE == "cuda" and clock.bound_by_memory(cost["bytes"], cost["flops"])
    return found | clock.interleaved(green, DEVICE, SECONDS_EACH, cold)


class Replay:
    """A clock that goes on by the next sample whenever the benchmarked function is called."""

    now = 0.0

    def __init__(self, samples):
        self.samples = iter(samples)

    def step(self):
        Replay.now += next(self.samples)


@pytest.mark.benchmark(timer=lambda: Replay.now, disable_gc=False)
@pytest.mark.parametrize("index, provider", CASES)
def test_op(benchmark, index, provider):
    found = measured(index).get(provider, "is not for this op, or not for this device")
    if isinstance(found, str):
        pytest.skip(f"{provider}: {found}")
    work, direction = GROUPS[index]
    benchmark.group = f"{work} {direction}"
    benchmark.extra_info |= {"provider": provider, "threads": torch.get_num_threads()}
    replay = Replay(found.seconds)
    benchmark.pedantic(replay.step, rounds=len(found.seconds))
    assert benchmark.stats.stats.median == pytest.approx(clock.summary(found)["seconds"])

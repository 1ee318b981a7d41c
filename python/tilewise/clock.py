"""The clock: interleaved, warmed up, cold where memory is what counts; seconds, bytes and roofs."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

SHORTEST = 100e-6  # seconds a sample on a CPU takes at least; a shorter call is repeated within it
FEWEST, MOST = 5, 200  # rounds
FEW_FLOPS = 10  # for a byte: every GPU does as many while it reads one


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, once a round.

    Attributes:
        seconds: On a CPU the wall clock's, on a GPU the device's own between two events.
        host_seconds: On a CPU those the calling thread computed, which no neighbour disturbs; on
            a GPU those until the call returned, the queue being empty.
    """

    seconds: list[float]
    host_seconds: list[float]


@dataclass(frozen=True)
class Roof:
    """What this machine can do at most: measured, once a run."""

    device: str
    threads: int
    dtype: str
    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def share(self, seconds: float, moved: int | None, flops: int | None) -> float | None:
        """The least time that the bytes or the flops take, as a part of `seconds`."""
        floors = [
            (moved or 0) / self.copy_bytes_per_second,
            (flops or 0) / self.matmul_flops_per_second,
        ]
        return max(floors) / seconds if any(floors) and seconds else None


def interleaved(
    calls: Mapping[str, Call], device: str, seconds_each: float, cold: bool = False
) -> dict[str, Samples]:
    """Time every call once a round, so that what disturbs the machine disturbs them all.

    Args:
        calls: What to time, by name.
        device: "cpu" or "cuda".
        seconds_each: About how long to spend on each, warming up aside.
        cold: Empty the L2 cache of a GPU before each call.
    """
    sample = _on_gpu if device == "cuda" else _on_cpu
    timers = {name: sample(call, cold) for name, call in calls.items()}
    first = [timer() for timer in timers.values()]
    round_seconds = sum(max(pair) for pair in first)
    rounds = min(max(int(seconds_each * len(calls) / max(round_seconds, 1e-9)), FEWEST), MOST)
    taken: dict[str, Samples] = {name: Samples([], []) for name in calls}
    names = list(calls)
    for i in range(rounds):
        start = i % len(names)  # nobody always follows the same one
        for name in names[start:] + names[:start]:
            seconds, host_seconds = timers[name]()
            taken[name].seconds.append(seconds)
            taken[name].host_seconds.append(host_seconds)
    return taken


def _on_cpu(call: Call, cold: bool) -> Callable[[], tuple[float, float]]:
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(SHORTEST / max(time.perf_counter() - start, 1e-9)))

    def sample() -> tuple[float, float]:
        start, thread_start = time.perf_counter(), time.thread_time()
        for _ in range(repeats):
            call()
        thread_end, end = time.thread_time(), time.perf_counter()
        return (end - start) / repeats, (thread_end - thread_start) / repeats

    return sample


def _on_gpu(call: Call, cold: bool) -> Callable[[], tuple[float, float]]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flushed = 4 * properties.L2_cache_size if cold else 0
    flush = torch.empty(flushed, dtype=torch.uint8, device="cuda")

    def sample() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - begun
        torch.cuda.synchronize()
        flush.zero_()
        # Keeps the device busy until the call is queued, so that a short kernel is not timed
        # together with the host that was too slow to launch it. In cycles, at about 2 GHz.
        torch.cuda._sleep(int(4e9 * host_seconds) + 1000)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, host_seconds

    return sample


def bound_by_memory(moved: int | None, flops: int | None) -> bool:
    """Whether the bytes of an op take a GPU longer than its matrix products."""
    return (flops or 0) < FEW_FLOPS * (moved or 0)


def fair_clock(device: str, threads: int) -> str:
    """Which field of `Samples` to compare by.

    The own clock of a single thread stands still while a neighbour has its processor.
    """
    return "host_seconds" if device == "cpu" and threads == 1 else "seconds"


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of `values` lie, interpolated."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure_roof(device: str, dtype: torch.dtype) -> Roof:
    """Time a large copy and a large matrix product: the two ceilings of this machine."""
    megabytes, side = (1024, 8192) if device == "cuda" else (128, 1024)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    fair = fair_clock(device, torch.get_num_threads())
    samples = interleaved(calls, device, 0.5)
    fastest = {name: quantile(getattr(taken, fair), 0.1) for name, taken in samples.items()}
    return Roof(
        device,
        torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
        2 * source.nbytes / fastest["copy"],
        2 * side**3 / fastest["matmul"],
    )


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that PyTorch held during `call` beyond what it held before; outputs count.

    On a CPU it is added up from the profiler's record of every allocation, so what a library takes
    without asking PyTorch is not seen.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        _without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        call()
    held = most = 0
    for event in _memory_events(profiler):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Some builds of the profiler write two lines there from C++ each time it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _memory_events(profiler: Any) -> list[Any]:
    events = profiler.profiler.kineto_results.events()
    return sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())


def summary(samples: Samples) -> dict[str, float]:
    """Median, p10 and p90 of the seconds, and the median of the host's."""
    return {
        "seconds": statistics.median(samples.seconds),
        "host_seconds": statistics.median(samples.host_seconds),
        "p10": quantile(samples.seconds, 0.1),
        "p90": quantile(samples.seconds, 0.9),
    }

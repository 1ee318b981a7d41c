"""What a measurement was made on: versions, processor, GPU, clocks, allocator, commit, date."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("tilewise", "torch", "triton", "numba", "llvmlite", "numpy")
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Everything that a time depends on and a reader cannot know, as JSON takes it."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_mhz": cpu_mhz(),
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if cuda else None,
        "nvcc": shutil.which("nvcc"),
        **(nvidia_smi() if cuda else {"driver": None, "clocks": None}),
        "allocator": allocator(),
    }


def versions() -> dict[str, str | None]:
    """The version of every package that a kernel is made with; None for one that is absent."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """The name under which results for `device` are kept: letters, digits and dashes."""
    full = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    words = "".join(c if c.isalnum() else " " for c in full.lower()).split()
    return "-".join(words) or "unknown"


def cpu_name() -> str:
    """The processor as the operating system calls it, with its widest vectors."""
    name = next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def cpu_mhz() -> float | None:
    """The clock of the fastest core at this moment, where the system tells."""
    clocks = [float(value) for value in _cpuinfo("cpu MHz")]
    return max(clocks) if clocks else None


def _cpuinfo(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def nvidia_smi() -> dict[str, str | None]:
    """The driver's version, and the clocks of the first GPU at this moment."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"driver": None, "clocks": None}
    driver, *clocks = (word.strip() for word in line.stdout.split(","))
    names = ("sm", "memory", "largest sm", "power limit")
    return {
        "driver": driver,
        "clocks": ", ".join(f"{n} {c}" for n, c in zip(names, clocks, strict=False)),
    }


def allocator() -> str:
    """What hands out memory: the system's default, or what the environment puts in its place."""
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    tuned = [name for name in os.environ if name.startswith("MALLOC_") or name in names]
    return ", ".join(f"{name}={os.environ[name]}" for name in sorted(tuned)) or "default"


def commit() -> str:
    """The commit of the checkout, "-changed" where files differ from it; "unknown" without git.

    TILEWISE_COMMIT names it where the sources were copied without their history.
    """
    if given := os.environ.get("TILEWISE_COMMIT"):
        return given
    if not (SOURCE_ROOT / "csrc").is_dir():  # installed, maybe within the history of others
        return "unknown"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-changed" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(SOURCE_ROOT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()

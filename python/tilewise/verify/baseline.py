"""Committed figures of every kernel, by the version of the compiler that made them."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

from tilewise import toolchain
from tilewise.verify.kernel import Kernel

FOLDER = Path(__file__).parent / "baselines"
FIGURES = ("loop_instructions", "warps", "work", "registers", "shared")
GROWTH = 1.1  # of the instructions of a hot loop, for the same work

Figures = Mapping[str, list[float]]


@cache
def version(backend: str) -> str | None:
    """The compiler of a backend: "triton-3.9.0", "nvcc-13.0.88"; None where it is absent."""
    if backend == "triton":
        try:
            return f"triton-{package_version('triton')}"
        except PackageNotFoundError:
            return None
    compiler = toolchain.nvcc()
    if compiler is None:
        return None
    number = re.search(r"V(\d+\.\d+\.\d+)", toolchain.version(compiler))
    return f"nvcc-{number[1]}" if number else None


def file_of(backend: str, architecture: str) -> Path:
    """Where the figures of this machine's compiler are, or would be."""
    return FOLDER / f"{version(backend)}-{architecture}.json"


def read(file: Path) -> Figures:
    """The figures of a file, by the kernel's name.

    Raises:
        ValueError: If it holds none.
    """
    try:
        found = json.loads(file.read_text())
        figures: Figures = found["kernels"]
        assert found["figures"] == list(FIGURES)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"baseline: {file} must be one of tilewise, got {error!r}") from error
    return figures


def committed(backend: str, architecture: str) -> Figures | None:
    """The figures for this machine's compiler; None if none were committed."""
    file = file_of(backend, architecture)
    return read(file) if file.exists() else None


def grown(kernel: Kernel, known: Figures) -> str | None:
    """What is worse than the baseline allows."""
    if kernel.error or kernel.name not in known or not kernel.cycles:
        return None
    instructions, warps, done, *_ = known[kernel.name]
    # For the same work: ptxas may have unrolled the loop, or its tile may have another size.
    growth = kernel.loop_instructions * kernel.warps * done / (instructions * warps * work(kernel))
    if growth <= GROWTH:
        return None
    return (
        f"must keep its {'loop' if kernel.loop else 'code'} within {GROWTH - 1:.0%} of "
        f"{instructions} instructions, got {kernel.loop_instructions}, "
        f"{growth - 1:.0%} more for the same work"
    )


def work(kernel: Kernel) -> float:
    """What an iteration of a block's hot loop gets done: in cycles of the tensor cores, or without
    such work of the memory."""
    return kernel.cycles.get("tensor") or kernel.cycles.get("memory") or 1.0


def write(kernels: Iterable[Kernel], file: Path, others: Figures) -> None:
    """Write the figures of `kernels`, and of `others`, which were not compiled now."""
    rows = dict(others) | {
        k.name: [k.loop_instructions, k.warps, work(k), k.registers, k.shared]
        for k in kernels
        if not k.error
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f'"figures": {json.dumps(FIGURES)},\n "kernels": '
    file.write_text("{" + head + "{\n" + lines + "\n }}\n")

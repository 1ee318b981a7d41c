"""What is known of one compiled kernel: a row of the kernel report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilewise.verify.ahead_of_time import Launch
from tilewise.verify.architectures import Architecture, occupancy
from tilewise.verify.disassembly import Code, counts, disassemble, hot_loop, spills

SERIALISED = re.compile(r"\((C75\d\d)\)[^\n]*")
_REGISTERS = re.compile(r"Used (\d+) registers")
_AMD = {
    "registers": re.compile(r"\.vgpr_count:\s*(\d+)"),
    "spill_loads": re.compile(r"\.vgpr_spill_count:\s*(\d+)"),
    "spill_stores": re.compile(r"\.sgpr_spill_count:\s*(\d+)"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        op: The op that launches it, "" for a kernel of nobody's.
        kernel: The function's name.
        backend: "triton" or "cuda".
        architecture: Such as "sm_90".
        dtype: Of the op's first tensor.
        size: The first declared size that launches it.
        launch: Which of that size's launches, counted from 0.
        options: Its compile-time constants, warps and stages.
        registers: A thread's.
        spill_loads: Loads of local memory, in instructions. (gfx942: vector registers spilled.)
        spill_stores: Stores of it. (gfx942: scalar registers spilled.)
        shared: Bytes of shared memory of a block; of a CUDA kernel those fixed at compile time.
        warps: Of a block; the most it is made for.
        blocks: At once on a multiprocessor.
        occupancy: Their share of the warps that it could hold.
        limit: What there is not enough of for one block more.
        matrix: Matrix instructions by name.
        bulk: Bulk and asynchronous copies by name.
        loads: Loads of global memory by bytes a thread, in instructions.
        stores: Stores of it.
        instructions: Of the whole kernel.
        loop: Whether it has a hot loop.
        loop_instructions: Of the hot loop, or of the whole kernel without one.
        cycles: What one block's iteration takes of a multiprocessor, by unit.
        bound: The unit with the most.
        warnings: Of ptxas, on matrix instructions that it had to serialise.
        error: Why it does not compile, or "".
    """

    op: str
    kernel: str
    backend: str
    architecture: str
    dtype: str
    size: Mapping[str, Any] = field(default_factory=dict)
    launch: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    registers: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    shared: int = 0
    warps: int = 0
    blocks: int = 0
    occupancy: float = 0.0
    limit: str = ""
    matrix: Mapping[str, int] = field(default_factory=dict)
    bulk: Mapping[str, int] = field(default_factory=dict)
    loads: Mapping[str, int] = field(default_factory=dict)
    stores: Mapping[str, int] = field(default_factory=dict)
    instructions: int = 0
    loop: bool = False
    loop_instructions: int = 0
    cycles: Mapping[str, float] = field(default_factory=dict)
    bound: str = ""
    warnings: Sequence[str] = ()
    error: str = ""

    @property
    def name(self) -> str:
        """What it is called in baselines: stable while its source, options and figures change."""
        size = " ".join(f"{name}={value}" for name, value in self.size.items())
        place = f"#{self.launch}" if self.size else ""
        return " ".join(filter(None, (self.op, self.kernel, self.dtype, size, place)))

    @property
    def tensor_share(self) -> float:
        """How busy the tensor cores are at most: if everything overlaps."""
        longest = max(self.cycles.values(), default=0.0)
        return self.cycles["tensor"] / longest if longest else 0.0


def measure(code: Code, architecture: Architecture, shared: int, warps: int) -> dict[str, Any]:
    """The fields of a `Kernel` that are read from its machine code."""
    loads, stores = spills(code)
    loop = hot_loop(code, architecture, warps)
    matrix, bulk, reads, writes = counts(code)
    return {
        "spill_loads": loads,
        "spill_stores": stores,
        "shared": shared,
        "warps": warps,
        "matrix": matrix,
        "bulk": bulk,
        "loads": reads,
        "stores": writes,
        "instructions": len(code.instructions),
        "loop": loop.looped,
        "loop_instructions": loop.instructions,
        "cycles": loop.cycles,
        "bound": loop.bound,
    }


def with_occupancy(found: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """`found`, and how many blocks of such a kernel fit a multiprocessor."""
    fits = occupancy(architecture, found["registers"], found["shared"], found["warps"])
    return found | {"blocks": fits.blocks, "occupancy": fits.share, "limit": fits.limit}


def inspect(launch: Launch, architecture: Architecture, /, **about: Any) -> Kernel:
    """The row of a Triton kernel that was compiled; `about` is what else is known of it."""
    (row,) = inspect_all([(launch, about)], architecture)
    return row


def inspect_all(
    compiled: Sequence[tuple[Launch, dict[str, Any]]], architecture: Architecture
) -> list[Kernel]:
    """The rows of several kernels, whose machine code is then read at once."""
    if architecture.backend == "hip":
        return [_amd_row(launch, architecture, about) for launch, about in compiled]
    codes = disassemble([launch.compiled.asm["cubin"] for launch, _ in compiled], architecture)
    return [
        _row(launch, architecture, about, code)
        for (launch, about), (code,) in zip(compiled, codes, strict=True)
    ]


def _known(launch: Launch, architecture: Architecture) -> dict[str, Any]:
    return {
        "kernel": launch.kernel,
        "backend": "triton",
        "architecture": architecture.name,
        "options": dict(launch.options),
    }


def _amd_row(launch: Launch, architecture: Architecture, about: dict[str, Any]) -> Kernel:
    text, metadata = launch.compiled.asm["amdgcn"], launch.compiled.metadata
    counted: dict[str, Any] = {
        name: max(map(int, pattern.findall(text))) for name, pattern in _AMD.items()
    }
    mfma = text.count("v_mfma_")
    counted |= {"shared": metadata.shared, "warps": metadata.num_warps}
    counted["matrix"] = {"mfma": mfma} if mfma else {}
    return Kernel(**about, **_known(launch, architecture), **counted)


def _row(launch: Launch, architecture: Architecture, about: dict[str, Any], code: Code) -> Kernel:
    metadata = launch.compiled.metadata
    found = measure(code, architecture, metadata.shared, metadata.num_warps)
    registers = _REGISTERS.search(launch.log)
    assert registers, launch.log
    found["registers"] = int(registers[1])
    found["warnings"] = sorted(set(SERIALISED.findall(launch.log)))
    return Kernel(**about, **_known(launch, architecture), **with_occupancy(found, architecture))

"""What the GPUs of one architecture can hold and do: the numbers of the occupancy and loop models.

Limits are those of the CUDA programming guide's table of compute capabilities; rates are a cycle of
one multiprocessor, worked out from the vendor's peak rates of the part named and its boost clock.
"""

from dataclasses import dataclass
from fractions import Fraction

REGISTERS = 65536  # of a multiprocessor, given out 256 at a time to a warp
QUARTERS = 4  # schedulers of a multiprocessor, each with a quarter of the registers
RESERVED_SHARED = 1024  # bytes of every block that the system keeps


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: As the command line takes it: "sm_90".
        backend: Triton's: "cuda" or "hip".
        number: As Triton names the target: 90, or "gfx942".
        warp: Threads of a warp.
        nvcc: As nvcc names it, with what only this architecture has: "90a"; "" without CUDA.
        shared: Bytes of shared memory that a block may have.
        shared_all: Bytes of shared memory of a multiprocessor.
        warps: Most warps of a multiprocessor.
        blocks: Most blocks of a multiprocessor.
        tensor: Dense 16-bit floating-point operations of the tensor cores a cycle.
        fp32: Lanes of fp32 arithmetic.
        memory: Bytes from DRAM a cycle, of a multiprocessor's share.
        cached: Bytes from the L2 cache; published for A100 alone, for the others a guess.
    """

    name: str
    backend: str = "cuda"
    number: int | str = 0
    warp: int = 32
    nvcc: str = ""
    shared: int = 0
    shared_all: int = 0
    warps: int = 64
    blocks: int = 32
    tensor: int = 0
    fp32: int = 128
    memory: float = 0.0
    cached: float = 40.0


SPECIAL_LANES = 16  # of the special functions (exp2, log2, rsqrt), on all of them
SHARED_BYTES = 128  # a cycle
ISSUE = 4  # warp instructions a cycle

_KB = 1024
ARCHITECTURES = {
    a.name: a
    for a in (
        # A100 SXM 80 GB: 312 TFLOP/s, 2039 GB/s, 108 multiprocessors at 1.41 GHz.
        Architecture(
            "sm_80", number=80, nvcc="80", shared=163 * _KB, shared_all=164 * _KB, tensor=2048,
            fp32=64, memory=13.4, cached=47.4,
        ),
        # H200 SXM: 990 TFLOP/s, 4800 GB/s, 132 at 1.83 GHz. (H100: 3350 GB/s.)
        Architecture(
            "sm_90", number=90, nvcc="90a", shared=227 * _KB, shared_all=228 * _KB, tensor=4096,
            memory=19.9,
        ),
        # B200: 2250 TFLOP/s, 8000 GB/s, 148 at 1.85 GHz.
        Architecture(
            "sm_100", number=100, nvcc="100a", shared=227 * _KB, shared_all=228 * _KB, tensor=8192,
            memory=29.2,
        ),
        # RTX PRO 6000: 504 TFLOP/s, 1792 GB/s, 188 at 2.62 GHz. GeForce has half the tensor rate.
        Architecture(
            "sm_120", number=120, nvcc="120a", shared=99 * _KB, shared_all=100 * _KB, warps=48,
            blocks=24, tensor=1024, memory=3.6,
        ),
        Architecture("gfx942", backend="hip", number="gfx942", warp=64, shared=64 * _KB),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel a multiprocessor holds.

    Attributes:
        blocks: At once; 0 if not even one fits.
        share: Of the warps that it could hold.
        limit: What there is not enough of for one more: registers, shared memory, warps or blocks.
    """

    blocks: int
    share: float
    limit: str


def occupancy(architecture: Architecture, registers: int, shared: int, warps: int) -> Occupancy:
    """How many blocks of `warps` warps fit, by a thread's registers and a block's shared bytes."""
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    held = REGISTERS // QUARTERS // of_a_warp * QUARTERS
    fits = {
        "registers": held // warps,
        "shared memory": architecture.shared_all // (-(-shared // 128) * 128 + RESERVED_SHARED),
        "warps": architecture.warps // warps,
        "blocks": architecture.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    blocks = fits[limit]
    return Occupancy(blocks, float(Fraction(blocks * warps, architecture.warps)), limit)

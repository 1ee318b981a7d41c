"""Machine code, read: what a kernel's instructions are, where its hot loop is, what that costs.

The loop model is static. For each unit of a multiprocessor it adds up the cycles which one block
keeps it busy in one iteration; the unit with the most bounds the kernel if everything overlaps.
It knows no latency and no bank conflict. Global memory is DRAM, but for a loop with matrix
instructions, whose tiles other blocks read too, the L2 cache.
"""

import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tilewise.verify.architectures import ISSUE, SHARED_BYTES, SPECIAL_LANES, Architecture

MATRIX = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "IMMA", "QMMA", "DMMA")
BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "LDGSTS")
UNITS = ("tensor", "issue", "fp32", "special", "shared", "memory")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
FP32 = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"}
PADDING = 12  # instructions: a shorter inner loop only waits
INSTRUCTION = 16  # bytes
ROW_BYTES = 32  # of an operand's row that one matrix instruction reads from shared memory

_LINE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+"
    r"(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*)"
)
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/")
_JUMP = re.compile(r"(\bBRA\b[^;]*?)\b0x([0-9a-f]+)(?=\s*;)")
_LABEL = re.compile(r"^(\.L_\w+):")
_KERNEL = re.compile(r"^\.text\.([\w$.]+):$", re.MULTILINE)
_WARP_MATRIX = re.compile(r"^[HIQ]MMA\.(?:SP\.)?(16|8)(8)(\d{1,3})\b")
_GROUP_MATRIX = re.compile(r"^[HIQ]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its name with all suffixes, its operands, its predicate or ""."""

    name: str
    rest: str
    predicate: str = ""

    @property
    def word(self) -> str:
        """The name without its suffixes."""
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for a thread."""
        return next((WIDTHS[s] for s in self.name.split(".")[1:] if s in WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, and its loops as places of their first and last one."""

    kernel: str
    instructions: Sequence[Instruction]
    loops: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Loop:
    """What one iteration of the hot loop costs a block; without a loop, what the whole kernel does.

    Attributes:
        looped: Whether there is a loop.
        instructions: Of one warp.
        cycles: By unit, of a multiprocessor, for all warps of the block.
    """

    looped: bool
    instructions: int
    cycles: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """The unit that is busy the longest."""
        return max(self.cycles, key=lambda unit: self.cycles[unit]) if self.cycles else ""


# --- The tools.


@cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or that of triton's wheel."""
    if found := shutil.which(name):
        return found
    from importlib.util import find_spec

    spec = find_spec("triton")
    for place in (spec and spec.submodule_search_locations) or []:
        file = Path(place) / "backends" / "nvidia" / "bin" / name
        if file.is_file():
            return str(file)
    return None


def disassemble(
    cubins: Sequence[bytes],
    architecture: Architecture,
    wanted: Callable[[str], bool] = lambda kernel: True,
) -> list[list[Code]]:
    """The `wanted` kernels of each cubin, all of one architecture.

    The tool takes a third of a second to begin and hardly any time to read, but takes one file at
    a time: so it gets the instructions alone, of all of them.

    Raises:
        RuntimeError: If there is no nvdisasm, or it cannot read this.
    """
    program = tool("nvdisasm")
    if program is None:
        raise RuntimeError("disassemble: nvdisasm must be on PATH or come with triton, got neither")
    functions = [[f for f in sections(cubin, ".text.") if wanted(f[0])] for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code for each in functions for _, code in each))
        file.flush()
        command = [program, "-b", f"SM{architecture.nvcc}", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"disassemble: {program} must read the code, got {run.stderr.strip()}")
    lines = {int(found[1], 16): line for line in run.stdout.splitlines()
             if (found := _ADDRESS.match(line))}  # fmt: skip
    begin = 0
    codes: list[list[Code]] = []
    for each in functions:
        codes.append([])
        for name, code in each:
            mine = [lines[at] for at in range(begin, begin + len(code), INSTRUCTION) if at in lines]
            codes[-1].append(_code(name, _labelled(mine)))
            begin += len(code)
    return codes


def sections(cubin: bytes, prefix: str) -> Iterator[tuple[str, bytes]]:
    """The sections of a cubin, a 64-bit ELF file, that are named `prefix` and of what kernel."""
    (first,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, first + i * size) for i in range(count)]
    for name, _, _, _, offset, length in heads:
        start = heads[names][4] + name
        word = cubin[start : cubin.index(b"\0", start)].decode()
        if word.startswith(prefix):
            yield word.removeprefix(prefix), cubin[offset : offset + length]


def _labelled(lines: Sequence[str]) -> str:
    """Instructions with labels in place of addresses, as `nvdisasm -c` prints them."""
    targets = {found[2] for line in lines if (found := _JUMP.search(line))}
    text = []
    for line in lines:
        found = _ADDRESS.match(line)
        if found and (at := f"{int(found[1], 16):x}") in targets:
            text.append(f".L_{at}:")
        text.append(_JUMP.sub(r"\1`(.L_\2)", line))
    return "\n".join(text)


# --- What it says.


def parse(text: str) -> list[Code]:
    """The kernels in the output of `nvdisasm -c`."""
    parts = _KERNEL.split(text)
    return [_code(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]


def _code(name: str, text: str) -> Code:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif (parts := _LINE.match(line)) and parts["name"] != "NOP":
            found.append(Instruction(parts["name"], parts["rest"], parts["predicate"] or ""))
    loops = []
    for end, instruction in enumerate(found):
        target = re.search(r"\.L_\w+", instruction.rest)
        if instruction.word != "BRA" or target is None:
            continue
        start = labels.get(target[0], end)
        body = {i.word for i in found[start:end]}
        # A jump back over the end of the kernel returns from a path that is seldom taken.
        if start < end and not body & {"EXIT", "RET"}:
            loops.append((start, end))
        elif start == end and not instruction.predicate:
            found = found[:end]  # behind the last instruction, to itself
            break
    return Code(name, found, loops)


def flops(code: Code, place: int) -> float:
    """Operations of one warp (of the whole block: UTC...) in a matrix instruction, in 16-bit ones.

    Those of TF32 count twice and 8-bit ones half, which is what they take of the tensor cores.
    """
    instruction = code.instructions[place]
    word, name = instruction.word, instruction.name
    weight = 2.0 if "TF32" in name else 0.5 if word[0] in "IQ" or word == "UTCQMMA" else 1.0
    if group := _GROUP_MATRIX.match(name):
        m, n, k = map(int, group.groups())
        return weight * 2 * m * n * k / 4  # each of its four warps counts it
    if warp := _WARP_MATRIX.match(name):
        m, n, k = map(int, warp.groups())
        return weight * 2 * m * n * k
    if word in ("UTCHMMA", "UTCQMMA"):
        m, n = _tensor_memory_shape(code, place)
        return weight * 2 * m * n * (32 if word == "UTCQMMA" else 16)
    return 0.0


def _tensor_memory_shape(code: Code, place: int) -> tuple[int, int]:
    """Rows and columns from the instruction descriptor, a constant put in a uniform register."""
    register = re.search(r"idesc\[(UR\d+)\]", code.instructions[place].rest)
    for earlier in reversed(code.instructions[:place]):
        if register and re.match(rf"\s*{register[1]}, 0x", earlier.rest):
            bits = int(earlier.rest.split(",")[1], 16)
            return (bits >> 24 & 0x1F) << 4, (bits >> 17 & 0x3F) << 3
    return 0, 0


def _shared_bytes(code: Code, place: int) -> float:
    """Bytes of shared memory that one warp reads or writes."""
    instruction = code.instructions[place]
    word, name = instruction.word, instruction.name
    if instruction.predicate == "!PT":
        return 0.0
    if word in ("LDS", "STS", "LDGSTS", "ATOMS"):
        return max(32 * instruction.width, SHARED_BYTES)
    if word in ("LDSM", "STSM"):
        last = name.rsplit(".", 1)[1]  # LDSM.16.M88.4 moves four matrices of 8 x 8, LDSM.16.M88 one
        return 128.0 * (int(last) if last.isdigit() else 1)
    if word == "SHFL":
        return SHARED_BYTES
    if group := _GROUP_MATRIX.match(name):
        m, n, _ = map(int, group.groups())
        in_registers = re.match(r"\s*R\d+, R\d+", instruction.rest)
        return ROW_BYTES * (n + (0 if in_registers else m)) / 4
    if word in ("UTCHMMA", "UTCQMMA"):
        m, n = _tensor_memory_shape(code, place)
        return float(ROW_BYTES * (n + (m if instruction.rest.count("gdesc") > 1 else 0)))
    return 0.0


def hot_loop(code: Code, architecture: Architecture, warps: int) -> Loop:
    """The innermost loop that does the most, or the whole kernel if it has none that works.

    Most in operations of the tensor cores, of those alike the shortest, which is the one without
    the masks of a tile at the edge; without such, most in bytes of global memory, then the longest.
    """
    working = [loop for loop in code.loops if loop[1] - loop[0] >= PADDING]
    inner = [
        (a, b) for a, b in working
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in working)
    ]  # fmt: skip

    def weight(loop: tuple[int, int]) -> tuple[float, float, int]:
        places = range(loop[0], loop[1] + 1)
        work = sum(flops(code, i) for i in places)
        moved = 0.0 if work else sum(_global_bytes(code.instructions[i]) for i in places)
        return work, moved, (len(places) if not work else -len(places))

    best = max(inner, key=weight, default=None)
    if best is None or weight(best)[:2] == (0.0, 0.0):
        best = (0, len(code.instructions) - 1)
    places = range(best[0], best[1] + 1)
    cycles = _cycles(code, places, architecture, warps) if architecture.tensor else {}
    return Loop(best in inner, len(places), cycles)


def _global_bytes(instruction: Instruction) -> float:
    moves = instruction.word in ("LDG", "STG", "LD", "ST", "LDGSTS")
    return 32.0 * instruction.width if moves else 0.0


def _cycles(
    code: Code, places: Sequence[int], architecture: Architecture, warps: int
) -> dict[str, float]:
    total = dict.fromkeys(UNITS, 0.0)
    for place in places:
        instruction = code.instructions[place]
        word = instruction.word
        everyone = 1 if word.startswith("UTC") else warps  # one thread issues it for all
        total["issue"] += warps / ISSUE
        total["tensor"] += everyone * flops(code, place) / architecture.tensor
        total["shared"] += everyone * _shared_bytes(code, place) / SHARED_BYTES
        total["memory"] += warps * _global_bytes(instruction) / architecture.memory
        if word == "MUFU":
            total["special"] += warps * 32 / SPECIAL_LANES
        elif word in FP32:
            total["fp32"] += warps * 32 * (2 if word.endswith("2") else 1) / architecture.fp32
    if total["tensor"]:
        total["memory"] *= architecture.memory / architecture.cached
    return {unit: round(cycles, 1) for unit, cycles in total.items()}


def counts(code: Code) -> tuple[dict[str, int], dict[str, int], dict[str, int], dict[str, int]]:
    """How many matrix and copy instructions, and loads and stores of global memory by bytes."""
    words = Counter(i.word for i in code.instructions)
    loads = Counter(str(i.width) for i in code.instructions if i.word in ("LDG", "LD", "LDGSTS"))
    stores = Counter(str(i.width) for i in code.instructions if i.word in ("STG", "ST"))
    matrix = {word: words[word] for word in MATRIX if words[word]}
    bulk = {word: words[word] for word in BULK if words[word]}
    return matrix, bulk, _by_width(loads), _by_width(stores)


def _by_width(found: Counter[str]) -> dict[str, int]:
    return {width: found[width] for width in sorted(found, key=int)}


def spills(code: Code) -> tuple[int, int]:
    """Loads and stores of local memory, in instructions."""
    words = Counter(i.word for i in code.instructions)
    return words["LDL"], words["STL"]

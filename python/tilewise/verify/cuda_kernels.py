"""The CUDA C++ kernels, compiled by nvcc and measured as the Triton ones are."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tilewise import toolchain
from tilewise.op import OPS
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.disassembly import disassemble
from tilewise.verify.kernel import SERIALISED, Kernel, measure, with_occupancy

UNBOUNDED = 256  # threads of a block whose kernel has no launch bound
WORDS = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_ENTRY = re.compile(r"Compiling entry function '([^']+)'.*?(?=Compiling entry function|\Z)", re.S)
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_BOUND = re.compile(r"\.entry ([\w$]+)\(.*?\)\s*(?:\.maxntid (\d+))?", re.S)
_FUNCTION = re.compile(r"^(?:void )?(?:\w+::)*(\w+(?:<.*>)?)\(")

CudaTask = tuple[str, str]


def missing() -> str | None:
    """What there is not, and without which no CUDA kernel can be compiled; None if all is here."""
    if toolchain.nvcc() is None:
        return "nvcc, on PATH or in CUDA_HOME"
    return None if toolchain.source() else "csrc/, which was not installed"


def tasks(ops: list[str], architectures: list[str]) -> list[CudaTask]:
    """Source files and architectures: of `ops`, or with none all there are."""
    folder = toolchain.source()
    if missing() or folder is None:
        return []
    words = {
        OPS[op].backends["cuda"].module.split(".")[3] for op in ops if "cuda" in OPS[op].backends
    }
    files = sorted((folder / "csrc" / "cuda").rglob("*.cu"))
    return [
        (str(file), architecture)
        for architecture in architectures
        if ARCHITECTURES[architecture].nvcc
        for file in files
        if not ops or _word(file) in words
    ]


def _word(file: Path) -> str:
    """`csrc/cuda/rms_norm.cu` -> "rms_norm", and all of a folder by its name."""
    return file.with_suffix("").parts[file.parts.index("cuda", file.parts.index("csrc")) + 1]


def compile_file(task: CudaTask) -> list[Kernel]:
    """The kernels of one source file for one architecture.

    Returns:
        One row a kernel; a single one with the error if it does not compile.
    """
    file, architecture = Path(task[0]), ARCHITECTURES[task[1]]
    include = file
    while include.name != "csrc":
        include = include.parent
    target = f"arch=compute_{architecture.nvcc},code=sm_{architecture.nvcc}"
    command = [str(toolchain.nvcc()), "-std=c++17", "-O3", "-DNDEBUG", f"-I{include}", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command += ["-gencode", target, "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        run = subprocess.run([*command, "-o", cubin, file], capture_output=True, text=True)
        if run.returncode:
            said = (run.stderr.strip().splitlines() or ["nothing"])[0]
            return [Kernel(_word(file), file.name, "cuda", architecture.name, "", error=said)]
        ptx = "".join(kept.read_text() for kept in Path(folder).glob("*.ptx"))
        (codes,) = disassemble([cubin.read_bytes()], architecture)
    bounds = {name: int(most or UNBOUNDED) for name, most in _BOUND.findall(ptx)}
    said_of = {found[1]: found[0] for found in _ENTRY.finditer(run.stderr)}
    rows = []
    for code in codes:
        about = said_of[code.kernel]
        used = _USED.search(about)
        assert used, about
        warps = -(-bounds[code.kernel] // 32)
        found: dict[str, Any] = measure(code, architecture, int(used[2] or 0), warps)
        found["registers"] = int(used[1])
        found["warnings"] = sorted(set(_codes(run.stderr, code.kernel)))
        name = _readable(code.kernel)
        row = with_occupancy(found, architecture)
        rows.append(Kernel(_word(file), name, "cuda", architecture.name, _dtype(name), **row))
    return rows


def _codes(said: str, kernel: str) -> list[str]:
    """Of what ptxas says of one kernel's matrix instructions."""
    return [
        code for line in said.splitlines() if f"'{kernel}'" in line
        for code in SERIALISED.findall(line)
    ]  # fmt: skip


def _readable(mangled: str) -> str:
    """`forward_kernel<8, bf16, fp32>`; the mangled name where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None:
        return mangled
    plain = subprocess.run([program, mangled], capture_output=True, text=True).stdout.strip()
    plain = plain.replace("(anonymous namespace)::", "")
    found = _FUNCTION.match(plain)
    name = found[1] if found else plain
    return re.sub(r"\b(?:__nv_bfloat16|__half|float|double)\b", lambda word: WORDS[word[0]], name)


def _dtype(name: str) -> str:
    """Of the first type among its template's arguments."""
    words = [word for word in re.findall(r"\w+", name) if word in DTYPES]
    return DTYPES[words[0]] if words else ""

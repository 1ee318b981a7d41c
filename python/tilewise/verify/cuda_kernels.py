"""The CUDA C++ kernels, compiled by nvcc and measured as the Triton ones are."""

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tilewise import native, toolchain
from tilewise.op import OPS
from tilewise.verify.architectures import ARCHITECTURES, Architecture
from tilewise.verify.disassembly import disassemble, sections, tool
from tilewise.verify.kernel import SERIALISED, Kernel, measure, with_occupancy

UNBOUNDED = 256  # threads of a block whose kernel has no launch bound
WORDS = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EVERY = {*DTYPES.values(), ""}  # "" is of a kernel that knows none

_ENTRY = re.compile(r"Compiling entry function '([^']+)'.*?(?=Compiling entry function|\Z)", re.S)
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_FILE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+)_cu_[0-9a-f]{8}")
_FUNCTION = re.compile(r"^(?:void )?(?:\w+::)*(\w+(?:<.*>)?)\(")

MAX_THREADS = b"\x04\x05"  # in .nv.info: the form of a value of so many bytes, three numbers

CudaTask = tuple[str, str]


def missing() -> str | None:
    """What there is not, and without which no CUDA kernel can be compiled; None if all is here."""
    if toolchain.nvcc() is None:
        return "nvcc, on PATH or in CUDA_HOME"
    return None if toolchain.source() else "csrc/, which was not installed"


def tasks(ops: list[str], architectures: list[str]) -> list[CudaTask]:
    """What is compiled or read, and for which architecture: all there is, or what `ops` need.

    The module, where it is built for the architecture as for no other; else the source files.
    """
    folder = toolchain.source()
    if missing() or folder is None:
        return []
    words = {
        OPS[op].backends["cuda"].module.split(".")[3] for op in ops if "cuda" in OPS[op].backends
    }
    files = sorted((folder / "csrc" / "cuda").rglob("*.cu"))
    found = []
    for architecture in architectures:
        if number := ARCHITECTURES[architecture].nvcc:
            module = native.place(folder, f"{number}-real") / toolchain.FILE
            sources = [file for file in files if not ops or _word(file) in words]
            needed = [module] if module.is_file() and not ops else sources
            found += [(str(file), architecture) for file in needed]
    return found


def _word(file: Path) -> str:
    """`csrc/cuda/rms_norm.cu` -> "rms_norm", and all of a folder by its name."""
    return file.with_suffix("").parts[file.parts.index("cuda", file.parts.index("csrc")) + 1]


def kernels_of(task: CudaTask, dtypes: Collection[str] = EVERY) -> list[Kernel]:
    """The kernels in these dtypes of one source file, or of the module, for one architecture.

    Returns:
        One row a kernel; a single one with the error if the file does not compile.
    """
    file, architecture = Path(task[0]), ARCHITECTURES[task[1]]
    return (_compiled if file.suffix == ".cu" else _built)(file, architecture, dtypes)


def _compiled(file: Path, architecture: Architecture, dtypes: Collection[str]) -> list[Kernel]:
    include = file
    while include.name != "csrc":
        include = include.parent
    target = f"arch=compute_{architecture.nvcc},code=sm_{architecture.nvcc}"
    command = [str(toolchain.nvcc()), "-std=c++17", "-O3", "-DNDEBUG", f"-I{include}", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command += ["-gencode", target, "-Xptxas=-v", "-o", str(cubin), str(file)]
        command += ["-DTILEWISE_HOPPER"] * (architecture.nvcc == "90a")  # as CMakeLists.txt does
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            said = (run.stderr.strip().splitlines() or ["nothing"])[0]
            return [Kernel(_word(file), file.name, "cuda", architecture.name, "", error=said)]
        words = {file.stem: _word(file)}
        return _rows([cubin.read_bytes()], run.stderr, words, architecture, dtypes)


def _built(module: Path, architecture: Architecture, dtypes: Collection[str]) -> list[Kernel]:
    """What a build has made is read, with what its log holds of ptxas: nothing compiles twice."""
    program = tool("cuobjdump")
    if program is None:
        raise RuntimeError("kernels: cuobjdump must be on PATH or come with triton, got neither")
    source = toolchain.source()
    assert source is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "-xelf", "all", str(module)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cubins = [file.read_bytes() for file in sorted(Path(folder).glob("*.cubin"))]
    said = module.with_name("build.log").read_text()
    words = {file.stem: _word(file) for file in (source / "csrc" / "cuda").rglob("*.cu")}
    return _rows(cubins, said, words, architecture, dtypes)


def _rows(
    cubins: list[bytes],
    said: str,
    words: dict[str, str],
    architecture: Architecture,
    dtypes: Collection[str],
) -> list[Kernel]:
    """A row for each kernel, from the machine code and from what ptxas said while it made that."""
    said_of = {found[1]: found[0] for found in _ENTRY.finditer(said)}
    names = _readable([name for cubin in cubins for name, _ in sections(cubin, ".text.")])
    if not names:  # a file whose kernels are for another architecture
        return []
    wanted = {mangled for mangled, name in names.items() if _dtype(name) in dtypes}
    warned = [line for line in said.splitlines() if SERIALISED.search(line)]
    rows = []
    codes_of = disassemble(cubins, architecture, wanted.__contains__)
    for cubin, codes in zip(cubins, codes_of, strict=True):
        attributes = dict(sections(cubin, ".nv.info."))
        for code in codes:
            about = said_of[code.kernel]
            used, file = _USED.search(about), _FILE.search(code.kernel)
            assert used, about
            if file is None and len(words) > 1:
                said_so = f"kernels: {names[code.kernel]} must be in an anonymous namespace"
                raise RuntimeError(f"{said_so}, or nobody knows of what file it is")
            word = words[file[1]] if file else next(iter(words.values()))
            warps = -(-_most_threads(attributes[code.kernel]) // 32)
            found: dict[str, Any] = measure(code, architecture, int(used[2] or 0), warps)
            found["registers"] = int(used[1])
            found["warnings"] = sorted(
                {
                    word
                    for line in warned
                    if f"'{code.kernel}'" in line
                    for word in SERIALISED.findall(line)
                }
            )
            row, name = with_occupancy(found, architecture), names[code.kernel]
            rows.append(Kernel(word, name, "cuda", architecture.name, _dtype(name), **row))
    return rows


def _most_threads(attributes: bytes) -> int:
    """The launch bound of a kernel, among what its section says of it."""
    at = 0
    while at < len(attributes):
        form, size = attributes[at], struct.unpack_from("<H", attributes, at + 2)[0]
        if attributes[at : at + 2] == MAX_THREADS:
            x, y, z = struct.unpack_from("<III", attributes, at + 4)
            return int(x * y * z)
        at += 4 + (size if form == MAX_THREADS[0] else 0)
    return UNBOUNDED


def _readable(mangled: list[str]) -> dict[str, str]:
    """`forward_kernel<8, bf16, fp32>` of each; the mangled name where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None:
        return {name: name for name in mangled}
    text = "\n".join(mangled)
    plain = subprocess.run([program], input=text, capture_output=True, text=True).stdout
    return dict(zip(mangled, map(_shortened, plain.splitlines()), strict=True))


def _shortened(plain: str) -> str:
    plain = plain.replace("(anonymous namespace)::", "")
    found = _FUNCTION.match(plain)
    name = found[1] if found else plain
    return re.sub(r"\b(?:__nv_bfloat16|__half|float|double)\b", lambda word: WORDS[word[0]], name)


def _dtype(name: str) -> str:
    """Of the first type among its template's arguments."""
    words = [word for word in re.findall(r"\w+", name) if word in DTYPES]
    return DTYPES[words[0]] if words else ""

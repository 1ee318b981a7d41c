"""What turns csrc/ into compiled modules and programs: sources, compilers, and the cache of builds.

Nothing here imports torch, nor the package: setup.py uses this file too.

    TILEWISE_CACHE       The cache, instead of `tilewise` in XDG_CACHE_HOME or ~/.cache.
    MAX_JOBS             How many compilers run at once.
    CUDACXX, CUDA_HOME   Where nvcc is, if not on PATH.
    CXX                  The C++ compiler, if not c++.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
FILE = f"_cuda{SUFFIX}"
PACKAGE = Path(__file__).resolve().parent

# Where no GPU is visible: Ampere, Hopper, and for all that came later PTX, compiled by the driver.
ARCHS = "80-real;90a-real;90-virtual"

SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".cmake")  # of what is compiled
MAX_JOBS = 8
LOCK_SECONDS = 1800  # how long to wait for another process that is building the same
LOG_LINES = 10  # of a failed build, repeated in the error

# Flags that reach the compilers without standing in CMakeLists.txt.
FLAGS = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS", "NVCC_PREPEND_FLAGS",
         "NVCC_APPEND_FLAGS")  # fmt: skip


# --- What there is to build.


def source() -> Path | None:
    """The folder with CMakeLists.txt and csrc/: inside an installed package, else the checkout."""
    for folder in (PACKAGE / "_source", PACKAGE.parents[1]):
        if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir():
            return folder
    return None


def digest(folder: Path, emulated: bool = False) -> str:
    """Hash the names and contents of all that is compiled; without the emulator, for GPUs."""
    files = [p for p in (folder / "csrc").rglob("*") if p.suffix in SUFFIXES]
    if not emulated:
        files = [p for p in files if folder / "csrc" / "emulation" not in p.parents]
    total = hashlib.sha256()
    for path in sorted([folder / "CMakeLists.txt", *files]):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:32]


# --- With what.


def _program(name: str) -> str | None:
    # A virtual environment that is not activated has its programs beside its python.
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


@cache
def nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, on PATH, in CUDA_HOME or CUDA_PATH, or where it is installed."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=f"{home}/bin"))),
        None,
    )


@cache
def pybind11() -> Path | None:
    """The folder of pybind11's headers: its own package, else the copy in torch."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or []:
            if (Path(place) / folder / "pybind11" / "pybind11.h").is_file():
                return Path(place) / folder
    return None


def compiler() -> str | None:
    """The C++ compiler: CXX, c++ or g++."""
    named = os.environ.get("CXX")
    return named or shutil.which("c++") or shutil.which("g++")


def lacking(*, module: bool) -> str | None:
    """Say what this machine lacks to compile C++, and a module for Python; None if nothing."""
    if _program("cmake") is None:
        return "cmake (pip install cmake)"
    if compiler() is None:
        return "a C++ compiler"
    if module and pybind11() is None:
        return "pybind11 (pip install pybind11)"
    return None if source() else "csrc/, which was not installed"


@cache
def missing() -> str | None:
    """Say what a build of the CUDA module lacks on this machine, or None if nothing."""
    return "nvcc, on PATH or in CUDA_HOME" if nvcc() is None else lacking(module=True)


@cache
def version(program: str) -> str:
    """What a compiler says it is."""
    run = subprocess.run([*shlex.split(program), "--version"], capture_output=True, text=True)
    return run.stdout


# --- Compiling.


def compile_targets(
    targets: Sequence[str], folder: Path, into: Path, options: Mapping[str, object], log: Path
) -> None:
    """Configure CMake for the sources in `folder` and build `targets`; all output goes to `log`.

    Raises:
        RuntimeError: If a tool fails; what it said is repeated.
    """
    ninja = _program("ninja")
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    cmake, objects = str(_program("cmake")), str(into / "objects")
    places = {f"CMAKE_{kind}_OUTPUT_DIRECTORY": into for kind in ("LIBRARY", "RUNTIME")}
    flags = [f"-D{name}={value}" for name, value in {**places, **options}.items()]
    with log.open("w") as out:
        for command in (
            [cmake, "-S", str(folder), "-B", objects, *generator, *flags],
            [cmake, "--build", objects, "--target", *targets, "--parallel", str(_jobs())],
        ):
            print("$", shlex.join(command), file=out, flush=True)
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                lines = log.read_text(errors="replace").splitlines()
                told = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
                excerpt = "\n".join(told[:LOG_LINES] or lines[-LOG_LINES:])
                raise RuntimeError(f"build: {targets[-1]} must compile, see {log}\n{excerpt}")


def for_python(folder: Path, emulated: bool = False) -> dict[str, object]:
    """The options of a module that this Python imports."""
    return {
        "CMAKE_BUILD_TYPE": "Release",
        "MODULE_SUFFIX": SUFFIX,
        "PYBIND11_INCLUDE": pybind11(),
        "Python_EXECUTABLE": sys.executable,
        "TILEWISE_SOURCES": digest(folder, emulated),
    }


def for_gpus(archs: str) -> dict[str, object]:
    """The options of what nvcc compiles."""
    return {"CMAKE_CUDA_ARCHITECTURES": archs, "CMAKE_CUDA_COMPILER": nvcc()}


def compile_module(
    folder: Path, into: Path, archs: str, log: Path, also: Sequence[str] = ()
) -> Path:
    """Compile the CUDA module from `folder` and return it, written `into`; output goes to `log`.

    So are the targets `also`.

    Raises:
        RuntimeError: If a tool is missing or fails.
    """
    if lacks := missing():
        raise RuntimeError(f"build: tilewise._cuda needs {lacks}")
    compile_targets([*also, "_cuda"], folder, into, for_python(folder) | for_gpus(archs), log)
    return into / FILE


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() else min(os.cpu_count() or 1, MAX_JOBS)


# --- The cache: <kind>/<hash of what goes in>/<variant>/, with what was built and its log.


def cache_folder(kind: str = "cuda") -> Path:
    """Where the user's builds of a kind are kept."""
    if named := os.environ.get("TILEWISE_CACHE"):
        return Path(named).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tilewise" / kind


def builds(folder: Path, program: str, kind: str = "cuda") -> Path:
    """Where the builds of these sources by this compiler are, one folder for each variant."""
    flags = [f"{name}={os.environ.get(name, '')}" for name in FLAGS]
    emulated = kind == "emulation"
    parts = [digest(folder, emulated), version(program), SUFFIX, *flags]
    return cache_folder(kind) / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def build_once(made: Path, make: Callable[[Path, Path], Path], force: bool = False) -> Path:
    """Have `make(into, log)` build the file `made`, unless it is there.

    Only one process builds at a time, and the file appears at once and whole.

    Raises:
        RuntimeError: If another process holds the lock too long, or `make` fails.
    """
    from filelock import FileLock, Timeout

    place = made.parent
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / "lock", timeout=LOCK_SECONDS):
            if force or not made.is_file():  # else who held the lock has built it
                for abandoned in place.glob("unfinished-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                with TemporaryDirectory(prefix="unfinished-", dir=place) as into:
                    os.replace(make(Path(into), place / "build.log"), made)
    except Timeout as error:
        raise RuntimeError(f"build: {place / 'lock'} must be free, but another holds it") from error
    return made

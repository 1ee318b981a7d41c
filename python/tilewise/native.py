"""The compiled module `tilewise._cuda`: where it is, or how it comes to be.

It is built if it was installed with the package or lies in the user's cache, compiled from the very
sources that are here. It is only ever built because someone said so: `tilewise build`, or a call
with `backend="cuda"`. Nothing imports torch before it asks about GPUs: setup.py uses this file too.

    TILEWISE_CACHE       The cache, instead of `tilewise` in XDG_CACHE_HOME or ~/.cache.
    TILEWISE_CUDA_ARCHS  What to compile for, as CMAKE_CUDA_ARCHITECTURES: "80-real;90a-real".
    TILEWISE_JIT=0       Forbids to build.
    MAX_JOBS             How many compilers run at once.
    CUDACXX, CUDA_HOME   Where nvcc is, if not on PATH.
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
import threading
import warnings
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

MODULE = "tilewise._cuda"
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
FILE = f"_cuda{SUFFIX}"
PACKAGE = Path(__file__).resolve().parent

# Where no GPU is visible: Ampere, Hopper, and for all that came later PTX, compiled by the driver.
ARCHS = "80-real;90a-real;90-virtual"

MAX_JOBS = 8
LOCK_SECONDS = 1800  # how long to wait for another process that is building the same
LOG_LINES = 10  # of a failed build, repeated in the error

# Flags that reach the compilers without standing in CMakeLists.txt.
FLAGS = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS", "NVCC_PREPEND_FLAGS",
         "NVCC_APPEND_FLAGS")  # fmt: skip

Capability = tuple[int, int]

_LOADING = threading.Lock()


# --- What there is to build, and with what.


def source() -> Path | None:
    """The folder with CMakeLists.txt and csrc/: inside an installed package, else the checkout."""
    for folder in (PACKAGE / "_source", PACKAGE.parents[1]):
        if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir():
            return folder
    return None


def digest(folder: Path) -> str:
    """Hash the names and contents of all that is compiled."""
    files = [p for p in (folder / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    total = hashlib.sha256()
    for path in sorted([folder / "CMakeLists.txt", *files]):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:32]


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


@cache
def missing() -> str | None:
    """Say what a build lacks on this machine, or None if nothing."""
    if nvcc() is None:
        return "nvcc, on PATH or in CUDA_HOME"
    if _program("cmake") is None:
        return "cmake (pip install cmake)"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "a C++ compiler"
    if pybind11() is None:
        return "pybind11 (pip install pybind11)"
    return None if source() else "csrc/, which was not installed"


def compile_module(folder: Path, into: Path, archs: str, log: Path) -> Path:
    """Compile the sources in `folder` and return the module, written `into`; output goes to `log`.

    Raises:
        RuntimeError: If a tool is missing or fails.
    """
    if lacks := missing():
        raise RuntimeError(f"build: {MODULE} needs {lacks}")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": archs,
        "CMAKE_CUDA_COMPILER": nvcc(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": into,
        "MODULE_SUFFIX": SUFFIX,
        "PYBIND11_INCLUDE": pybind11(),
        "Python_EXECUTABLE": sys.executable,
        "TILEWISE_SOURCES": digest(folder),
    }
    ninja = _program("ninja")
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    cmake, objects = str(_program("cmake")), str(into / "objects")
    flags = [f"-D{name}={value}" for name, value in options.items()]
    with log.open("w") as out:
        for command in (
            [cmake, "-S", str(folder), "-B", objects, *generator, *flags],
            [cmake, "--build", objects, "--parallel", str(_jobs())],
        ):
            print("$", shlex.join(command), file=out, flush=True)
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                lines = log.read_text(errors="replace").splitlines()
                told = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
                excerpt = "\n".join(told[:LOG_LINES] or lines[-LOG_LINES:])
                raise RuntimeError(f"build: {MODULE} must compile, see {log}\n{excerpt}")
    return into / FILE


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() else min(os.cpu_count() or 1, MAX_JOBS)


# --- Which GPUs a module serves.


def _capabilities() -> list[Capability]:
    """Of the visible GPUs, each once."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(device) for device in devices})


def architectures(capabilities: list[Capability]) -> str:
    """What to compile for: what TILEWISE_CUDA_ARCHS says, else these GPUs, else the usual ones."""
    if asked := os.environ.get("TILEWISE_CUDA_ARCHS"):
        return asked
    # From Hopper on, "a" allows what only this one architecture has.
    native = (f"{major}{minor}{'a' * (major >= 9)}-real" for major, minor in capabilities)
    return ";".join(native) or ARCHS


def serves(archs: str, capability: Capability) -> bool:
    """Whether a module compiled for `archs` runs on a GPU of this capability."""
    for arch in archs.split(";"):
        parsed = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual|)", arch)
        if parsed is None:
            continue
        made_for = int(parsed[1]), int(parsed[2])
        if parsed[3] == "a":
            fits = capability == made_for
        elif parsed[3] == "f" or parsed[4] == "-real":
            fits = capability[0] == made_for[0] and capability >= made_for
        else:  # the driver compiles PTX for any later GPU
            fits = capability >= made_for
        if fits:
            return True
    return False


# --- The cache: cuda/<hash of what goes in>/<architectures>/, with the module and its log.


@cache
def _nvcc_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def cache_folder() -> Path:
    """Where the user's builds are kept."""
    if named := os.environ.get("TILEWISE_CACHE"):
        return Path(named).expanduser() / "cuda"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tilewise" / "cuda"


def _builds(folder: Path) -> Path:
    """Where the builds of these sources by these tools are, one folder for each `archs`."""
    flags = [f"{name}={os.environ.get(name, '')}" for name in FLAGS]
    parts = [digest(folder), _nvcc_version(nvcc() or "nvcc"), SUFFIX, *flags]
    return cache_folder() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _place(folder: Path, archs: str) -> Path:
    return _builds(folder) / archs.replace(";", "+")


@cache
def _find() -> Path | None:
    """The module that serves the GPUs here, installed or cached. `build` makes it look again."""
    installed, folder = PACKAGE / FILE, source()
    # One that was compiled from other sources, in a checkout that has moved on, is none.
    if installed.is_file() and (
        folder is None or digest(folder).encode() in installed.read_bytes()
    ):
        return installed
    if folder is None or nvcc() is None:
        return None
    capabilities = _capabilities()
    wanted = _place(folder, architectures(capabilities))
    for place in (wanted, *sorted(wanted.parent.glob("*"))):
        archs = place.name.replace("+", ";")
        fits = place == wanted or all(serves(archs, capability) for capability in capabilities)
        if fits and (place / FILE).is_file():
            return place / FILE
    return None


# --- What the rest of the package asks.


def is_built() -> bool:
    """Whether the module can be imported without building it first."""
    return MODULE in sys.modules or _find() is not None


def can_build() -> bool:
    """Whether a call with `backend="cuda"` may build it now."""
    return _obstacle() is None


def _obstacle() -> str | None:
    if os.environ.get("TILEWISE_JIT") == "0":
        return "is not built, and TILEWISE_JIT=0 forbids to build it"
    if lacks := missing():
        return f"needs {lacks}"
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "cannot be built during CUDA stream capture, run `tilewise build` before"
    return None


def build(force: bool = False, archs: str | None = None) -> Path:
    """Compile the module into the user's cache, unless it is there, and return its path.

    Only one process compiles at a time, and the module appears at once and whole.

    Args:
        force: Compile even if it is there.
        archs: As CMAKE_CUDA_ARCHITECTURES. None is TILEWISE_CUDA_ARCHS, else the GPUs here, else
            80-real, 90a-real and 90-virtual.

    Raises:
        RuntimeError: If TILEWISE_JIT=0 forbids it, a stream is being captured, a tool is missing,
            or the compilation fails, whose log is then named.
    """
    if obstacle := _obstacle():
        raise RuntimeError(f"build: {MODULE} {obstacle}")
    from filelock import FileLock, Timeout

    folder = source()
    assert folder is not None
    archs = archs or architectures(_capabilities())
    place = _place(folder, archs)
    place.mkdir(parents=True, exist_ok=True)
    module = place / FILE
    try:
        with FileLock(place / "lock", timeout=LOCK_SECONDS):
            if force or not module.is_file():  # else who held the lock has built it
                for abandoned in place.glob("unfinished-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                with TemporaryDirectory(prefix="unfinished-", dir=place) as into:
                    made = compile_module(folder, Path(into), archs, place / "build.log")
                    os.replace(made, module)
    except Timeout as error:
        raise RuntimeError(f"build: {place / 'lock'} must be free, but another holds it") from error
    _find.cache_clear()
    return module


def load() -> ModuleType:
    """Import the module, built first if it has to be, so that `from tilewise import _cuda` works.

    Raises:
        RuntimeError: If it has to be built and cannot be.
    """
    with _LOADING:
        if MODULE not in sys.modules:
            path = str(_find() or build())
            loader = ExtensionFileLoader(MODULE, path)
            spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            loader.exec_module(module)
            sys.modules[MODULE] = module
        sys.modules["tilewise"]._cuda = sys.modules[MODULE]  # type: ignore[attr-defined]
        return sys.modules[MODULE]


@cache
def mention_unbuilt() -> None:
    """Say once that there could be CUDA kernels, were they built."""
    if not is_built() and can_build():
        warnings.warn(
            "tilewise: its CUDA kernels are not built, other backends do their work; "
            "run `tilewise build`",
            stacklevel=2,
        )


for function in (is_built, can_build):  # constants to Dynamo: see op.transforming
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]

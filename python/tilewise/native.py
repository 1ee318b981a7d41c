"""The compiled module `tilewise._cuda`: where it is, or how it comes to be.

It is built if it was installed with the package or lies in the user's cache, compiled from the very
sources that are here. It is only ever built because someone said so: `tilewise build`, or a call
with `backend="cuda"`. Nothing imports torch before it asks about GPUs.

    TILEWISE_CUDA_ARCHS  What to compile for, as CMAKE_CUDA_ARCHITECTURES: "80-real;90a-real".
    TILEWISE_JIT=0       Forbids to build.
    TILEWISE_EMULATE=1   The backend "cuda" runs on the CPU, on CPU tensors: `tilewise._emulated`
                         is what `from tilewise import _cuda` then gives.
"""

import importlib.util
import os
import re
import sys
import threading
import warnings
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

from tilewise import emulation, toolchain
from tilewise.toolchain import ARCHS, FILE

MODULE = "tilewise._cuda"
EMULATED = os.environ.get("TILEWISE_EMULATE", "0") not in ("", "0")

Capability = tuple[int, int]

_LOADING = threading.Lock()


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


# --- Where it is.


def place(folder: Path, archs: str) -> Path:
    """The folder of the module from these sources for these architectures, built or not."""
    compiler = toolchain.nvcc() or "nvcc"
    return toolchain.builds(folder, compiler) / archs.replace(";", "+")


@cache
def _find() -> Path | None:
    """The module that serves the GPUs here, installed or cached. `build` makes it look again."""
    installed, folder = toolchain.PACKAGE / FILE, toolchain.source()
    # One that was compiled from other sources, in a checkout that has moved on, is none.
    if installed.is_file() and (
        folder is None or toolchain.digest(folder).encode() in installed.read_bytes()
    ):
        return installed
    if folder is None or toolchain.nvcc() is None:
        return None
    capabilities = _capabilities()
    wanted = place(folder, architectures(capabilities))
    for found in (wanted, *sorted(wanted.parent.glob("*"))):
        archs = found.name.replace("+", ";")
        fits = found == wanted or all(serves(archs, capability) for capability in capabilities)
        if fits and (found / FILE).is_file():
            return found / FILE
    return None


# --- What the rest of the package asks.


def name() -> str:
    """The module behind `from tilewise import _cuda`."""
    return emulation.MODULE if EMULATED else MODULE


def is_built() -> bool:
    """Whether the module can be imported without building it first."""
    return name() in sys.modules or _built() is not None


def _built() -> Path | None:
    return emulation.find() if EMULATED else _find()


def can_build() -> bool:
    """Whether a call with `backend="cuda"` may build it now."""
    return obstacle() is None


def missing() -> str | None:
    """Say what a build lacks on this machine, or None if nothing."""
    return emulation.missing() if EMULATED else toolchain.missing()


def obstacle() -> str | None:
    """Say why the module cannot be built now, or None if it can."""
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
    if reason := obstacle():
        raise RuntimeError(f"build: {name()} {reason}")
    return emulation.build(force) if EMULATED else build_for_gpus(force, archs)


def build_for_gpus(force: bool = False, archs: str | None = None) -> Path:
    """What `build` does unless emulated, and whether or not it may.

    The self test launches the same kernels, so it comes along and compiles nothing twice.
    """
    if lacks := toolchain.missing():
        raise RuntimeError(f"build: {MODULE} needs {lacks}")
    folder = toolchain.source()
    assert folder is not None
    wanted = archs or architectures(_capabilities())

    def make(into: Path, log: Path) -> Path:
        module = toolchain.compile_module(folder, into, wanted, log, ["selftest"])
        if (into / "selftest").is_file():
            (into / "selftest").replace(log.with_name("selftest"))
        return module

    module = toolchain.build_once(place(folder, wanted) / FILE, make, force)
    _find.cache_clear()
    return module


def build_selftest(archs: str | None = None) -> Path:
    """Compile csrc/selftest/ for GPUs, which holds every launcher to fp64 without Python.

    Args:
        archs: As for `build`.

    Returns:
        The program: for a GPU alone, or under compute-sanitizer. For the CPU there is
        `emulation.build_selftest`.

    Raises:
        RuntimeError: If a tool is missing, or the compilation fails.
    """
    return build_for_gpus(archs=archs).with_name("selftest")


def load() -> ModuleType:
    """Import the module, built first if it has to be, so that `from tilewise import _cuda` works.

    Raises:
        RuntimeError: If it has to be built and cannot be.
    """
    from tilewise.recorder import make_notable

    with _LOADING:
        if name() not in sys.modules:
            path = str(_built() or build())
            loader = ExtensionFileLoader(name(), path)
            spec = importlib.util.spec_from_file_location(name(), path, loader=loader)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            loader.exec_module(module)
            make_notable(module)
            sys.modules[name()] = module
        sys.modules["tilewise"]._cuda = sys.modules[name()]  # type: ignore[attr-defined]
        return sys.modules[name()]


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

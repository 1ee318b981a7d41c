"""CUDA kernels on the CPU: compiled by a C++ compiler alone, against csrc/emulation/.

`tilewise._emulated` has the launchers of `tilewise._cuda`, for tensors on the CPU. Programs without
Python launch kernels too, and can be compiled with sanitizers:

    program = emulation.build_program([Path("kernel.cu")], "thread")
    subprocess.run([program])  # a data race is reported with both its lines

    TILEWISE_EMULATION_ORDER  In which order blocks and threads take turns: "forward", "reverse",
                              or a number, the seed of a random order. Read at every launch.
    TILEWISE_EMULATION_PATIENCE  After how many seconds of processor time a thread that lets no
                              other run ends the launch: 20; 0 is never. Read at every launch.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tilewise import toolchain

MODULE = "tilewise._emulated"
FILE = f"_emulated{toolchain.SUFFIX}"
# "address" is for undefined behaviour too, "memory" for reads of what was never written.
SANITIZERS = ("plain", "address", "thread", "memory")


@cache
def missing() -> str | None:
    """Say what a build of the module lacks on this machine, or None if nothing."""
    return toolchain.lacking(module=True)


def _place(variant: str) -> Path:
    folder, compiler = toolchain.source(), toolchain.compiler()
    assert folder is not None and compiler is not None
    return toolchain.builds(folder, compiler, "emulation") / variant


@cache
def find() -> Path | None:
    """The module, if it was built from the sources that are here. `build` makes it look again."""
    if missing() is not None:
        return None
    module = _place("plain") / FILE
    return module if module.is_file() else None


def build(force: bool = False) -> Path:
    """Compile the module into the user's cache, unless it is there, and return its path.

    Raises:
        RuntimeError: If a tool is missing, or the compilation fails, whose log is then named.
    """
    if lacks := missing():
        raise RuntimeError(f"build: {MODULE} needs {lacks}")
    folder = toolchain.source()
    assert folder is not None
    # The self test launches the same kernels, so it comes along and compiles nothing twice.
    made = {"selftest": "selftest", "_emulated": FILE}
    module = _build(made, "plain", toolchain.for_python(folder, True), force=force)
    find.cache_clear()
    return module


def build_selftest(sanitizer: str = "plain") -> Path:
    """Compile csrc/selftest/, which holds every launcher to fp64, and return the program.

    Raises:
        ValueError: If there is no such sanitizer.
        RuntimeError: As for `build`.
    """
    if sanitizer == "plain" and missing() is None:
        return build().with_name("selftest")
    return _program("selftest", sanitizer, [])


def build_program(sources: Sequence[Path], sanitizer: str = "plain") -> Path:
    """Compile a program that launches CUDA kernels, and return it.

    Args:
        sources: Its files, .cu and .cpp, one with `main`. A change in a header beside them counts.
        sanitizer: "plain", which reports misaligned accesses and indices outside of arrays,
            "address" with AddressSanitizer and UndefinedBehaviorSanitizer, "thread", or "memory",
            which reports reads of what was never written, and loops that wait for nothing.

    Raises:
        ValueError: If there is no such sanitizer.
        RuntimeError: As for `build`.
    """
    return _program("program", sanitizer, [path.resolve() for path in sources])


def _program(target: str, sanitizer: str, sources: Sequence[Path]) -> Path:
    if sanitizer not in SANITIZERS:
        known = ", ".join(SANITIZERS)
        raise ValueError(f"build: sanitizer must be one of {known}, got {sanitizer!r}")
    if lacks := toolchain.lacking(module=False):
        raise RuntimeError(f"build: {target} needs {lacks}")
    headers = {path for source in sources for path in source.parent.glob("*.*h")}
    read = [(str(path), path.read_bytes()) for path in sorted({*sources, *headers})]
    total = hashlib.sha256(repr(read).encode()).hexdigest()[:16]
    variant = f"{target}-{total}-{sanitizer}" if sources else f"{target}-{sanitizer}"
    options: dict[str, object] = {"TILEWISE_PROGRAM": ";".join(map(str, sources))}
    return _build({target: target}, variant, options)


def _build(
    files: dict[str, str], variant: str, options: dict[str, object], force: bool = False
) -> Path:
    """Build these targets into these files; the last is returned, and there only if all are."""
    *others, last = files.values()
    folder = toolchain.source()
    assert folder is not None
    sanitizer = variant.rpartition("-")[2]
    options = {"TILEWISE_EMULATION": "ON", "TILEWISE_SANITIZER": sanitizer} | options
    if "runtime" not in files:  # the same for all, and half of their compilation
        library = {"runtime": "libruntime.a"}
        options["TILEWISE_RUNTIME"] = _build(library, f"runtime-{sanitizer}", {}, force=force)

    def make(into: Path, log: Path) -> Path:
        places = {"CMAKE_ARCHIVE_OUTPUT_DIRECTORY": into}
        toolchain.compile_targets(list(files), folder, into, options | places, log)
        for other in others:
            (into / other).replace(log.with_name(other))
        return into / last

    return toolchain.build_once(_place(variant) / last, make, force)

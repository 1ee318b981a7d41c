"""Which kernels were verified and timed on a GPU: *this* source of each, by the hash of it.

A result under benchmarks/results/ carries the hash of every kernel it ran. A kernel whose sources
have changed since, or that never ran, is pending.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilewise.op import OPS, Op

ROOMS = ("cuda", "triton")  # what needs a GPU
RESULTS = Path("benchmarks/results")

# A launcher's declaration; what surrounds it in its header is shared by all.
LAUNCHER = re.compile(r"(?:^//[^\n]*\n)*^cudaError_t\s+(\w+)\([^;]*\);\n", re.MULTILINE)
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
LAUNCH = re.compile(r"\b_cuda\.(\w+)\(")
DEFINITION = re.compile(r"^cudaError_t (\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """What is known of one kernel.

    Attributes:
        name: "<op>/<backend>".
        hash: Of its present sources.
        verified: The newest result in which this source passed the rule on a GPU, or "".
        timed: The newest result in which it was timed, or "".
    """

    name: str
    hash: str
    verified: str = ""
    timed: str = ""

    @property
    def pending(self) -> bool:
        """Whether this source was never verified, or never timed, on a GPU."""
        return not (self.verified and self.timed)


def sources_root(start: Path | None = None) -> Path | None:
    """The checkout that this package, or else the current folder, lies in; None without one."""
    for folder in (Path(__file__).resolve().parents[2], (start or Path.cwd()).resolve()):
        if (folder / "csrc" / "launchers.h").is_file() and (folder / "kernels").is_dir():
            return folder
    return None


def kernel_hashes(root: Path) -> dict[str, str]:
    """The hash of the present sources of every kernel that needs a GPU, by "<op>/<backend>".

    Args:
        root: A checkout.
    """
    return {
        f"{op.name}/{room}": _hash(op, room, root)
        for op in OPS.values()
        for room in ROOMS
        if room in op.backends
    }


def kernels(root: Path) -> list[Kernel]:
    """Every kernel that needs a GPU, with the committed results that hold for its sources."""
    found = {name: Kernel(name, digest) for name, digest in kernel_hashes(root).items()}
    for file in sorted((root / RESULTS).rglob("*.json"), key=lambda path: path.name):
        for name, entry in json.loads(file.read_text()).get("kernels", {}).items():
            known = found.get(name)
            if known is None or entry["hash"] != known.hash:
                continue
            label = str(file.relative_to(root / RESULTS))
            found[name] = Kernel(
                name,
                known.hash,
                label if entry["verified"] else known.verified,
                label if entry["timed"] else known.timed,
            )
    return list(found.values())


def _hash(op: Op, room: str, root: Path) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(kernel_sources(op, room, root).items()):
        for part in (name, text):
            digest.update(part.encode())
            digest.update(b"\0")
    return digest.hexdigest()


def kernel_sources(op: Op, room: str, root: Path) -> dict[str, str]:
    """The text of everything a kernel is made of, by path: files, includes, launcher, flags."""
    stem = op.backends[room].module.removeprefix(f"tilewise.kernels.{room}.").split(".")[0]
    files = _with_imports(list(_files(root / "kernels" / room / stem, ".py")), room, root)
    if room == "cuda":
        compiled = set(_files(root / "csrc" / "cuda" / stem, ".cu")) | _launched(files, root)
        files |= {root / "CMakeLists.txt", *_with_includes(list(compiled), root)}
    texts = {str(file.relative_to(root)): file.read_text() for file in files}
    rest = "".join(text for name, text in texts.items() if name.endswith(".cu"))
    for room_of in ("", "attention_", "sample_"):
        if (launchers := f"csrc/{room_of}launchers.h") in texts:
            mine = LAUNCHER.sub(
                lambda found: found[0] if re.search(rf"\b{found[1]}\b", rest) else "",
                texts[launchers],
            )
            texts[launchers] = re.sub(r"\n\n+", "\n", mine)
    return texts


def _files(stem: Path, suffix: str) -> Iterator[Path]:
    """The file of that name, or all of the folder of that name; nothing if it is yet to come."""
    if stem.is_dir():
        yield from stem.rglob(f"*{suffix}")
    elif (file := stem.with_name(stem.name + suffix)).is_file():
        yield file


def _with_imports(files: list[Path], room: str, root: Path) -> set[Path]:
    """`files`, and what they import from their own room."""
    package, seen, waiting = f"tilewise.kernels.{room}", set[Path](), list(files)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package)):
                continue
            module = (node.module or "").removeprefix(package).strip(".")
            folder = root.joinpath("kernels", room, *module.split("."))
            named = [folder.with_suffix(".py")] if module else []
            named += [folder / f"{alias.name}.py" for alias in node.names]
            waiting += [path for path in named if path.is_file()]
    return seen


def _launched(files: set[Path], root: Path) -> set[Path]:
    """Where the launchers are defined that `files`, of Python, call by name."""
    called = {name for file in files for name in LAUNCH.findall(file.read_text())}
    compiled = (root / "csrc" / "cuda").rglob("*.cu")
    return {file for file in compiled if called.intersection(DEFINITION.findall(file.read_text()))}


def _with_includes(files: list[Path], root: Path) -> set[Path]:
    """`files`, and the headers of ours that they include."""
    seen, waiting = set[Path](), list(files)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in INCLUDE.findall(file.read_text()):
            places = (root / "csrc" / name, file.parent / name)
            waiting += [place.resolve() for place in places if place.is_file()][:1]
    return seen

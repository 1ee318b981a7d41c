"""What the sanitizer found: which kernel, line, argument, program, lane and address, and why."""

import linecache
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

KINDS = (
    "out of bounds",  # outside the view that was passed, wherever that lands
    "uninitialised",  # read before anything was written
    "race",  # two programs, not ordered by atomics, one of which writes
    "barrier",  # a program reads what its own threads wrote, with no tl.debug_barrier() between
    "lanes",  # one store, one address, two values
    "misaligned",  # an address that is no multiple of the element
    "hint",  # tl.multiple_of, tl.max_contiguous or tl.max_constancy that is not so
    "overflow",  # of a signed integer of at most 32 bits
    "descriptor",  # what the hardware cannot describe
    "waiting",  # a program waits for another that has not run
    "assertion",  # tl.device_assert or tl.assume
)


@dataclass(frozen=True)
class Finding:
    """One wrong thing, as first seen.

    Attributes:
        kind: One of `KINDS`.
        what: What was wrong, in words.
        kernel: Name of the Triton function that was launched.
        file: Where it was seen.
        line: Where it was seen.
        text: That line.
        program: Its place in the grid.
        argument: Name of the argument that the pointer came from, or None.
        lane: Index into the block that was loaded, stored or computed.
        offset: Distance from the argument's first element, in elements of the pointer's type.
        address: Distance from the argument's first element, in bytes.
        other: Where the earlier access of two was, as file and line, or None.
    """

    kind: str
    what: str
    kernel: str
    file: str
    line: int
    text: str
    program: tuple[int, int, int]
    argument: str | None = None
    lane: tuple[int, ...] | None = None
    offset: int | None = None
    address: int | None = None
    other: tuple[str, int] | None = None

    def __str__(self) -> str:
        place = f"program {self.program}"
        if self.lane is not None:
            place += f", lane {self.lane}"
        if self.offset is not None:
            place += f", {self.argument} {self.offset:+d} elements ({self.address:+d} bytes)"
        return (
            f"{self.kind}: {self.what}\n"
            f"    {near(self.file)}:{self.line}: {self.text}\n"
            f"    in {self.kernel}, {place}"
        )


def near(file: str) -> str:
    """The path from here, if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


@dataclass
class Report:
    """What `sanitize` yields.

    Attributes:
        findings: The first of each kind, kernel, line and argument.
        launches: How many kernels ran.
    """

    findings: list[Finding] = field(default_factory=list)
    launches: int = 0
    _times: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Keep it, if it is the first of its kind there, or else count it."""
        key = _key(finding)
        self._times[key] = self._times.get(key, 0) + 1
        if self._times[key] == 1:
            self.findings.append(finding)

    def times(self, finding: Finding) -> int:
        """How often it was seen: by how many programs, or rounds of a loop."""
        return self._times[_key(finding)]

    def clear(self) -> None:
        """Forget the findings: the block they were made in then ends without an error."""
        self.findings.clear()
        self._times.clear()

    def __str__(self) -> str:
        seen = [(str(finding), self.times(finding)) for finding in self.findings]
        return "\n".join(text + (f", seen {n} times" if n > 1 else "") for text, n in seen)


def _key(finding: Finding) -> tuple[Any, ...]:
    return finding.kind, finding.kernel, finding.file, finding.line, finding.argument


class SanitizerError(AssertionError):
    """There were findings; `report` has them."""

    def __init__(self, report: Report) -> None:
        count = len(report.findings)
        super().__init__(f"{count} finding{'s' if count > 1 else ''}\n{report}")
        self.report = report


_OURS: dict[CodeType, bool] = {}


def _is_machinery(code: CodeType) -> bool:
    """Whether it belongs to Triton, NumPy or this folder, and not to a kernel."""
    known = _OURS.get(code)
    if known is None:
        import triton

        folders = (str(Path(triton.__file__).parent), str(Path(__file__).parent))
        known = _OURS[code] = code.co_filename.startswith(folders)
    return known


def where() -> tuple[CodeType, int]:
    """The line of the kernel, or of a function it calls, that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _is_machinery(frame.f_code):
        frame = frame.f_back
    assert frame is not None
    return frame.f_code, frame.f_lineno


def source(code: CodeType, line: int) -> str:
    """The text of a line."""
    return linecache.getline(code.co_filename, line).strip()


def shown(code: CodeType, line: int) -> str:
    """A line, as it is named within a sentence."""
    return f"{Path(code.co_filename).name}:{line}"

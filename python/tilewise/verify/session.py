"""A launch under the sanitizer: its programs, what they have touched, and what orders them.

Programs run one after the other, in the order asked for. What two of them do is ordered only by
atomics: each program has a vector clock, which a release leaves at an address and an acquire takes
from there. So a race is found in whichever order the programs happen to run.
"""

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tilewise.verify import findings
from tilewise.verify.findings import Finding, Report

if TYPE_CHECKING:
    from tilewise.verify.memory import Argument, Shadow

ORDERS = ("forward", "reverse", "random")
PATIENCE = 10_000  # times that a program may ask memory the same question


class Access(NamedTuple):
    """One load, store or atomic of one program: who, when, and where in the source."""

    program: int
    epoch: int
    barrier: int
    atomic: bool
    code: Any
    line: int


@dataclass
class Launch:
    """A kernel that is running.

    Attributes:
        kernel: Its name.
        arguments: The memory that it was given, by the tag in a pointer less 1.
        shadows: What is known of that memory, by its address.
        adopted: Memory reached through pointers that were read from memory.
        grid: How many programs along each axis.
        turns: The programs in the order in which they run.
        program: The one that runs.
        barrier: How many barriers it has passed.
        accesses: All so far; memory remembers them by their index.
        owners: The program of each.
        epochs: How often each program has released.
        clocks: Of the programs that have synchronised.
        locks: The clock that was left at an address.
        asked: What was last asked of memory that others may change, with the answer, how often.
    """

    kernel: str
    arguments: list["Argument"] = field(default_factory=list)
    shadows: dict[int, "Shadow"] = field(default_factory=dict)
    adopted: list["Argument"] = field(default_factory=list)
    grid: tuple[int, int, int] = (1, 1, 1)
    turns: Any = None
    program: int = 0
    barrier: int = 0
    accesses: list[Access] = field(default_factory=list)
    owners: Any = None
    epochs: Any = None
    clocks: dict[int, Any] = field(default_factory=dict)
    locks: dict[int, Any] = field(default_factory=dict)
    asked: tuple[Any, int] = (None, 0)

    @property
    def place(self) -> tuple[int, int, int]:
        """The running program's indices."""
        return place_of(self, self.program)


@dataclass
class Session:
    """What `sanitize` set up.

    Attributes:
        order: One of `ORDERS`.
        seed: Also chooses among the configurations of an autotuned kernel, if order is random.
        report: What was found.
        random: What shuffles the programs.
        launch: The kernel that is running.
    """

    order: str
    seed: int
    report: Report
    random: Random
    launch: Launch | None = None


active: Session | None = None


def place_of(launch: Launch, program: int) -> tuple[int, int, int]:
    """The indices of a program."""
    rest, z = divmod(program, launch.grid[2])
    x, y = divmod(rest, launch.grid[1])
    return x, y, z


def start_grid(session: Session, launch: Launch, grid: tuple[int, int, int]) -> None:
    """Fix the order of the programs, once it is known how many there are."""
    count = grid[0] * grid[1] * grid[2]
    launch.grid = grid
    turns = list(range(count))
    if session.order == "reverse":
        turns.reverse()
    elif session.order == "random":
        session.random.shuffle(turns)
    launch.turns = turns
    launch.epochs = np.zeros(count, np.int32)
    launch.owners = np.zeros(256, np.int32)
    launch.accesses.clear()


def start_program(launch: Launch, turn: int) -> tuple[int, int, int]:
    """Begin the program whose turn it is."""
    launch.program = launch.turns[turn]
    launch.barrier = 0
    return launch.place


def note_access(launch: Launch, atomic: bool) -> int:
    """Remember that the running program touches memory here: the index of that access."""
    code, line = findings.where()
    index = len(launch.accesses)
    program = launch.program
    epoch = int(launch.epochs[program]) + 1
    launch.accesses.append(Access(program, epoch, launch.barrier, atomic, code, line))
    if index >= len(launch.owners):
        launch.owners = np.concatenate([launch.owners, np.zeros_like(launch.owners)])
    launch.owners[index] = program
    return index


def is_ordered(launch: Launch, access: Access) -> bool:
    """Whether an access of another program happened before what the running one does now."""
    clock = launch.clocks.get(launch.program)
    return clock is not None and clock[access.program] >= access.epoch


def synchronise(launch: Launch, addresses: Any, acquire: bool, release: bool) -> None:
    """An atomic with an order: take the clocks left at the addresses, leave one's own."""
    launch.barrier += 1  # lowered with a barrier of the program's threads
    program, zeros = launch.program, np.zeros_like(launch.epochs)
    for address in np.unique(addresses).tolist():
        left = launch.locks.get(address)
        if acquire and left is not None:
            clock = launch.clocks.setdefault(program, zeros.copy())
            np.maximum(clock, left, out=clock)
        if release:
            launch.epochs[program] += 1
            clock = launch.clocks.setdefault(program, zeros.copy())
            clock[program] = launch.epochs[program]
            launch.locks[address] = clock.copy() if left is None else np.maximum(left, clock)


def note_answer(launch: Launch, answer: Any) -> None:
    """End a program that asks for the same over and over: no other runs before it ends."""
    question = (launch.program, findings.where(), answer.tobytes())
    times = launch.asked[1] + 1 if launch.asked[0] == question else 1
    launch.asked = (question, times)
    if times >= PATIENCE:
        what = "a program waits for another that has not run yet, and runs alone until it ends"
        found("waiting", what)
        raise RuntimeError(f"sanitize: {what}")


def found(
    kind: str,
    what: str,
    *,
    argument: str | None = None,
    lane: tuple[int, ...] | None = None,
    offset: int | None = None,
    address: int | None = None,
    other: Access | None = None,
) -> None:
    """Report what is wrong on the line that is running."""
    if active is None:
        return
    code, line = findings.where()
    launch = active.launch
    active.report.add(
        Finding(
            kind=kind,
            what=what,
            kernel=launch.kernel if launch else "no kernel",
            file=code.co_filename,
            line=line,
            text=findings.source(code, line),
            program=launch.place if launch else (0, 0, 0),
            argument=argument,
            lane=lane,
            offset=offset,
            address=address,
            other=(other.code.co_filename, other.line) if other else None,
        )
    )

"""Break every kernel in ways nobody picked, and see whether the tests notice: `make mutants`.

    python tests/mutants.py [KERNEL ...] [--count 10] [--seed 0] [--jobs 2]

A KERNEL is a file, such as `kernels/triton/softmax.py`; without one, all are broken. Each mutation
of `mutations.draw` is made in a copy of the tree, and the tests of the ops that use the file run
there until one fails; where none does, of a CUDA kernel the self test under AddressSanitizer runs
too. Prints what was caught and what survived, and ends with 1 if a mutation survived that
`equivalent_mutants.txt` does not explain.

The process of a trial imports this module before anything else, so nothing of tilewise is imported
at its head: the trial would try that and not its own copy.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from mutations import Mutation, draw
from trials import (
    PASSED,
    ROOT,
    SANITIZED,
    SHARING,
    STILLBORN,
    Outcome,
    copy_tree,
    run_tests,
    selftest_fails,
)

EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"
ROOMS = {"triton": "kernels/triton", "numba": "kernels/numba", "cuda": "csrc/cuda"}
# What starts threads; and what is an instruction each, tried with bugs of their own in csrc/units/.
NOT_KERNELS = ("/__init__.py", "/_parallel.py", "/hopper.cuh")


@dataclass(frozen=True)
class Kernel:
    """A file of kernels.

    Attributes:
        path: Of the file.
        backend: That its ops then run on.
        users: The ops that use it, by the file that is compiled with it: of a CUDA header one
            `.cu` after the other, for it would take minutes to compile them all.
    """

    path: str
    backend: str
    users: Mapping[str, tuple[str, ...]]

    def broken(self, user: str, mutation: Mutation) -> str:
        """The text of `user` when this file has the mutation."""
        text = mutation.apply((ROOT / self.path).read_text("utf-8"))
        return text if user == self.path else with_headers(user, {self.path: text})


def asked(backend: str, ops: Sequence[str], path: str = "") -> list[str]:
    """What pytest is asked to run: the cases of the ops on the backend, and who imports `path`."""
    from tilewise.op import OPS

    words = {OPS[op].backends[backend].module.split(".")[3] for op in ops}
    properties = sorted((ROOT / "tests/properties").glob("test_*.py"))
    wanted = [f"{op}-{backend}" for op in ops]
    own = [f for f in properties if any(f.stem.startswith(f"test_{word}") for word in words)]
    room, _, name = path.removesuffix(".py").replace("/", ".").rpartition(".")
    imported = re.compile(rf"from tilewise\.{room}(\.{name} import| import .*\b{name}\b)")
    direct = [
        f for f in (ROOT / "tests").glob("test_*.py") if imported.search(f.read_text("utf-8"))
    ]
    wanted += [f"({f.name} and {backend})" for f in (*own, *direct)]
    if backend == "numba":
        direct.append(ROOT / SHARING)  # which has cases of every op
        wanted += [f"({direct[-1].name} and {op})" for op in ops]
    files = ["tests/test_ops.py", "tests/test_transforms.py", *properties, *sorted({*direct})]
    return [*(str(f).removeprefix(f"{ROOT}/") for f in files), "-k", " or ".join(wanted)]


def kernels() -> list[Kernel]:
    """Every file of kernels that an op is made of."""
    import tilewise  # noqa: F401  (declares the ops)
    from tilewise.op import OPS
    from tilewise.report import kernel_sources

    users: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for op in OPS.values():
        for backend in op.backends.keys() & ROOMS.keys():
            sources = kernel_sources(op, backend, ROOT)
            paths = [p for p in sources if p.startswith(ROOMS[backend])]
            compiled = [p for p in paths if p.endswith(".cu")]
            for path in paths:
                if not path.endswith(".cuh"):
                    users[backend, path][path].add(op.name)
                for file in compiled if path.endswith(".cuh") else ():
                    if path in included(file):
                        users[backend, path][file].add(op.name)
    order = list(ROOMS)
    found = sorted(users.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [
        Kernel(path, backend, {f: tuple(sorted(files[f])) for f in sorted(files, key=cheapest)})
        for (backend, path), files in found
        if not path.endswith(NOT_KERNELS)
    ]


def cheapest(path: str) -> int:
    """What comes first: little to compile."""
    return (ROOT / path).stat().st_size


def with_headers(path: str, changed: Mapping[str, str], seen: set[str] | None = None) -> str:
    """The file at `path` with each header of kernels in place of the first line that includes it.

    Args:
        path: From `ROOT`.
        changed: The text of files that shall be another, by path.
        seen: What stands there already; grows.
    """
    from tilewise.report import INCLUDE

    seen = set() if seen is None else seen
    seen.add(path)
    lines = []
    for line in changed.get(path, (ROOT / path).read_text("utf-8")).splitlines(keepends=True):
        named = INCLUDE.match(line)
        header = f"csrc/{named[1]}" if named else ""
        if not header.startswith(ROOMS["cuda"]):
            lines.append("" if line.startswith("#pragma once") else line)
        elif header not in seen:
            lines.append(with_headers(header, changed, seen))
    return "".join(lines)


def included(path: str) -> set[str]:
    """The headers of ours that the file at `path` includes, and they in turn."""
    seen: set[str] = set()
    with_headers(path, {}, seen)
    return seen - {path}


def explained() -> dict[str, str]:
    """Mutations that change no result, each with the reason: `reason` lines, then theirs."""
    reasons: dict[str, str] = {}
    reason = ""
    for line in EQUIVALENT.read_text("utf-8").splitlines() if EQUIVALENT.is_file() else ():
        if line.startswith("# "):
            reason = line[2:]
        elif line:
            reasons[line] = reason
    return reasons


def unnumbered(mutation: Mutation) -> str:
    """Its text, with what the line says instead of its number, which moves."""
    return str(mutation).replace(f":{mutation.line}:", ":", 1) + f"   in: {mutation.within}"


def trials(chosen: list[Kernel], count: int, seed: int, jobs: int) -> Iterator[tuple]:
    """(mutation, how it was noticed) of each, once all tests have passed with nothing broken."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees: Queue[Path] = Queue()
        for i in range(jobs):
            trees.put(copy_tree(Path(folder) / str(i)))
        seconds: dict[str, float] = {}

        def try_one(kernel: Kernel, mutation: Mutation) -> Outcome:
            for user, ops in kernel.users.items():
                changed = {user: kernel.broken(user, mutation)}
                outcome = run(kernel.backend, asked(kernel.backend, ops, kernel.path), changed)
                if outcome.noticed != PASSED:
                    break
            return outcome

        def run(backend: str, tests: list[str], changed: Mapping[str, str]) -> Outcome:
            tree = trees.get()
            objects = Path(f"{tree}-objects") if backend == "cuda" else None
            try:
                for path, text in changed.items():
                    (tree / path).write_text(text, "utf-8")
                outcome = run_tests(tree, tests, seconds, objects)
                seen = outcome.noticed != PASSED or not changed or backend != "cuda"
                if not seen and selftest_fails(tree, Path(f"{tree}-sanitized")):
                    return Outcome(SANITIZED)
                return outcome
            finally:
                for path in changed:
                    (tree / path).write_text((ROOT / path).read_text("utf-8"), "utf-8")
                trees.put(tree)

        unbroken = sorted(
            {(k.backend, op) for k in chosen for ops in k.users.values() for op in ops}
        )
        whole = pool.map(lambda one: run(one[0], asked(one[0], [one[1]]), {}), unbroken)
        for (backend, op), outcome in zip(unbroken, whole, strict=True):
            if outcome.noticed != PASSED:
                raise SystemExit(f"{op} by {backend}: must pass unbroken, got {outcome.noticed}")
            seconds |= outcome.seconds
        work = [
            (kernel, mutation)
            for kernel in chosen
            for mutation in draw(ROOT / kernel.path, kernel.path, count, seed)
        ]
        outcomes = pool.map(try_one, *zip(*work, strict=True))
        for (_, mutation), outcome in zip(work, outcomes, strict=True):
            yield mutation, outcome.noticed


def main() -> int:
    """Break what was asked for and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", metavar="KERNEL", nargs="*")
    parser.add_argument("--count", type=int, default=10, help="mutations of each (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [k for k in kernels() if not arguments.kernels or k.path in arguments.kernels]
    if not chosen:
        parser.error(f"KERNEL must be one of {', '.join(k.path for k in kernels())}")

    reasons, tally, survivors = explained(), Counter(), []
    for broken, noticed in trials(chosen, arguments.count, arguments.seed, arguments.jobs):
        verdict = {PASSED: "survived", STILLBORN: "stillborn"}.get(noticed, "caught")
        if verdict == "survived" and unnumbered(broken) in reasons:
            verdict, noticed = "equivalent", reasons[unnumbered(broken)]
        elif verdict == "survived":
            survivors.append(broken)
        tally[verdict] += 1
        print(f"{verdict:10} {broken}   [{noticed}]", flush=True)
    relevant = tally["caught"] + tally["survived"]
    share = tally["caught"] / relevant if relevant else 1.0
    apart = f"{tally['equivalent']} equivalent, {tally['stillborn']} stillborn"
    print(f"caught {tally['caught']} of {relevant} ({share:.1%}), {apart}")
    for mutation in survivors:
        print(f"survived: {unnumbered(mutation)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

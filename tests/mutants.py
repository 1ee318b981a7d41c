"""Break every kernel in ways nobody picked, and see whether the tests notice: `make mutants`.

    python tests/mutants.py [KERNEL ...] [--count 10] [--seed 0] [--jobs 2]

A KERNEL is a file, such as `kernels/triton/softmax.py`; without one, all are broken. Each mutation
of `mutations.draw` is made in a copy of the tree, and the tests of the ops that use the file run
there until one fails. Prints what was caught and what survived, and ends with 1 if a mutation
survived that `equivalent_mutants.txt` does not explain.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from mutations import Mutation, draw
from trials import PASSED, ROOT, STILLBORN, Outcome, copy_tree, run_tests

EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"
ROOMS = {"kernels/triton": ".py", "kernels/numba": ".py", "csrc/cuda": ".cu"}
NOT_KERNELS = {"__init__", "_parallel"}


@dataclass(frozen=True)
class Kernel:
    """A file of kernels, its backend, and the words of the ops that use it."""

    path: str
    backend: str
    ops: tuple[str, ...]

    @property
    def tests(self) -> list[str]:
        """What pytest is asked to run: the cases of these ops on this backend, and their like."""
        files = [f"tests/properties/test_{op}.py" for op in self.ops]
        files = [file for file in files if (ROOT / file).is_file()] + direct_tests(self.path)
        wanted = [f"{op}-{self.backend}" for op in self.ops]
        wanted += [f"({Path(file).name} and {self.backend})" for file in files]
        return ["tests/test_ops.py", *files, "-k", " or ".join(wanted)]


def direct_tests(path: str) -> list[str]:
    """The test files that import the kernel file at `path`."""
    module = path.removesuffix(".py").replace("/", ".")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{p.name}" for p in files if f"tilewise.{module} import" in p.read_text("utf-8")]


def kernels() -> list[Kernel]:
    """Every file of kernels there is, with the ops whose file it is or that import it."""
    found = []
    for room, suffix in ROOMS.items():
        files = sorted(p for p in (ROOT / room).glob(f"*{suffix}") if p.stem not in NOT_KERNELS)
        ops = [p for p in files if not p.stem.startswith("_")]
        for path in files:
            shared = re.compile(rf"\b{path.stem} import\b")
            users = [path] if path in ops else [p for p in ops if shared.search(p.read_text())]
            names = tuple(p.stem for p in users)
            if names:
                backend = Path(room).name
                found.append(Kernel(str(path.relative_to(ROOT)), backend, names))
    return found


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

        def try_one(kernel: Kernel, mutation: Mutation | None = None) -> Outcome:
            tree = trees.get()
            file, source = tree / kernel.path, (ROOT / kernel.path).read_text("utf-8")
            objects = Path(f"{tree}-objects") if kernel.backend == "cuda" else None
            try:
                if mutation is not None:
                    file.write_text(mutation.apply(source), "utf-8")
                return run_tests(tree, kernel.tests, seconds, objects)
            finally:
                if mutation is not None:
                    file.write_text(source, "utf-8")
                trees.put(tree)

        unlike = list({tuple(kernel.tests): kernel for kernel in chosen}.values())
        for kernel, outcome in zip(unlike, pool.map(try_one, unlike), strict=True):
            if outcome.noticed != PASSED:
                raise SystemExit(f"{kernel.path}: must pass unbroken, got {outcome.noticed}")
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

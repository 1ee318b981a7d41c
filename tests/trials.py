"""Run tests in a copy of the tree, a process each, forked from one that has imported torch.

What is slow to import is imported once, before anything of tilewise: a trial begins with the tree
as it is by then. CUDA kernels are compiled as `make` would, only what has changed.
"""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = str(Path(__file__).resolve().parent)
# As in `make test`; the first two are read when the server starts, so that it must have them.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive", "TILEWISE_EMULATE": "1",
    "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip
IMPORTED = ["torch", "numba", "triton", "pytest", "scipy.stats", "torch.testing", "torch._dynamo",
            "functorch.compile", "torch._dynamo.backends.common"]  # fmt: skip
# They ask what PyTorch makes of an op, with numbers that other tests look at; or for the time.
LEFT_OUT = {"test_registered_properly", "test_compiled_graphs_contain_our_ops",
            "test_compiled_by_inductor", "test_gradcheck",
            "test_python_goes_on_while_a_kernel_runs"}  # fmt: skip
QUICKLY = ["-x", "-q", "-m", "not slow", "--tb=short", "-p", "no:unraisableexception",
           "-o", "addopts="]  # fmt: skip
FIRST = "test_matches_reference"  # it sees the most
SHARING = "tests/test_numba_sharing.py"
LIMIT = 600  # seconds for a test of which nothing is known
SLACK = 30  # seconds beside ten times what it took unbroken: more is a hang
# What a compiler refuses was never a kernel: it is counted apart.
REFUSED = re.compile(r"numba\.core\.errors\.|build: \S+ must compile")
STILLBORN, HANGS, CRASHES, PASSED = "does not compile", "hangs", "crashes", "passed"
SANITIZED = "the self test under AddressSanitizer"  # a test of `make check`, of all kernels


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: "passed", or how the tests noticed; and the seconds each test took."""

    noticed: str
    seconds: Mapping[str, float] = field(default_factory=dict)


def copy_tree(folder: Path) -> Path:
    """A copy of what is under version control, importable without installing."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for room in ("triton", "cuda", "numba"):
        (folder / "python/tilewise/kernels" / room).symlink_to(folder / "kernels" / room)
    return folder


# --- The process that asks for trials.


def server() -> multiprocessing.context.BaseContext:
    """What starts processes by forking one that has imported `IMPORTED`."""
    os.environ |= ENVIRONMENT
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_tests(
    tree: Path, tests: Sequence[str], seconds: Mapping[str, float], objects: Path | None = None
) -> Outcome:
    """Run `tests`, arguments of pytest, in `tree` until one fails.

    Args:
        tree: From `copy_tree`.
        tests: Arguments of pytest.
        seconds: What each test takes where nothing is broken.
        objects: Where the CUDA kernels of this tree are compiled for the CPU, if they are wanted.
    """
    context = server()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as cache:
        arguments = (sender, tree, tests, seconds, objects, Path(cache))
        process = context.Process(target=_run_here, args=arguments)
        process.start()
        sender.close()
        try:
            outcome = receiver.recv()
        except EOFError:
            outcome = None
        process.join()
    if outcome is None and process.exitcode == -signal.SIGALRM:
        return Outcome(HANGS)
    if outcome is None and process.exitcode < 0:
        return Outcome(CRASHES)
    if outcome is None:
        raise RuntimeError(f"{tree}: a trial ended with {process.exitcode}, see {tree}.log")
    return outcome


def selftest_fails(tree: Path, objects: Path) -> bool:
    """Whether the self test of the CUDA kernels in `tree`, compiled in `objects` with
    AddressSanitizer, finds something."""
    _make("selftest", tree, objects, {"TILEWISE_SANITIZER": "address"})
    command = [objects / "selftest", "--orders", "1", "--cols", "4096"]
    return subprocess.run(command, capture_output=True).returncode != 0


# --- The process of one trial.


class _Watch:
    """A plugin for pytest: the most telling tests first, each with its limit of time."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.before, self.seconds, self.failed = seconds, {}, None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.originalname not in LEFT_OUT]
        cost: Counter[str] = Counter()
        for item in items:
            cost[_op(item)] += self.before.get(item.nodeid, 0.0)
        items.sort(key=lambda item: _rank(item, cost))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = report.nodeid, report.longreprtext

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        before = self.before.get(nodeid)
        signal.alarm(LIMIT if before is None else int(10 * before) + SLACK)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid, report.longreprtext


def _op(item: pytest.Item) -> str:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return getattr(given.get("op"), "name", "")


def _rank(item: pytest.Item, cost: Mapping[str, float]) -> tuple:
    """What tests the file itself, then values: the ops that cost least, one dtype after the other.

    Both are for Numba, which compiles for each anew.
    """
    direct = not item.nodeid.startswith(("tests/test_ops.py", "tests/properties/", SHARING))
    after = 0 if direct else 1 if item.originalname == FIRST else 2
    given = item.callspec.params if hasattr(item, "callspec") else {}
    dtype = str(given.get("dtype", "float32"))
    sizes, size = getattr(given.get("op"), "sizes", []), given.get("size")
    place = sizes.index(size) if size in sizes else 0
    return after, cost[_op(item)], "float32" not in dtype, dtype, place


def _run_here(sender: Connection, tree: Path, tests, seconds, objects, cache: Path) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is
    signal.alarm(LIMIT)
    with Path(f"{tree}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree / "python"), "TILEWISE_CACHE": str(cache)}
    sys.path[:] = [str(tree / "python"), *(place for place in sys.path if place != HERE)]
    sys.dont_write_bytecode = True
    assert "tilewise" not in sys.modules, "a trial must import its own copy"
    if objects is not None:
        try:
            _compile(tree, objects)
        except RuntimeError:
            sender.send(Outcome(STILLBORN))
            return
    watch = _Watch(seconds)
    status = pytest.main([*QUICKLY, *tests], plugins=[watch])
    sender.send(_outcome(status, watch))


def _compile(tree: Path, objects: Path) -> None:
    """Put the emulated module where it is looked for, compiled in `objects`."""
    from tilewise import emulation, toolchain

    options = toolchain.for_python(tree, emulated=True)
    options["TILEWISE_SOURCES"] = "mutant"  # their hash would have the bindings compiled anew
    _make("_emulated", tree, objects, options | {"TILEWISE_SANITIZER": "plain"})
    place = emulation._place("plain")
    place.mkdir(parents=True)
    shutil.copyfile(objects / emulation.FILE, place / emulation.FILE)


def _make(target: str, tree: Path, objects: Path, options: dict[str, object]) -> None:
    from tilewise import toolchain

    objects.mkdir(exist_ok=True)
    options["TILEWISE_EMULATION"] = "ON"
    toolchain.compile_targets([target], tree, objects, options, objects / "build.log")


def _outcome(status: int, watch: _Watch) -> Outcome:
    if status == pytest.ExitCode.OK:
        return Outcome(PASSED, watch.seconds)
    if watch.failed is None:
        raise RuntimeError(f"pytest ended with {status}")
    name, text = watch.failed
    return Outcome(STILLBORN if REFUSED.search(text) else name.rpartition("/")[2], watch.seconds)

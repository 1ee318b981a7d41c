"""A plugin for pytest: every test runs in a block of `sanitize`, and fails if that finds anything.

    TRITON_INTERPRET=1 python -m pytest -p tilewise.verify.plugin FILE::TEST

`tilewise verify` does this, and says what was found. Where Triton compiles, the plugin does nothing.
"""

import json
import os
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tilewise.verify.findings import Report
from tilewise.verify.sanitizer import sanitize

ROUND = "sanitizer_round"
FOUND = pytest.StashKey[list[Report]]()


def is_interpreting() -> bool:
    """Whether kernels that are defined from here on are interpreted."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare `--sanitizer-order`, `-seed`, `-orders` and `-report`."""
    group = parser.getgroup("tilewise", "Triton sanitizer")
    group.addoption("--sanitizer-order", default="random", help="forward, reverse or random")
    group.addoption("--sanitizer-seed", type=int, help="of the order; by default of the test's name")
    group.addoption("--sanitizer-orders", type=int, default=1, help="how often each test runs")
    group.addoption("--sanitizer-report", help="a file for the findings, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Repair the interpreter before a test module imports from it."""
    config.stash[FOUND] = []
    if is_interpreting():
        from tilewise.verify.interpreter import repair

        repair()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test as often as `--sanitizer-orders` says, each time with fresh fixtures."""
    rounds = metafunc.config.getoption("sanitizer_orders", 1)
    if rounds > 1:
        metafunc.fixturenames.append(ROUND)
        metafunc.parametrize(ROUND, range(rounds))


def _order(item: pytest.Item) -> tuple[str, int]:
    seed = item.config.getoption("sanitizer_seed", None)
    if seed is None:
        seed = zlib.crc32(item.nodeid.encode())
    callspec = getattr(item, "callspec", None)
    number = callspec.params.get(ROUND, 0) if callspec else 0
    return item.config.getoption("sanitizer_order", "random"), seed + number


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch what the test launches."""
    if not is_interpreting():
        return (yield)
    order, seed = _order(item)
    with sanitize(order, seed) as report:
        item.config.stash[FOUND].append(report)
        return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was found, if asked to."""
    file = session.config.getoption("sanitizer_report", None)
    if file:
        reports = session.config.stash[FOUND]
        found = [
            {**vars(finding), "times": report.times(finding), "said": str(finding)}
            for report in reports
            for finding in report.findings
        ]
        content = {"launches": sum(r.launches for r in reports), "findings": found}
        Path(file).write_text(json.dumps(content))

"""A plugin for pytest: every test runs in a block of `sanitize`, and fails if that finds anything.

    TRITON_INTERPRET=1 python -m pytest -p tilewise.verify.plugin FILE::TEST

`tilewise verify` does this, and says what was found. Where Triton compiles, nothing is done.
"""

import json
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tilewise.op import interpreting
from tilewise.verify.findings import Report, SanitizerError
from tilewise.verify.sanitizer import sanitize

ROUND = pytest.StashKey[int]()
FOUND = pytest.StashKey[list[Report]]()
FAILED = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare `--sanitizer-order`, `-seed`, `-orders` and `-report`."""
    group = parser.getgroup("tilewise", "Triton sanitizer")
    group.addoption("--sanitizer-order", default="random", help="forward, reverse or random")
    group.addoption(
        "--sanitizer-seed", type=int, help="of the order; by default of the test's name"
    )
    group.addoption("--sanitizer-orders", type=int, default=1, help="how often each test runs")
    group.addoption("--sanitizer-report", help="a file for the findings, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Repair the interpreter before a test module imports from it."""
    config.stash[FOUND], config.stash[FAILED] = [], []
    if interpreting():
        from tilewise.verify.interpreter import repair

        repair()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run each test as often as `--sanitizer-orders` says, each time with fresh fixtures."""
    rounds = item.config.getoption("sanitizer_orders", 1)
    if rounds == 1 or not isinstance(item, pytest.Function):
        return None
    for number in range(rounds):
        item.stash[ROUND] = number
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if number:
            item._initrequest()
        runtestprotocol(item, nextitem=nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _order(item: pytest.Item) -> tuple[str, int]:
    seed = item.config.getoption("sanitizer_seed", None)
    if seed is None:
        seed = zlib.crc32(item.nodeid.encode())
    return item.config.getoption("sanitizer_order", "random"), seed + item.stash.get(ROUND, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch what the test launches."""
    if not interpreting():
        return (yield)
    order, seed = _order(item)
    with sanitize(order, seed) as report:
        item.config.stash[FOUND].append(report)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep apart the tests that failed for another reason than a finding."""
    report = yield
    if report.failed and not (call.excinfo and call.excinfo.errisinstance(SanitizerError)):
        item.config.stash[FAILED].append((item.nodeid, report.longreprtext))
    return report


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
        launches = sum(report.launches for report in reports)
        content = {"runs": len(reports), "launches": launches, "findings": found}
        content["failed"] = session.config.stash[FAILED]
        Path(file).write_text(json.dumps(content))

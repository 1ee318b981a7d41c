"""`tilewise verify`: tests of Triton kernels, anybody's, under the sanitizer, without a GPU."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tilewise.cli import Refusal
from tilewise.cli.arguments import positive, writable, write_json
from tilewise.verify.session import ORDERS


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise verify`."""
    parser.add_argument("tests", metavar="FILE::TEST", nargs="+", help="as pytest takes them")
    parser.add_argument("--order", choices=ORDERS, default="random", help="of the programs")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (0)")
    parser.add_argument(
        "--orders", type=positive, default=1, metavar="K", help="seeds, from --seed on (1)"
    )
    parser.add_argument("--json", metavar="FILE", help="the findings, to a file")


def run(arguments: Namespace) -> int:
    """Run the tests, say what was found, and return 1 if that is anything or a test failed."""
    for needed in ("pytest", "triton"):
        if find_spec(needed) is None:
            raise Refusal(f"needs {needed}, which is absent")
    for test in arguments.tests:
        if not Path(test.partition("::")[0]).exists():
            raise Refusal(f"FILE::TEST: must name a file that exists, got {test!r}")
    file = writable(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        content = _run_tests(arguments, Path(folder) / "report.json")
    if file is not None:
        write_json(file, content)
    return _say(content)


def _run_tests(arguments: Namespace, report: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "pytest", "-p", "tilewise.verify.plugin", "-p", "no:cacheprovider",
        "-q", "--tb=short", f"--sanitizer-order={arguments.order}",
        f"--sanitizer-seed={arguments.seed}", f"--sanitizer-orders={arguments.orders}",
        f"--sanitizer-report={report}", *(["-n", "0"] if find_spec("xdist") else []),
        *arguments.tests,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise Refusal(f"pytest cannot run these tests: {_reason(done.stdout + done.stderr)}")
    content: dict[str, Any] = json.loads(report.read_text())
    if not content["launches"] and not content["failed"]:
        raise Refusal("the tests must launch a Triton kernel, got none")
    return content


def _reason(output: str) -> str:
    """The line of pytest's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E  ", "ERROR", "error:"))]
    return (errors or lines or ["it says nothing"])[0].removeprefix("E ").strip()


def _say(content: dict[str, Any]) -> int:
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for finding in content["findings"]:
        key = tuple(finding[name] for name in ("kind", "kernel", "file", "line", "argument"))
        if key in seen:
            seen[key]["times"] += finding["times"]
        else:
            seen[key] = finding
    for finding in seen.values():
        often = f", seen {finding['times']} times" if finding["times"] > 1 else ""
        print(f"{finding['said']}{often}\n")
    failed = {test: text for test, text in reversed(content["failed"])}  # its first round
    for test, text in failed.items():
        print(f"{test} failed:\n{text}\n")
    print(
        f"{content['runs']} runs of tests, {content['launches']} launches, {len(seen)} findings, "
        f"{len(failed)} failed for another reason"
    )
    return 1 if seen or failed else 0

"""The command, in this process or in one of its own, and a tiny decoder for it to train."""

import json
import re
import sys
from pathlib import Path

import pytest

from tilewise.cli import main

PROGRAM = [sys.executable, "-c", "import sys; from tilewise.cli import main; sys.exit(main())"]
SETTINGS = {
    "vocab-size": 280,
    "context": 16,
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "kv-heads": 1,
    "batch": 2,
    "warmup": 2,
    "evaluate-every": 2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
}
TINY = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that refuses, and return its one line."""
    capfd.readouterr()
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"tilewise {arguments[0]}: ")
    return line.partition(": ")[2]


def selftested():
    """The ops of csrc/selftest/."""
    source = (Path(__file__).parents[1] / "csrc/selftest/main.cpp").read_text()
    return sorted(re.findall(r'^ +\{"(\w+)", \w+\},$', source, re.MULTILINE))


def assert_selftest_is_right(done, ops):
    """Each of these ops has cases, each of them was judged, and none is wrong."""
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert last == {"cases": len(lines), "wrong": 0}
    assert all(line["ok"] for line in lines)
    assert lines and {*ops} <= {line["case"].partition(" ")[0] for line in lines}

"""The driver of `make gpu`, as far as a machine without a GPU can tell; and the Makefile."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tilewise.op import OPS

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(SPEC)
sys.modules["gpu"] = gpu
SPEC.loader.exec_module(gpu)

KERNELS = ("rms_norm/cuda", "rms_norm/triton")


@pytest.fixture
def run(tmp_path):
    """A run whose results go to a temporary folder, the machine and the hashes known."""
    started = gpu.Run(540, False, tmp_path)
    started.file = tmp_path / "results.json"
    started.record["machine"] = {"commit": "abc"}
    started.record["kernels"] = {
        name: {"hash": "1", "verified": True, "timed": False} for name in KERNELS
    }
    return started


def answering(monkeypatch, status, text="", **files):
    """Let every command end at once with this status and text, leaving these files."""
    commands = []

    def execute(run, name, command, limit, **environment):
        commands.append([str(word) for word in command])
        if (content := files.get(name.replace("-", "__"))) is not None:
            (run.folder / f"{name}.json").write_text(json.dumps(content))
        return status, 1.0, text

    monkeypatch.setattr(gpu.Run, "execute", execute)
    return commands


def verified(run):
    return [name for name, kernel in run.record["kernels"].items() if kernel["verified"]]


def said(run):
    return json.loads(run.file.read_text())["phases"][-1]["said"]


def test_a_command_past_its_limit_is_killed_with_what_it_started(run, tmp_path):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = f"import time; time.sleep(4); open({str(tmp_path / 'alive')!r}, 'w')"
    begun = time.monotonic()
    status, _, _ = run.execute("slow", [sys.executable, "-c", script, child], 1.5)
    assert status == 124
    assert time.monotonic() - begun < 3.5
    time.sleep(max(0.0, 5 - (time.monotonic() - begun)))
    assert not (tmp_path / "alive").exists()


def test_what_a_command_prints_is_kept(run):
    code = "import os, sys; print(os.environ['WORD']); sys.exit(3)"
    status, _, text = run.execute("talk", [sys.executable, "-c", code], 60, WORD="hello")
    assert (status, text) == (3, "hello\n")
    assert (run.folder / "talk.log").read_text() == "hello\n"


def test_check_verifies_what_ran_and_is_right(run, monkeypatch):
    right = {"op": "rms_norm", "ok": True}
    skipped = {"op": "rms_norm", "skipped": "is not built"}
    for kernel in run.record["kernels"].values():
        kernel["verified"] = False
    results = {
        "check__rms_norm__cuda": [skipped],
        "check__rms_norm__triton": [right, skipped],
    }
    commands = answering(monkeypatch, 0, **results)
    gpu.check(run)
    assert verified(run) == ["rms_norm/triton"]
    assert said(run) == "1 of 2 kernels are right; not: rms_norm/cuda"
    assert sorted(c[c.index("--backend") + 1] for c in commands) == ["cuda", "triton"]
    assert len(run.record["checks"]) == 3


def test_a_test_that_fails_takes_the_verification_back(run, monkeypatch):
    text = (
        "[gw0] [ 10%] PASSED tests/test_ops.py::test_a[rms_norm-cuda-float32]\n"
        "[gw1] [ 20%] FAILED tests/test_ops.py::test_b[rms_norm-cuda-rows=3, cols=8] \n"
        "[gw1] [ 30%] SKIPPED tests/test_ops.py::test_b[rms_norm-numba] \n"
    )
    commands = answering(monkeypatch, 1, text)
    gpu.test(run)
    assert verified(run) == ["rms_norm/triton"]
    assert run.record["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert run.record["tests"]["finished"]
    assert "addopts=" in commands[0]  # pytest-benchmark may not be there


def test_tests_cut_short_are_said_to_be(run, monkeypatch):
    answering(monkeypatch, 124, "[gw0] PASSED tests/test_ops.py::test_a[x]\n")
    gpu.test(run)
    assert not run.record["tests"]["finished"]
    assert run.record["dropped"] == ["tests: those not reached within the limit"]


@pytest.mark.parametrize("status", [0, 1])
def test_what_ran_is_held_beside_what_was_compiled_ahead_of_time(run, monkeypatch, status):
    launches = {"launches": [{"registers": 32}]}
    summary = "1 launches, 0 otherwise than compiled ahead of time, 1 the same machine code"
    commands = answering(monkeypatch, status, f"a row\n{summary}\n", launched=launches)
    gpu.compare(run)
    assert commands[0][-4:-1] == ["kernels", "--launched", "--json"]
    assert run.record["launched"] == launches["launches"]
    assert said(run) == summary
    assert run.record["phases"][-1]["ok"] == (status == 0)


def timed_row(provider, seconds, cols=8):
    size = {"rows": 1, "cols": cols}
    return {
        "op": "rms_norm", "dtype": "bfloat16", "size": size, "provider": provider,
        "seconds": seconds,
    }  # fmt: skip


def test_bench_times_every_op_before_it_times_at_length(run, monkeypatch):
    quick = {"rows": [timed_row("triton", 2.0), timed_row("torch", 3.0, cols=9)], "machine": {}}
    full = {"rows": [timed_row("triton", 1.0)], "machine": {"roofs": []}, "dropped": ["late"]}
    commands = answering(monkeypatch, 0, quick=quick, bench=full)
    gpu.bench(run)
    assert ["--quick" in command for command in commands] == [True, False]
    timed = [name for name, kernel in run.record["kernels"].items() if kernel["timed"]]
    assert timed == ["rms_norm/triton"]
    assert [row["seconds"] for row in run.record["rows"]] == [3.0, 1.0]
    assert run.record["dropped"] == ["bench: late"]
    assert run.record["machine"] == {"commit": "abc", "roofs": []}
    for command in commands:
        assert 0 < int(command[command.index("--budget") + 1]) < run.left


@pytest.mark.parametrize("status, kept", [(0, list(KERNELS)), (9, [])])
def test_memcheck_takes_every_verification_back_on_an_error(run, monkeypatch, status, kept):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    answering(monkeypatch, status, "========= ERROR SUMMARY: 3 errors\n")
    gpu.sanitize(run)
    assert verified(run) == kept
    assert run.record["memcheck"] == "ERROR SUMMARY: 3 errors"


@pytest.mark.parametrize("status, kept", [(0, list(KERNELS)), (9, ["rms_norm/triton"])])
def test_a_selftest_that_fails_takes_the_cuda_verifications_back(run, monkeypatch, status, kept):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    calls = []

    def execute(run, name, command, limit, **environment):
        calls.append((name, command))
        return (0 if name == "selftest-build" else status), 1.0, "/there/selftest\n"

    monkeypatch.setattr(gpu.Run, "execute", execute)
    gpu.selftest(run)
    assert verified(run) == kept
    commands = dict(calls)
    assert commands["selftest-alone"] == ["/there/selftest"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        words = commands[f"selftest-{tool}"]
        assert words[words.index("--tool") + 1 :] == [tool, "/there/selftest", "--orders", "1"]
    assert set(run.record["selftest"]) == {"alone", *gpu.TOOLS}


def test_phases_without_time_are_dropped_and_said(run, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    commands = answering(monkeypatch, 0)
    run.budget = gpu.CLOSING
    for phase in (gpu.check, gpu.test, gpu.compare, gpu.bench, gpu.sanitize):
        phase(run)
    assert commands == []
    assert verified(run) == []
    assert run.record["dropped"] == [
        "check: rms_norm/cuda did not finish",
        "check: rms_norm/triton did not finish",
        "tests: the whole suite",
        "kernels: registers, spills and shared memory of what ran",
        "quick: every workload",
        "bench: every workload",
        "memcheck: the smallest sizes",
    ]


def test_a_failed_build_falls_back_to_triton(run, monkeypatch):
    commands = answering(monkeypatch, 1, "error: no such flag")
    gpu.build(run, ["NVIDIA H200", 9, 0])
    assert len(commands) == 2
    phases = json.loads(run.file.read_text())["phases"]
    assert phases[0]["said"] == "the CUDA kernels failed: error: no such flag"
    assert not phases[0]["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "make gpu: must have a GPU that PyTorch can use, got none\n"


def test_a_dry_run_says_what_each_phase_would_do(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    files = {file.suffix: file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(files) == {".json", ".log"}
    record = json.loads(files[".json"].read_text())
    phases = {phase["phase"]: phase["said"] for phase in record["phases"]}
    assert list(phases) == [
        "device", "build", "results", "check", "selftest", "tests", "kernels", "bench", "memcheck",
    ]  # fmt: skip
    assert phases["build"].startswith("would run -m pip install --no-build-isolation --no-deps .")
    assert "rms_norm/cuda, rms_norm/triton" in phases["check"]
    gpu_kernels = {f"{op.name}/{b}" for op in OPS.values() for b in op.backends if b != "numba"}
    assert set(record["kernels"]) == gpu_kernels
    assert not any(k["verified"] or k["timed"] for k in record["kernels"].values())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize(
    "words, commands",
    [
        ("demo", ["-m venv", "pip install -c", "tilewise demo"]),
        (
            "demo TORCH=installed",
            ["-m venv --system-site-packages", "pip install", "tilewise demo"],
        ),
        ("test", ["-m venv", "pip install -c", "'.[test]'", "tilewise build", "-m pytest -n 2"]),
        ("check", ["ruff format --check", "ruff check", "mypy", "tilewise build", "-m pytest"]),
        ("bench", ["tilewise bench --save"]),
        ("gpu BUDGET=60 OUT=there", ['benchmarks/gpu.py --budget 60 --output "there"']),
        ("docs", ["docs/pages.py"]),
    ],
)
def test_make(tmp_path, words, commands):
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "-n", *words.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    places = [done.stdout.index(command) for command in commands]
    assert places == sorted(places)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_pins_nothing_that_an_installed_torch_may_refuse(tmp_path):
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    pins = tmp_path / ".venv" / "constraints-installed.txt"
    pins.parent.mkdir()
    make = ["make", "PYTHON=:", "TORCH=installed", str(pins.relative_to(tmp_path))]
    subprocess.run(make, cwd=tmp_path, check=True)
    pinned = set(re.findall(r"^[\w-]+", pins.read_text(), re.MULTILINE))
    assert "numba" in pinned
    assert not pinned & {"torch", "triton", "numpy", "setuptools"}

"""`make gpu`: build, check, test, time and sanitize on a machine with a GPU and no network.

Phases run in order of worth, each a process of its own with its own limit. What there is no time
for is dropped, and said. The results are written as each phase ends, so that a kill loses little.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WANTED = ("check", "selftest", "tests")  # phases that may find a kernel wrong
CLOSING = 10  # seconds kept for the last words
JOBS = min(8, os.cpu_count() or 1)
TILEWISE = [sys.executable, "-m", "tilewise"]

DEVICE = """
import json, torch
print(json.dumps([torch.cuda.get_device_name(), *torch.cuda.get_device_capability()]
                 if torch.cuda.is_available() else None))
"""
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
SELFTEST = "from tilewise import native; print(native.build_selftest())"
VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b (tests/.*)")


@dataclass
class Run:
    """One `make gpu`: its time, and what it found so far."""

    budget: float
    dry: bool
    folder: Path
    begun: float = field(default_factory=time.monotonic)
    file: Path | None = None
    record: dict = field(default_factory=lambda: {"phases": [], "dropped": [], "checks": []})

    @property
    def left(self) -> float:
        """Seconds until the closing ones."""
        return self.budget - CLOSING - (time.monotonic() - self.begun)

    def say(self, phase: str, sentence: str, seconds: float = 0.0, ok: bool = True) -> None:
        """Print what a phase came to, note it, and write down everything found so far."""
        print(f"{phase:8s} {seconds:6.1f} s  {sentence}", flush=True)
        self.record["phases"].append(
            {"phase": phase, "seconds": round(seconds, 1), "ok": ok, "said": sentence}
        )
        self.save()

    def drop(self, phase: str, what: str) -> None:
        """Say that there was no time for something."""
        self.record["dropped"].append(f"{phase}: {what}")
        self.say(phase, f"dropped: {what}", ok=False)

    def save(self) -> None:
        """Write the results, whole or not at all."""
        if self.file is not None:
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.record, indent=1) + "\n")
            part.replace(self.file)

    def execute(self, name: str, command: list, limit: float, **environment: str) -> tuple:
        """Run a command at most `limit` seconds.

        Returns:
            Exit status (124 past its limit), seconds, and what it printed, which is in the log too.
        """
        begun, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=output, stderr=output,
                env=os.environ | environment, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=max(limit, 1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = 124
        return status, time.monotonic() - begun, log.read_text(errors="replace")


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


def commit() -> str:
    """The commit of this tree; "unknown" where it came without its history."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":!benchmarks/results"])
    return head.stdout.strip() + ("-changed" if clean.returncode else "")


def find_gpu(run: Run) -> list | None:
    """Name and compute capability of the GPU, or None."""
    _, seconds, text = run.execute("device", [sys.executable, "-c", DEVICE], 90)
    try:
        found = json.loads(last_line(text))
    except ValueError:
        found = None
        run.say("device", f"PyTorch does not answer: {last_line(text)}", seconds, ok=False)
        return None
    where = f"{found[0]}, compute capability {found[1]}.{found[2]}" if found else "no GPU here"
    run.say("device", where, seconds, ok=bool(found))
    return found


def build(run: Run, gpu: list | None) -> None:
    """Install the package, with the CUDA kernels for this GPU, into what is there."""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    if run.dry:
        needed = [n for n in ("pybind11", "setuptools", "pip") if find_spec(n) is None]
        needed += [n for n in ("nvcc", "cmake", "ninja") if shutil.which(n) is None]
        run.say("build", f"would run {' '.join(install[1:])}; missing: {needed or 'nothing'}")
        return
    archs = "90a-real" if gpu[1:] == [9, 0] else f"{gpu[1]}{gpu[2]}-real"
    wanted = {"TILEWISE_CUDA": "ON", "TILEWISE_CUDA_ARCHS": archs}
    status, seconds, text = run.execute("build", install, min(240, run.left), **wanted)
    if status == 0:
        run.say("build", f"installed with CUDA kernels for {archs}", seconds)
        return
    run.say("build", f"the CUDA kernels failed: {last_line(text)}", seconds, ok=False)
    status, seconds, text = run.execute("install", install, 60, TILEWISE_CUDA="OFF")
    run.say("install", "without CUDA kernels" if status == 0 else last_line(text), seconds, False)


def name_results(run: Run, gpu: list | None, output: Path | None) -> None:
    """Ask for machine and hashes, from which the results have their name."""
    machine, kernels = run.folder / "machine.json", run.folder / "kernels.json"
    run.execute("info", [*TILEWISE, "info", "--json", machine], 60)
    run.execute("report", [*TILEWISE, "report", "--json", kernels], 60)
    if not (machine.exists() and kernels.exists()):
        raise SystemExit(f"make gpu: tilewise does not start, see {run.folder}")
    here = json.loads(machine.read_text())
    run.record["machine"], run.record["ops"] = here["machine"], here["ops"]
    run.record["kernels"] = {
        entry["name"]: {"hash": entry["hash"], "verified": False, "timed": False}
        for entry in json.loads(kernels.read_text())
    }
    name = (gpu[0] if gpu else "no gpu").lower()
    device = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    folder = (ROOT / "runs" if run.dry else RESULTS) if output is None else output
    folder = folder / device
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    run.file = folder / f"{date}-{here['machine']['commit']}.json"
    run.say("results", str(run.file))


def check(run: Run) -> None:
    """Hold each kernel to the rule, each in a process of its own: one may crash alone."""
    names = list(run.record["kernels"])
    if run.dry:
        run.say("check", f"would check {', '.join(names)} on the GPU, {JOBS} at a time")
        return
    begun, deadline = time.monotonic(), time.monotonic() + 0.45 * run.left

    def one(name: str) -> tuple[str, int, list]:
        op, backend = name.split("/")
        limit, file = deadline - time.monotonic(), run.folder / f"check-{op}-{backend}.json"
        if limit < 5:
            return name, 124, []
        command = [*TILEWISE, "check", op, "--backend", backend, "--device", "cuda"]
        status, _, _ = run.execute(f"check-{op}-{backend}", [*command, "--json", file], limit)
        return name, status, json.loads(file.read_text()) if file.exists() else []

    with ThreadPoolExecutor(JOBS) as pool:
        for name, status, results in pool.map(one, names):
            run.record["checks"] += results
            ran = [r for r in results if "skipped" not in r]
            run.record["kernels"][name]["verified"] = bool(ran) and all(r["ok"] for r in ran)
            if status == 124:
                run.drop("check", f"{name} did not finish")
    right = [name for name, kernel in run.record["kernels"].items() if kernel["verified"]]
    wrong = [name for name in names if name not in right]
    said = f"{len(right)} of {len(names)} kernels are right; not: {', '.join(wrong) or 'none'}"
    run.say("check", said, time.monotonic() - begun, ok=not wrong)


def selftest(run: Run) -> None:
    """Run every CUDA launcher without Python: by itself, then under each of the TOOLS."""
    if run.dry:
        run.say("selftest", f"would compile and run it, and under {', '.join(TOOLS)}")
        return
    build_it = [sys.executable, "-c", SELFTEST]
    status, seconds, text = run.execute("selftest-build", build_it, min(150, 0.3 * run.left))
    if status:
        run.say("selftest", f"not compiled: {last_line(text)}", seconds, ok=False)
        return
    program, limit = last_line(text), min(90, 0.3 * run.left)
    sanitizer = shutil.which("compute-sanitizer")
    watched = [sanitizer, "--error-exitcode", "9", "--tool"]
    commands = {"alone": [program]}
    if sanitizer:
        commands |= {tool: [*watched, tool, program, "--orders", "1"] for tool in TOOLS}
    begun = time.monotonic()
    with ThreadPoolExecutor(len(commands)) as pool:
        names = [f"selftest-{name}" for name in commands]
        limits = [limit] * len(commands)
        ended = list(pool.map(run.execute, names, commands.values(), limits))
    found = dict(zip(commands, ended, strict=True))
    run.record["selftest"] = {name: last_line(text) for name, (_, _, text) in found.items()}
    wrong = [name for name, (status, _, _) in found.items() if status not in (0, 124)]
    for name in (n for n, (status, _, _) in found.items() if status == 124):
        run.drop("selftest", f"{name} did not finish")
    for name, kernel in run.record["kernels"].items():
        kernel["verified"] &= not (wrong and name.endswith("/cuda"))
    said = f"right {', '.join(n for n in found if n not in wrong)}; wrong: {wrong or 'nothing'}"
    run.say("selftest", said, time.monotonic() - begun, ok=not wrong)


def test(run: Run) -> None:
    """Run the whole test suite on the GPU; a kernel that a test finds wrong is not verified."""
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-o", "addopts=", "-m", "not slow"]
    command += ["-p", "no:cacheprovider"]
    command += ["-n", str(JOBS)] if find_spec("xdist") else []
    command += ["--timeout", "120"] if find_spec("pytest_timeout") else []
    if run.dry:
        run.say("tests", f"would run {' '.join(command[1:])}")
        return
    if run.left < 60:
        run.drop("tests", "the whole suite")
        return
    # cuBLAS is deterministic, as the tests ask, only with a workspace of fixed size.
    fixed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    status, seconds, text = run.execute("tests", command, 0.5 * run.left, **fixed)
    verdicts = VERDICT.findall(text)
    failed = sorted({name.strip() for kind, name in verdicts if kind in ("FAILED", "ERROR")})
    counts = {kind.lower(): sum(k == kind for k, _ in verdicts) for kind, _ in verdicts}
    run.record["tests"] = {"counts": counts, "failed": failed, "finished": status != 124}
    for name, kernel in run.record["kernels"].items():
        if any(re.search(rf"\b{name.replace('/', '-')}\b", test) for test in failed):
            kernel["verified"] = False
    if status == 124:
        run.drop("tests", "those not reached within the limit")
    run.say("tests", f"{counts or last_line(text)}", seconds, ok=status == 0)


def compare(run: Run) -> None:
    """Hold what ran of every workload beside what the same launch compiles to ahead of time."""
    file = run.folder / "launched.json"
    command = [*TILEWISE, "kernels", "--launched", "--json", file]
    if run.dry:
        run.say("kernels", f"would run {' '.join(map(str, command[1:-1]))}")
        return
    if run.left < 60:
        run.drop("kernels", "registers, spills and shared memory of what ran")
        return
    status, seconds, text = run.execute("launched", command, min(90, 0.2 * run.left))
    if file.exists():
        run.record["launched"] = json.loads(file.read_text())["launches"]
    run.say("kernels", last_line(text), seconds, ok=status == 0)


def bench(run: Run) -> None:
    """Time the first workload of every op, then all of them, keeping time for the sanitizer."""
    if run.dry:
        run.say("bench", "would run tilewise bench --device cuda in the time that is left")
        return
    kept = 60 if run.left > 150 else 0
    document: dict = {"rows": [], "untimed": [], "inexact": []}
    for name, words, least in (("quick", ["--quick"], 30), ("bench", [], 60)):
        limit = run.left - kept
        if limit < least:
            run.drop(name, "every workload")
            continue
        file = run.folder / f"{name}.json"
        command = [*TILEWISE, "bench", "--device", "cuda", "--json", file, *words]
        budget = ["--budget", int(limit - 20)]
        status, seconds, text = run.execute(name, [*command, *budget], limit)
        found = json.loads(file.read_text()) if file.exists() else {"rows": []}
        run.record["dropped"] += [f"{name}: {work}" for work in found.get("dropped", [])]
        run.record["machine"] |= found.get("machine", {})
        # What was timed again, beside torch.compile, counts; one run holds all of a workload.
        again = {work(row) for row in found["rows"]}
        for part in ("rows", "untimed", "inexact"):
            once = [row for row in document[part] if work(row) not in again]
            document[part] = once + found.get(part, [])
        said = f"{len(found['rows'])} rows" if status in (0, 124) else last_line(text)
        run.record |= document
        for row in found["rows"]:
            if kernel := run.record["kernels"].get(f"{row['op']}/{row['provider']}"):
                kernel["timed"] = True
        run.say(name, said, seconds, ok=status == 0)


def work(row: dict) -> str:
    """What is timed together: an op, a dtype and a size."""
    return json.dumps([row["op"], row["dtype"], row["size"]])


def sanitize(run: Run) -> None:
    """Run the smallest sizes under compute-sanitizer; an error takes every verification back."""
    tool = shutil.which("compute-sanitizer")
    command = [tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command += [*TILEWISE, "check", "--quick", "--device", "cuda", "--dtype", "bfloat16"]
    if run.dry or tool is None:
        here = "which is here" if tool else "which is not here"
        run.say("memcheck", f"needs compute-sanitizer, {here}: {' '.join(map(str, command))}")
        return
    if run.left < 25:
        run.drop("memcheck", "the smallest sizes")
        return
    # Without PyTorch's cache every tensor is an allocation whose ends the tool knows.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, seconds, text = run.execute("memcheck", command, run.left, **plain)
    summary = re.findall(r"ERROR SUMMARY: .*", text)
    run.record["memcheck"] = summary[-1] if summary else last_line(text)
    if status == 9 and summary:
        for kernel in run.record["kernels"].values():
            kernel["verified"] = False
    if status == 124:
        run.drop("memcheck", "those not reached within the limit")
    run.say("memcheck", run.record["memcheck"], seconds, ok=status == 0)


def main() -> int:
    """Run the phases; 1 if a kernel was found wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for it all")
    parser.add_argument("--output", type=Path, help="a folder for the results and the logs")
    parser.add_argument("--dry-run", action="store_true", help="say what each phase would do")
    arguments = parser.parse_args()
    run = Run(arguments.budget, arguments.dry_run, Path(tempfile.mkdtemp(prefix="tilewise-gpu-")))
    os.environ["TILEWISE_COMMIT"] = os.environ.get("TILEWISE_COMMIT") or commit()
    os.environ["TILEWISE_JIT"] = "0"  # what `build` could not build, nobody tries again
    gpu = find_gpu(run)
    if gpu is None and not run.dry:
        print("make gpu: must have a GPU that PyTorch can use, got none", file=sys.stderr)
        return 2
    build(run, gpu)
    name_results(run, gpu, arguments.output)
    for phase in (check, selftest, test, compare, bench, sanitize):
        phase(run)
    kernels = run.record["kernels"]
    for name, kernel in kernels.items():
        words = [word if kernel[word] else f"not {word}" for word in ("verified", "timed")]
        print(f"{name}: {', '.join(words)}")
    for what in run.record["dropped"]:
        print(f"dropped: {what}")
    log = run.file.with_suffix(".log") if arguments.output else run.folder / "all.log"
    log.write_text("".join(f"== {f.stem}\n{f.read_text()}\n" for f in run.folder.glob("*.log")))
    print(f"{time.monotonic() - run.begun:.0f} s of {run.budget:.0f}; {run.file}; log: {log}")
    wrong = [p for p in run.record["phases"] if not p["ok"] and p["phase"] in WANTED]
    return 0 if run.dry or not wrong else 1


if __name__ == "__main__":
    sys.exit(main())

"""The commands: what they print and write, how they end, what they say of wrong arguments."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilewise import cli, op
from tilewise.check import Result, cases
from tilewise.choice import BACKENDS
from tilewise.cli import arguments, console
from tilewise.cli import bench as bench_command
from tilewise.cli import build as build_command
from tilewise.cli import report as report_command
from tilewise.native import EMULATED
from tilewise.op import OPS

CHECK_KEYS = ["op", "backend", "device", "dtype", "size", "output", "error", "allowed", "ok"]
ON_CPU = ["--device", "cpu"]


@pytest.fixture
def tilewise(capsys):
    """Run a command: its exit status, its lines and what it said of errors."""

    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def broken(monkeypatch):
    """rms_norm, off by three per cent, with one size."""
    right = OPS["rms_norm"]

    def call(x, weight=None, bias=None, eps=1e-6, *, backend=None):
        return 0.97 * right.call(x, weight, bias, eps=eps, backend=backend)

    monkeypatch.setitem(op.OPS, "rms_norm", replace(right, call=call, sizes=right.sizes[:1]))


WRONG = {
    "check nonsense": "tilewise check: OP: must be one of ",
    "check rms_norm --backend gpu": "tilewise check: --backend: must be one of ",
    "check --device tpu": "tilewise check: --device: must be cpu or cuda, got 'tpu'",
    "check --dtype int8": "tilewise check: --dtype: must be one of float32, float16, ",
    "check --json /": "tilewise check: /: must be a file in a folder that exists",
    "check --what": "tilewise: unrecognized arguments: --what",
    "bench nonsense": "tilewise bench: OP: must be one of ",
    "bench --backend reference": "tilewise bench: --backend: must be one of ",
    "bench --dtype float8": "tilewise bench: --dtype: must be one of ",
    "bench --json /missing/file": "tilewise bench: /missing/file: must be a file in a folder that",
    "bench --plot /missing/file": "tilewise bench: /missing/file: must be a file in a folder that",
    "bench --budget 0": "tilewise bench: argument --budget: must be a positive whole number, got",
    "bench --threads -1": "tilewise bench: argument --threads: ",
    "info --device tpu": "tilewise info: --device: must be cpu or cuda, got 'tpu'",
    "build nonsense": "tilewise build: OP: must be one of ",
    "report --json /missing/file": "tilewise report: /missing/file: must be a file in a folder",
    "nonsense": "tilewise: argument COMMAND: invalid choice: 'nonsense'",
    "": "tilewise: the following arguments are required: COMMAND",
}


@pytest.mark.parametrize("words, said", WRONG.items(), ids=WRONG)
def test_a_wrong_argument_is_one_line_and_status_2(tilewise, words, said):
    status, out, err = tilewise(*words.split())
    assert status == 2
    assert out == []
    assert len(err) == 1
    assert err[0].startswith(said)


def test_a_missing_dependency_is_named(tilewise, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("no", name="rich")

    monkeypatch.setattr(cli, "import_module", absent)
    status, _, err = tilewise("train")
    assert (status, err) == (2, ["tilewise train: needs rich, which is absent"])


def test_an_absent_device_is_refused(tilewise, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = tilewise("check", "--device", "cuda")
    assert status == 2
    assert "there is no CUDA device that PyTorch can use here" in err[0]
    assert arguments.named_device(None) == "cpu"


def test_short_names_of_dtypes():
    assert arguments.named_dtype("bf16") == torch.bfloat16
    assert arguments.named_dtype("float64") == torch.float64
    assert arguments.named_dtype(None) is None


def test_check_is_all_right(tilewise, monkeypatch, tmp_path):
    file = tmp_path / "results.json"
    some = replace(OPS["rms_norm"], sizes=OPS["rms_norm"].sizes[:4])
    monkeypatch.setitem(op.OPS, "rms_norm", some)
    status, out, err = tilewise("check", "rms_norm", *ON_CPU, "--json", file)
    assert (status, err) == (0, [])
    rows = json.loads(file.read_text())
    ran, skipped = [r for r in rows if "ok" in r], [r for r in rows if "skipped" in r]
    assert len(ran) + len(skipped) == len(rows)
    assert all(list(row) == CHECK_KEYS and row["ok"] is True for row in ran)
    assert all(list(row) == [*CHECK_KEYS[:5], "skipped"] for row in skipped)
    declared = {(b, str(d)[6:], json.dumps(s)) for b, d, s in cases(OPS["rms_norm"])}
    assert declared == {(r["backend"], r["dtype"], json.dumps(r["size"])) for r in rows}
    assert {r["output"] for r in ran} == {"out", "dx", "dweight"}
    assert out[0].split("\t")[:4] == ["op", "backend", "dtype", "cases"]
    assert len(out) == 2 + sum(len(b.dtypes) for b in OPS["rms_norm"].backends.values())
    assert (
        out[-1]
        == f"{len(ran)} outputs and gradients checked, 0 wrong, {len(skipped)} cases skipped"
    )


def test_check_takes_only_what_was_asked_for(tilewise, tmp_path):
    file = tmp_path / "results.json"
    words = ["rms_norm", "--backend", "numba", "--dtype", "fp16", "--quick", "--json", file]
    status, out, _ = tilewise("check", *words, "--verbose", *ON_CPU)
    rows = json.loads(file.read_text())
    assert status == 0
    assert {(r["backend"], r["dtype"]) for r in rows} == {("numba", "float16")}
    assert [r["size"] for r in rows] == [dict(OPS["rms_norm"].sizes[0])] * 3
    assert sum(line.endswith("\tok") for line in out) == 3


def test_check_fails_with_status_1(tilewise, broken, tmp_path):
    file = tmp_path / "results.json"
    words = ["rms_norm", "--backend", "numba", "--dtype", "fp32", "--json", file]
    status, out, _ = tilewise("check", *words, *ON_CPU)
    assert status == 1
    assert [row["ok"] for row in json.loads(file.read_text())] == [False] * 3
    assert out[-1].startswith("3 outputs and gradients checked, 3 wrong")
    assert sum(line.endswith("\twrong") for line in out[2:]) == 3


def test_check_goes_on_after_a_kernel_that_raises(tilewise, monkeypatch, tmp_path):
    right, file = OPS["rms_norm"], tmp_path / "results.json"

    def call(x, weight=None, bias=None, eps=1e-6, *, backend=None):
        if x.dtype == torch.float16:
            raise ZeroDivisionError("first line\nsecond line")
        return right.call(x, weight, bias, eps=eps, backend=backend)

    monkeypatch.setitem(op.OPS, "rms_norm", replace(right, call=call, sizes=right.sizes[:1]))
    words = ["rms_norm", "--backend", "numba", "--json", file]
    status, _, _ = tilewise("check", *words, *ON_CPU)
    rows = json.loads(file.read_text())
    wrong = [row for row in rows if not row["ok"]]
    assert status == 1
    assert [row["output"] for row in wrong] == ["ZeroDivisionError: first line"]
    assert wrong[0]["error"] is None  # infinite: JSON has no word for it
    assert {row["dtype"] for row in rows if row["ok"]} == {"float32", "bfloat16", "float64"}


def test_bench_writes_rows_and_a_picture(tilewise, monkeypatch, tmp_path):
    small = replace(OPS["rms_norm"], workloads=[{"rows": 64, "cols": 32}])
    monkeypatch.setitem(op.OPS, "rms_norm", small)
    file, picture = tmp_path / "rows.json", tmp_path / "bars.png"
    words = ["rms_norm", "--quick", *ON_CPU, "--threads", 1, "--json", file, "--plot", picture]
    status, out, err = tilewise("bench", *words)
    assert (status, err) == (0, [])
    document = json.loads(file.read_text())
    assert {row["provider"] for row in document["rows"]} == {"reference", "torch", "numba"}
    assert document["machine"]["roofs"][0]["threads"] == 1
    assert document["machine"]["commit"]
    assert sum(line.startswith("rms_norm\tforward\t") for line in out) == 3
    assert sum(line.startswith("rms_norm\tforward+backward\t") for line in out) == 3
    said = "is emulated, not worth the clock" if EMULATED else "runs on cuda, got cpu"
    assert any(said in line for line in out)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bench_says_what_it_dropped(tilewise, monkeypatch):
    def nothing_fits(chosen, *rest, **options):
        report = bench_command.Report(dropped=[str(work) for work in chosen])
        yield report

    monkeypatch.setattr(bench_command.bench, "run", nothing_fits)
    status, out, _ = tilewise("bench", "rms_norm", *ON_CPU, "--quick", "--budget", 1)
    assert status == 0
    assert out[-1] == "dropped to keep the budget: rms_norm float32 rows=4096 cols=1024"


@pytest.mark.parametrize(
    "seconds, said", [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (1e-3, "1 ms")]
)
def test_durations(seconds, said):
    assert bench_command.duration(seconds) == said


def test_info_says_who_serves_and_why_not(tilewise, tmp_path):
    file = tmp_path / "info.json"
    status, out, _ = tilewise("info", *ON_CPU)
    assert status == 0
    rows = [tuple(line.split("\t")) for line in out]
    for name, declared in OPS.items():
        answers = {row[1]: row[2] for row in rows if row[0] == name}
        assert list(answers) == [*declared.backends, "reference"]
        assert list(answers.values()).count("serves") == 1
    assert ("torch", torch.__version__) in rows
    assert ("rms_norm", "numba", "serves") in rows

    assert tilewise("info", *ON_CPU, "--json", file)[:2] == (0, [])
    status, out, _ = tilewise("info", *ON_CPU, "--json")
    found = json.loads("\n".join(out))
    assert set(found) == set(json.loads(file.read_text())) == {"machine", "device", "ops"}
    assert set(found["ops"]) == set(OPS)
    assert set(found["ops"]["rms_norm"]) == {*OPS["rms_norm"].backends, "reference"} <= {*BACKENDS}


def test_report_names_what_is_pending(tilewise, monkeypatch, tmp_path):
    file = tmp_path / "report.json"
    status, out, _ = tilewise("report", "--json", file)
    every = json.loads(file.read_text())
    assert status == 0
    assert {"rms_norm/cuda", "rms_norm/triton"} <= {kernel["name"] for kernel in every}
    assert len(out) == len(every) + 2
    status, out, _ = tilewise("report", "--pending", "--json", file)
    assert json.loads(file.read_text()) == [kernel for kernel in every if kernel["pending"]]
    pending = sum(kernel["pending"] for kernel in every)
    assert out[-1].startswith(f"{pending} of {len(every)} kernels have no result")

    monkeypatch.setattr(report_command, "sources_root", lambda: None)
    status, _, err = tilewise("report")
    assert status == 2
    assert err == ["tilewise report: needs the sources: run it in a checkout of tilewise"]


def test_build_fills_the_cache_and_says_so(tilewise, monkeypatch):
    monkeypatch.setattr(build_command, "build_cuda", lambda force: 0)
    status, out, _ = tilewise("build", "rms_norm")
    assert status == 0
    assert out[0].startswith("rms_norm/numba: bfloat16, float16, float32, float64 in ")


def test_without_a_compiler_build_says_so(capsys, monkeypatch):
    monkeypatch.setattr(build_command.native, "is_built", lambda: False)
    monkeypatch.setattr(build_command.native, "missing", lambda: "nvcc")
    assert build_command.build_cuda(force=False) == 0
    assert capsys.readouterr().out == "CUDA kernels: not built, needs nvcc\n"


def test_a_failed_build_is_status_1(capsys, monkeypatch):
    def build(force):
        raise RuntimeError("build: must compile")

    monkeypatch.setattr(build_command.native, "is_built", lambda: False)
    monkeypatch.setattr(build_command.native, "missing", lambda: None)
    monkeypatch.setattr(build_command.native, "build", build)
    assert build_command.build_cuda(force=False) == 1
    assert "must compile" in capsys.readouterr().out


def test_a_built_module_is_left_alone(capsys, monkeypatch):
    monkeypatch.setattr(build_command.native, "is_built", lambda: True)
    monkeypatch.setattr(build_command.native, "build", lambda force: pytest.fail("built again"))
    assert build_command.build_cuda(force=False) == 0
    assert "built already" in capsys.readouterr().out


def on_terminal(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rich = pytest.importorskip("rich.console")
    screen = io.StringIO()
    terminal = rich.Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(console, "CONSOLE", terminal)
    monkeypatch.setattr(console, "ERRORS", terminal)
    console.print_table("title", ["one"], [["[red]two"]])
    list(console.with_progress([1, 2], "working", 2))
    return screen.getvalue()


def test_a_terminal_gets_a_table_and_a_progress_bar(monkeypatch):
    shown = on_terminal(monkeypatch, TERM="xterm")
    assert "│" in shown
    assert "title" in shown
    assert "working" in shown
    assert "[red]two" in shown  # a cell is text, not markup


def test_no_color_is_honoured(monkeypatch):
    assert "\x1b[3" not in on_terminal(monkeypatch, TERM="xterm", NO_COLOR="1").replace(
        "\x1b[3m", ""
    )  # italics are no colour


def test_a_pipe_gets_plain_text_also_without_rich(monkeypatch, capsys):
    for value in (console.CONSOLE, None):
        monkeypatch.setattr(console, "CONSOLE", value)
        monkeypatch.setattr(console, "ERRORS", value)
        console.print_table("title", ["one", "two"], [[1, "[red]2"]])
        assert list(console.with_progress(iter("ab"), "working", 2)) == ["a", "b"]
        assert capsys.readouterr().out == "one\ttwo\n1\t[red]2\n"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    arguments.write_json(file, {"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert json.loads(file.read_text()) == {"a": [None, 1.5], "b": [None]}
    with pytest.raises(TypeError):
        arguments.write_json(file, object())
    assert json.loads(file.read_text())["a"] == [None, 1.5]


def test_the_row_of_a_result_has_the_promised_keys():
    result = Result("a", "b", "cpu", "float32", {"rows": 1}, "out", 1.0, 2.0)
    assert list(result.row()) == CHECK_KEYS
    assert result.ratio == 0.5


def test_python_m_tilewise_is_the_command():
    text = (Path(cli.__file__).parent.parent / "__main__.py").read_text()
    assert "SystemExit(main())" in text

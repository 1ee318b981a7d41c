"""Every GPU kernel that is shipped, compiled ahead of time, keeps its promises and its baseline."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tilewise import cli
from tilewise.cli import kernels as command
from tilewise.op import FLOATS, OPS
from tilewise.verify import baseline, launched, search_space
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel
from tilewise.verify.promises import PROMISES


def groups():
    """By default a few sizes of one dtype on one architecture; others differ in a load's width."""
    yield pytest.param("sm_90", "bfloat16", ["--quick"], id="bfloat16-sm_90-quick")
    for architecture in ARCHITECTURES:
        for dtype in sorted(str(dtype).removeprefix("torch.") for dtype in FLOATS):
            name = f"{dtype}-{architecture}"
            yield pytest.param(architecture, dtype, [], id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture, dtype, words", list(groups()))
def test_kernels_keep_their_promises(architecture, dtype, words, tmp_path, capsys):
    if baseline.committed("triton", architecture) is None:
        pytest.skip(f"{baseline.version('triton')} on {architecture} has no baseline to hold to")
    file = tmp_path / "kernels.json"
    words = ["kernels", "--arch", architecture, "--dtype", dtype, "--json", str(file), *words]
    status = cli.main(words)
    said = capsys.readouterr().out
    rows = json.loads(file.read_text())["kernels"]
    assert {row["op"] for row in rows} >= {op for op in OPS if "triton" in OPS[op].backends}
    assert status == 0, "\n".join(line for line in said.splitlines() if "must" in line)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_baselines_hold_every_kernel(architecture, tmp_path, capsys):
    """A kernel that is not in the baseline is compared with nothing."""
    if baseline.committed("triton", architecture) is None:
        pytest.skip(f"{baseline.version('triton')} on {architecture} has no baseline to hold to")
    file = tmp_path / "kernels.json"
    cli.main(["kernels", "--arch", architecture, "--json", str(file)])
    said = capsys.readouterr().out.splitlines()[-1]
    rows = [Kernel(**strip(row)) for row in json.loads(file.read_text())["kernels"]]
    names = {row.name for row in rows}
    held = {
        name
        for backend in ("triton", "cuda")
        for name in baseline.committed(backend, architecture) or ()
    }
    assert names == held
    assert said.endswith(" 0 not in the baseline")


def strip(row):
    """What a row of the JSON says of its kernel; there a tuple is a list."""
    size = {k: tuple(v) if isinstance(v, list) else v for k, v in row["size"].items()}
    return {k: v for k, v in row.items() if k != "problems"} | {"size": size}


def test_every_promise_is_about_something():
    """A promise that no kernel of its ops could meet is a slip of the pen."""
    for promise in PROMISES:
        assert promise.ops and set(promise.ops) <= set(OPS)
        assert promise.wide or promise.instruction or promise.copy
        assert promise.backend in {b for op in promise.ops for b in OPS[op].backends}


def row(**changes):
    about = {"op": "gelu", "kernel": "_forward_kernel", "backend": "triton", "dtype": "float32"}
    about |= {"architecture": "sm_90", "loop_instructions": 100, "warps": 4}
    return Kernel(**(about | {"cycles": {"tensor": 0.0, "memory": 2.5}} | changes))


def test_a_baseline_is_written_and_read(tmp_path):
    file = tmp_path / "new" / "baseline.json"
    rows = [row(size={"rows": 3, "causal": True}, registers=32, shared=8), row(error="no")]
    baseline.write(rows, file, {"other": [1, 2, 3, 4, 5]})
    assert baseline.read(file) == {
        "gelu _forward_kernel float32 rows=3 causal=True #0": [100, 4, 2.5, 32, 8],
        "other": [1, 2, 3, 4, 5],
    }
    file.write_text("{}")
    with pytest.raises(ValueError, match="baseline: .* must be one of tilewise, got KeyError"):
        baseline.read(file)


def test_an_unknown_compiler_is_reported_and_fails_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    rows = [row(spill_loads=3)]
    assert command.show(rows, None, None) == 0
    said = capsys.readouterr().out
    assert "sm_90 gelu _forward_kernel float32: must not spill, got 3 loads, 0 stores" in said
    assert f"sm_90: no baseline for {baseline.version('triton')}" in said
    assert command.show(rows, {}, None) == 1
    assert "1 promises broken, 1 not in the baseline" in capsys.readouterr().out


def test_update_keeps_what_was_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    command.update([row(), row(op="glu"), row(dtype="bfloat16")], whole=True)
    command.update([row(kernel="_new_kernel")], whole=False)
    assert set(baseline.committed("triton", "sm_90")) == {
        "gelu _new_kernel float32", "gelu _forward_kernel bfloat16", "glu _forward_kernel float32",
    }  # fmt: skip
    assert baseline.committed("triton", "sm_80") is None


def test_committed_baselines_are_small_and_whole():
    files = sorted(baseline.FOLDER.glob("*.json"))
    assert files
    for file in files:
        assert re.fullmatch(r"(triton|nvcc)-[\d.]+-(sm_\d+|gfx942)\.json", file.name)
        assert file.stat().st_size < 300_000
        assert all(
            len(figures) == len(baseline.FIGURES) for figures in baseline.read(file).values()
        )


WRONG = {
    "--arch sm_75": "--arch: must be among sm_80, sm_90, sm_100, sm_120, gfx942 or all, ",
    "--dtype float64": "--dtype: must be float32, float16 or bfloat16, got 'float64'",
    "--dtype int": "--dtype: must be one of ",
    "nonsense": "OP: must be one of ",
    "--json /missing/file": "/missing/file: must be a file in a folder that exists",
    "--baseline /missing": "--baseline: /missing must be one of tilewise, got FileNotFoundError",
    "--baseline /missing --update": "--update: must come without --baseline, got both",
    "--quick --update": "--update: must come without --quick, got both",
    "--prune gelu": "--prune: must be one of ",
    "--prune rms_norm --workload 9": "--workload: must be 0 to 1, got 9",
}


@pytest.mark.parametrize("words, said", WRONG.items(), ids=WRONG)
def test_a_wrong_argument_is_one_line_and_status_2(words, said, capsys):
    assert cli.main(["kernels", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tilewise kernels: {said}")


def test_what_ran_otherwise_is_said():
    ahead = replace(row(), registers=32, shared=1024)
    pair = launched.Pair(ahead, "_forward_kernel", 32, 0, 1024, True)
    assert pair.differences == []
    other = replace(pair, kernel="_other", registers=40, spills=2, shared=0, same_code=False)
    assert other.differences == [
        "kernel must be _forward_kernel, got _other",
        "registers must be 32, got 40",
        "shared must be 1024, got 0",
        "spills must be False, got True",
    ]
    assert launched.summary([pair, other]) == (
        "2 launches, 1 otherwise than compiled ahead of time, 1 the same machine code"
    )


@pytest.mark.skipif(launched.architecture_here() is not None, reason="there is such a GPU")
def test_launched_needs_a_gpu(capsys):
    assert cli.main(["kernels", "--launched"]) == 2
    assert capsys.readouterr().err.startswith("tilewise kernels: --launched: needs a GPU, one of ")


@pytest.mark.skipif(launched.architecture_here() is None, reason="needs a GPU of the report")
def test_what_ran_is_what_was_compiled(capsys):
    assert cli.main(["kernels", "rms_norm", "--launched"]) == 0
    assert "launches, 0 otherwise than compiled ahead of time" in capsys.readouterr().out


def test_prune_says_what_survives(tmp_path, monkeypatch, capsys):
    """A block too wide for its warps spills; the one that is shipped does not."""
    space = {"_backward_wide_kernel": {"BLOCK": (4096, 16384), "num_warps": (8,)}}
    monkeypatch.setattr(search_space, "space_of", lambda op: space if op == "rms_norm" else {})
    file = tmp_path / "prune.json"
    words = ["--prune", "rms_norm", "--dtype", "fp32", "--json", str(file)]
    assert cli.main(["kernels", *words]) == 0
    columns, best, worst, said = capsys.readouterr().out.splitlines()
    assert "BLOCK=4096 num_warps=8\tshipped\t" in best and best.endswith("survives")
    assert "BLOCK=16384 num_warps=8\t\t255\t" in worst and "must not spill, got " in worst
    assert said == "1 of 2 configurations survive"
    assert [row["options"]["BLOCK"] for row in json.loads(file.read_text())] == [4096, 16384]
    assert columns.split("\t")[:3] == ["arch", "kernel", "options"]


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli.main(["kernels"]) == 2
    assert capsys.readouterr().err == "tilewise kernels: needs triton, which is absent\n"


def test_the_page_names_every_field_and_column():
    page = (Path(__file__).parent.parent / "docs" / "kernel_report.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert {field.name for field in fields(Kernel)} <= set(named)
    for column in command.COLUMNS:
        assert f" {column} |" in page or f"`{column}`" in page

"""`tilewise verify`: tests of kernels that are not ours."""

import json

import pytest

from tilewise import cli
from tilewise.cli import verify as verify_command

pytest.importorskip("triton", reason="triton is absent")

KERNEL = """
import pytest, torch, triton, triton.language as tl

rounds = []

@triton.jit
def row_sum(sum_ptr, x_ptr, cols, row_stride, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + col)
    tl.store(sum_ptr + row, tl.sum(tl.where(col < cols, x, 0.0), 0))

@pytest.fixture
def fresh():
    rounds.append(0)
    return len(rounds)

@pytest.mark.parametrize("cols", [64, 50])
def test_row_sum(cols, fresh):
    x = torch.randn(8, 64)[:, :cols]
    total = torch.empty(8)
    row_sum[(8,)](total, x, cols, x.stride(0), BLOCK=64)
    torch.testing.assert_close(total, x.sum(1))

def test_rounds(fresh):
    assert fresh != 4, "the second round"

def test_nothing():
    pass
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_row_sum.py").write_text(KERNEL)
    return "test_row_sum.py"


@pytest.fixture
def tilewise(capsys):
    def run(*words):
        try:
            status = cli.main(["verify", *map(str, words)])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_what_is_found_is_printed_and_the_status_is_1(tilewise, file, tmp_path):
    words = [f"{file}::test_row_sum", "--orders", 3, "--json", tmp_path / "found.json"]
    status, out, err = tilewise(*words)
    assert (status, err) == (1, [])
    assert out[0] == (
        "out of bounds: load of 4 bytes by 14 lanes outside x_ptr, float32 [8, 50], strides (64, 1)"
    )
    assert out[1] == "    test_row_sum.py:9: x = tl.load(x_ptr + row * row_stride + col)"
    assert out[2].startswith("    in row_sum, program (") and out[2].endswith("seen 24 times")
    assert out[-1] == ("6 runs of tests, 6 launches, 1 findings, 0 failed for another reason")
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert [f["times"] for f in found] == [8, 8, 8]
    assert len({tuple(f["program"]) for f in found}) > 1  # three orders


def test_a_test_that_fails_by_itself_is_told_apart(tilewise, file):
    words = [f"{file}::test_row_sum[64]", f"{file}::test_rounds", "--orders", 2]
    status, out, _ = tilewise(*words, "--order", "reverse")
    assert status == 1
    assert out[0] == "test_row_sum.py::test_rounds failed:"
    assert "E   AssertionError: the second round" in out
    assert out[-1] == ("4 runs of tests, 2 launches, 0 findings, 1 failed for another reason")


def test_nothing_found_is_status_0(tilewise, file):
    status, out, err = tilewise(f"{file}::test_row_sum[64]", "--seed", 5)
    assert (status, err) == (0, [])
    assert out == ["1 runs of tests, 1 launches, 0 findings, 0 failed for another reason"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("none.py", "FILE::TEST: must name a file that exists, got 'none.py'"),
        ("{}::test_none", "pytest cannot run these tests: ERROR: not found: "),
        ("{}::test_nothing", "the tests must launch a Triton kernel, got none"),
        ("{} --orders 0", "argument --orders: must be a positive whole number, got '0'"),
        ("{} --order up", "argument --order: invalid choice: 'up'"),
        ("{} --json /missing/file", "/missing/file: must be a file in a folder that exists"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(tilewise, file, words, said):
    status, out, err = tilewise(*words.format(file).split())
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"tilewise verify: {said}")


def test_a_missing_package_is_named(tilewise, file, monkeypatch):
    monkeypatch.setattr(verify_command, "find_spec", lambda name: None)
    assert tilewise(file) == (2, [], ["tilewise verify: needs pytest, which is absent"])


def test_the_line_of_pytest_that_says_most():
    output = "\n\n==== ERRORS ====\nE   ModuleNotFoundError: No module named 'x'\n1 error\n"
    assert verify_command._reason(output) == "ModuleNotFoundError: No module named 'x'"
    assert verify_command._reason("no tests ran in 0.1s\n") == "no tests ran in 0.1s"

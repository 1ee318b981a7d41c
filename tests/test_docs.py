"""The generated pages and tables are those of the declarations."""

import sys
from pathlib import Path

import pytest

from tilewise.op import OPS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import pages  # noqa: E402

GENERATED = pages.generated()


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.name)
def test_is_current(file):
    assert file.read_text() == GENERATED[file], "run `make docs`"


def test_every_op_has_a_page_and_every_page_an_op():
    assert {file.stem for file in (ROOT / "docs" / "ops").glob("*.md")} == set(OPS)


def test_the_table_names_every_op_once():
    lines = pages.support().splitlines()[2:]
    assert [line.split("]")[0].removeprefix("| [") for line in lines] == list(OPS)
    for line, op in zip(lines, OPS.values(), strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:5]]
        assert [cell != "no" for cell in cells] == [name in op.backends for name in pages.BACKENDS]
        assert set(cells) <= {"no", "forward", "forward, backward"}


def test_a_direction_is_only_claimed_with_its_kernel():
    op = OPS["rms_norm"]
    assert pages.directions(op, "numba") == "forward, backward"
    text = (ROOT / "kernels" / "numba" / "rms_norm.py").read_text()
    assert "def rms_norm_backward(" in text
    assert pages.has_gradient(op)


def test_the_python_of_the_readme_runs(capsys):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "chosen" in printed
    assert float(printed.split("tensor(")[1].split(",")[0]) < 1e-5

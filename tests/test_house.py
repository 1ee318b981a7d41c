"""The house rules, as tests: who may import whom, one word per op, no file too long."""

import ast
import subprocess
from pathlib import Path

import pytest

import tilewise  # noqa: F401  (declares the ops)
from tilewise.op import OPS

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True,
)  # fmt: skip
TREE = [ROOT / line for line in LISTED.stdout.splitlines() if (ROOT / line).is_file()]
SOURCES = [
    p for p in TREE
    if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in ("python", "kernels")
]  # fmt: skip
CODE = [p for p in TREE if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")]

# A room may import the rooms below it, never one beside or above it. Within a room files may
# import each other, but for the rooms in APART.
FLOORS = [
    {"_cuda", "linear_loss", "recorder"},
    {"kernels"},
    {"toolchain"},
    {"emulation"},
    {"native", "allocator"},
    {"op", "rng", "scores"},
    {"class_loss"},
    {"rotation"},
    {"lookup"},
    {"choice"},
    {"recording"},
    {"plan_source"},
    {"plan"},
    {"norm", "heads", "sampling"},
    {"ops"},
    {"functional", "nn"},
    {"models"},
    {"verify"},
    {"check"},
    {"clock", "libraries", "machine"},
    {"bench", "report"},
    {"cli"},
    {"__main__"},
]
APART = {"ops"}

FAMILIES = {
    "add_layer_norm": "layer_norm",
    "add_rms_norm": "rms_norm",
    "append_kv_": "attention",
    "attention_decode": "attention",
    "attention_decode_with_lse": "attention",
    "attention_varlen": "attention",
    "attention_varlen_with_lse": "attention",
    "attention_with_lse": "attention",
    "bias_gelu": "gelu",
    "cross_entropy_with_lse": "cross_entropy",
    "filter_logits": "sample",
    "filtered_probs": "sample",
    "glu_packed": "glu",
    "log_softmax": "softmax",
    "sample_with_logprobs": "sample",
    "linear_sample": "sample",
    "multinomial": "sample",
    "top_k": "sample",
    "verify_draft": "sample",
}
ROOMS = {
    "cuda": ["csrc/cuda/{}.cu", "kernels/cuda/{}.py"],
    "triton": ["kernels/triton/{}.py"],
    "numba": ["kernels/numba/{}.py"],
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> list[str]:
    """`kernels/numba/rms_norm.py` -> `tilewise kernels numba rms_norm`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "python" else ("tilewise", *parts)
    return list(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[str]:
    """Everything of ours that `path` imports, as `from a import b` -> `a.b`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [i for i in found if i.startswith("tilewise.")]


def floor(room: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), -1)


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 20
    assert "rms_norm" in OPS


@pytest.mark.parametrize("path", [p for p in SOURCES if len(module(p)) > 1], ids=name)
def test_imports_point_down(path):
    me = module(path)
    for imported in imports(path):
        other = imported.split(".")
        here, there = floor(me[1]), floor(other[1])
        if there < 0:  # `from tilewise import rms_norm`: the library's face
            assert here > floor("ops"), f"{name(path)} may not import {imported}"
        elif me[1] == other[1] == "kernels":  # only shared pieces of the same language
            shared = len(other) > 3 and other[3].startswith("_")
            assert other[2] == me[2] and shared, f"{name(path)} may not import {imported}"
        elif me[1] == other[1]:
            assert me[1] not in APART, f"{name(path)} may not import {imported}"
        else:
            assert there < here, f"{name(path)} may not import {imported}"


def has(room: str) -> bool:
    """Whether the file is there, or a folder of its name that has sources of its kind."""
    path = ROOT / room
    return path.is_file() or any(path.with_suffix("").glob(f"*{path.suffix}"))


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_one_word_in_every_room(op):
    word = FAMILIES.get(op.name, op.name)
    rooms = [
        "python/tilewise/ops/{}.py",
        "tests/properties/test_{}.py",
        *(room for backend in op.backends for room in ROOMS[backend]),
    ]
    missing = [room.format(word) for room in rooms if not has(room.format(word))]
    assert not missing


def test_no_kernel_without_an_op():
    words = {FAMILIES.get(name, name) for name in OPS}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "kernels" and not path.name.startswith("_"):
            assert path.stem in words, name(path)


@pytest.mark.parametrize("path", CODE, ids=name)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_function_is_too_long(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{name(path)}: {node.name} has {lines} lines"


def test_kernels_at_the_root_is_no_package():
    """It would shadow the package of that name which transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_only_one_file_knows_python_and_none_knows_pytorch():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert ("pybind11" in text) == (path.name == "bindings.cpp"), name(path)
        assert not [word for word in ("torch/", "ATen", "c10") if word in text], name(path)

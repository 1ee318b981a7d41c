"""Write what is read from the declarations: docs/ops/<op>.md and the tables of the README.

Run it by `make docs` after an op, its docstring or a result has changed; a test compares.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import tilewise
from tilewise.check import gradient_inputs
from tilewise.op import OPS, Op
from tilewise.report import RESULTS, Kernel, kernels

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cuda", "triton", "numba")
TITLES = {"cuda": "CUDA C++ (GPU)", "triton": "Triton (GPU)", "numba": "Numba (CPU)"}
SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)


def directions(op: Op, backend: str) -> str:
    """What a backend computes: forward, and backward where there is a gradient and a kernel."""
    if backend not in op.backends:
        return "no"
    stem = op.backends[backend].module.removeprefix("tilewise.kernels.").replace(".", "/")
    place = ROOT / "kernels" / stem
    files = place.rglob("*.py") if place.is_dir() else place.parent.glob(f"{place.name}.py")
    names = {
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    backward = has_gradient(op) and any(name.endswith("_backward") for name in names)
    return "forward, backward" if backward else "forward"


def has_gradient(op: Op) -> bool:
    """Whether an output of the reference depends on an input smoothly."""
    tensors, options = op.inputs(**op.sizes[0], device="cpu", dtype=torch.float32)
    outs = op.reference(*tensors, **options)
    first = outs[0] if isinstance(outs, tuple) else outs
    return first.is_floating_point() and bool(gradient_inputs(op, tensors))


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def support() -> str:
    """Op by backend, and which directions."""
    rows = [[f"[{op.name}](docs/ops/{op.name}.md)"] for op in OPS.values()]
    for row, op in zip(rows, OPS.values(), strict=True):
        row += [directions(op, backend) for backend in BACKENDS]
    return table(["op", *TITLES.values()], rows)


def gpu_status() -> str:
    """What has run on a GPU, said as it is."""
    known = kernels(ROOT)
    verified = sum(bool(kernel.verified) for kernel in known)
    timed = sum(bool(kernel.timed) for kernel in known)
    if not verified and not timed:
        return (
            f"No kernel in its present form has run on a GPU yet: of the {len(known)} GPU kernels, "
            "each is compiled ahead of time and tested on a CPU, the Triton ones interpreted, the "
            "CUDA C++ ones emulated.\n"
        )
    return (
        f"Of {len(known)} GPU kernels in their present form, {verified} were verified and "
        f"{timed} timed on a GPU; `tilewise report` names them.\n"
    )


def newest_results() -> list[dict]:
    """The newest results of each device and allocator."""
    newest: dict[tuple[str, str], dict] = {}
    for file in sorted((ROOT / RESULTS).rglob("*.json"), key=lambda path: path.name):
        found = json.loads(file.read_text())
        newest[file.parent.name, found["machine"]["allocator"]] = found
    return list(newest.values())


def fair(row: dict) -> float:
    """The seconds to compare by, as `tilewise bench` does."""
    single = row["device"] == "cpu" and row["threads"] == 1
    return row["host_seconds" if single else "seconds"]


def measured(ops: list[str], every: bool) -> Iterator[str]:
    """Tables of how much faster each op is than PyTorch, of the newest results."""
    for found in newest_results():
        rows = [
            row for row in found["rows"]
            if row["op"] in ops and row["provider"] not in ("reference", "torch")
            and (every or row["provider"] != "torch.compile")
        ]  # fmt: skip
        if not rows:
            continue
        here = found["machine"]
        name = ", ".join(here["gpus"]) if rows[0]["device"] == "cuda" else here["cpu"]
        yield (
            f"{name}, torch {here['versions']['torch']}, allocator: {here['allocator']}, "
            f"commit {here['commit']}, {here['date'][:10]}:\n"
        )
        lines = [
            [
                row["op"], row["direction"], row["dtype"],
                " ".join(f"{key}={value}" for key, value in row["size"].items()),
                str(row["threads"]), row["provider"], f"{fair(row) * 1e3:.3g} ms",
                "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            ]
            for row in rows
        ]  # fmt: skip
        columns = ["op", "direction", "dtype", "size", "threads", "by", "time", "faster"]
        yield table(columns, lines)


def page(op: Op, known: dict[str, Kernel]) -> str:
    """The page of one op."""
    signature = inspect.signature(getattr(tilewise, op.name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    plain = signature.replace(parameters=bare, return_annotation=signature.empty)
    parts = [f"# {op.name}\n", f"`tilewise.{op.name}{plain}`\n", *sections(op)]
    rows = []
    for backend in BACKENDS:
        if backend in op.backends:
            declared = op.backends[backend]
            dtypes = ", ".join(sorted(str(d).removeprefix("torch.") for d in declared.dtypes))
            kernel = known.get(f"{op.name}/{backend}")
            seen = "-" if kernel is None else (kernel.verified or "never")
            timed = "-" if kernel is None else (kernel.timed or "never")
            rows.append([TITLES[backend], directions(op, backend), dtypes, seen, timed])
    columns = ["backend", "directions", "dtypes", "verified on a GPU", "timed on a GPU"]
    parts += ["## Backends\n", table(columns, rows)]
    parts.append("What none of them can take runs as the reference, in plain PyTorch.\n")
    if tables := list(measured([op.name], every=True)):
        parts += ["## Measured\n", *tables]
    return "\n".join(parts)


def sections(op: Op) -> Iterator[str]:
    """The docstring as Markdown."""
    body, *rest = SECTION.split(inspect.getdoc(getattr(tilewise, op.name)) or "")
    yield body.strip() + "\n"
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        items = re.split(r"\n(?=\S)", inspect.cleandoc(text))
        yield f"## {title}\n"
        if title == "Returns":
            yield joined(" ".join(items)) + "\n"
        else:
            pairs = [item.partition(":") for item in items]
            yield "\n".join(f"- `{name.strip()}`: {joined(said)}" for name, _, said in pairs) + "\n"


def joined(text: str) -> str:
    return " ".join(text.split())


def readme(text: str) -> str:
    """The README with its generated parts made anew."""
    parts = {"support": support(), "gpu": gpu_status()}
    tables = "\n".join(measured(list(OPS), every=False))
    parts["measured"] = tables or "Nothing is measured yet.\n"
    for name, new in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + new + end + rest.partition(end)[2]
    return text


def generated() -> dict[Path, str]:
    """Every generated file, by its path."""
    known = {kernel.name: kernel for kernel in kernels(ROOT)}
    pages = {ROOT / "docs" / "ops" / f"{op.name}.md": page(op, known) for op in OPS.values()}
    return pages | {ROOT / "README.md": readme((ROOT / "README.md").read_text())}


def main() -> None:
    """Write what has changed, and remove the pages of ops that are gone."""
    files = generated()
    for file, text in files.items():
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            print(f"wrote {file.relative_to(ROOT)}")
    for file in (ROOT / "docs" / "ops").glob("*.md"):
        if file not in files:
            file.unlink()
            print(f"removed {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

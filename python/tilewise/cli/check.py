"""`tilewise check`: hold every op, backend, dtype and size to the reference."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tilewise.check import Result, cases, check
from tilewise.cli.arguments import (
    add_case_arguments,
    dtype_name,
    named_backend,
    named_device,
    named_dtype,
    named_ops,
    size_name,
    writable,
    write_json,
)
from tilewise.cli.console import print_table, with_progress
from tilewise.op import Op, Size

Case = tuple[Op, str, torch.dtype, Size]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise check`."""
    add_case_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="only the first size of each op")
    parser.add_argument("--verbose", action="store_true", help="a line for each output")


def run(arguments: Namespace) -> int:
    """Check what was asked for; 1 if anything is wrong."""
    ops = named_ops(arguments.ops)
    backend = named_backend(arguments.backend, ops)
    device, dtype = named_device(arguments.device), named_dtype(arguments.dtype)
    file = writable(arguments.json)
    chosen = list(chosen_cases(ops, backend, dtype, arguments.quick))
    results = [
        r for case in with_progress(chosen, "checking", len(chosen)) for r in one(case, device)
    ]

    if file is not None:
        write_json(file, [result.row() for result in results])
    if arguments.verbose:
        print_table("every output and gradient", *details(results))
    print_table(f"tilewise check on {device}", *summary(results))
    wrong = [result for result in results if not result.ok]
    if wrong:
        print_table("wrong", *details(wrong))
    skipped = sum(bool(result.skipped) for result in results)
    ran = len(results) - skipped
    print(f"{ran} outputs and gradients checked, {len(wrong)} wrong, {skipped} cases skipped")
    return 1 if wrong else 0


def chosen_cases(
    ops: Sequence[Op], backend: str | None, dtype: torch.dtype | None, quick: bool
) -> Iterator[Case]:
    """The declared cases that were asked for."""
    for op in ops:
        for name, kind, size in cases(op):
            if backend in (None, name) and dtype in (None, kind):
                if quick and size is not op.sizes[0]:
                    continue
                yield op, name, kind, size


def one(case: Case, device: str) -> list[Result]:
    """Check a case; a kernel that raises is a wrong one, and the next case still runs."""
    op, backend, dtype, size = case
    try:
        return check(op, backend, dtype, size, device)
    except Exception as error:
        line = (str(error).strip() or "no message").splitlines()[0]
        raised = f"{type(error).__name__}: {line}"
        wrong = Result(op.name, backend, device, dtype_name(dtype), dict(size))
        return [replace(wrong, output=raised, error=float("inf"), ok=False)]


def summary(results: Sequence[Result]) -> tuple[list[str], list[list[object]]]:
    """A line for each op, backend and dtype."""
    columns = ["op", "backend", "dtype", "cases", "worst error / allowed", "wrong", "skipped"]
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.backend, result.dtype), []).append(result)
    rows: list[list[object]] = []
    for (op, backend, dtype), group in groups.items():
        ran = [r for r in group if not r.skipped]
        reasons = dict.fromkeys(r.skipped for r in group if r.skipped)
        skipped = len(group) - len(ran)
        rows.append(
            [
                op, backend, dtype,
                len({tuple(r.size.items()) for r in ran}),
                f"{max(r.ratio for r in ran):.2f}" if ran else "-",
                sum(not r.ok for r in ran),
                f"{skipped}: {'; '.join(reasons)}" if skipped else "0",
            ]
        )  # fmt: skip
    return columns, rows


def details(results: Sequence[Result]) -> tuple[list[str], list[list[object]]]:
    """A line for each result."""
    columns = ["op", "backend", "dtype", "size", "output", "error", "allowed", "verdict"]
    rows: list[list[object]] = []
    for r in results:
        verdict = r.skipped or ("ok" if r.ok else "wrong")
        case = [r.op, r.backend, r.dtype, size_name(r.size), r.output or "-"]
        rows.append([*case, f"{r.error:.2e}", f"{r.allowed:.2e}", verdict])
    return columns, rows

"""`tilewise kernels`: what every GPU kernel compiles to, before any GPU is touched.

Every Triton configuration that the declared sizes launch, and every CUDA C++ kernel, is compiled
for an architecture; docs/kernel_report.md says how to read what is printed, and what the JSON is.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from tilewise.cli import Refusal
from tilewise.cli.arguments import (
    DTYPES,
    named_dtype,
    named_ops,
    size_name,
    writable,
    write_json,
)
from tilewise.cli.console import print_table, with_progress
from tilewise.op import FLOATS, INTERPRETED, OPS, Op, Size
from tilewise.verify import baseline, cuda_kernels, launched, search_space
from tilewise.verify.ahead_of_time import few_sizes, sizes_to_launch
from tilewise.verify.architectures import ARCHITECTURES
from tilewise.verify.kernel import Kernel
from tilewise.verify.kernel_report import Task, plan, processes, report
from tilewise.verify.promises import broken, gone

COLUMNS = ("op", "kernel", "arch", "dtype", "size", "regs", "spills", "shared", "blocks", "limit",
           "matrix", "copies", "loads", "stores", "instr", "cycles", "bound")  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise kernels`."""
    known = ", ".join(ARCHITECTURES)
    parser.add_argument("ops", nargs="*", metavar="OP", help="an op, such as rms_norm (all)")
    parser.add_argument(
        "--arch", default="sm_90", metavar="ARCH", help=f"of {known}, several by commas, or all"
    )
    parser.add_argument("--dtype", help="only this dtype, such as bfloat16")
    parser.add_argument(
        "--quick", action="store_true", help="of the sizes that are checked only the first two"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--baseline", metavar="FILE", help="compare with this instead of what is committed"
    )
    parser.add_argument(
        "--update", action="store_true", help="commit these figures: write the baseline anew"
    )
    parser.add_argument(
        "--prune", metavar="OP", help="which configurations of its search space survive"
    )
    parser.add_argument(
        "--launched", action="store_true",
        help="run the workloads on the GPU here, and compare with what is compiled ahead of time",
    )  # fmt: skip
    parser.add_argument(
        "--workload", type=int, default=0, metavar="N",
        help="of --prune: which of those timed on a GPU, from 0",
    )  # fmt: skip


def run(arguments: Namespace) -> int:
    """Print the report; 1 if a kernel breaks what is promised of it.

    Raises:
        Refusal: If an argument is wrong, or triton is absent.
    """
    architectures = named_architectures(arguments.arch)
    dtype = named_dtype(arguments.dtype)
    if dtype is not None and dtype not in FLOATS:
        raise Refusal(f"--dtype: must be float32, float16 or bfloat16, got {arguments.dtype!r}")
    file = writable(arguments.json)
    if find_spec("triton") is None:
        raise Refusal("needs triton, which is absent")
    if arguments.prune is not None:
        return prune(arguments, architectures, dtype or torch.bfloat16, file)
    ops = [op.name for op in named_ops(arguments.ops)]
    if arguments.launched:
        return run_launched(ops, dtype or torch.bfloat16, file)
    for other in ("baseline", "quick"):
        if arguments.update and getattr(arguments, other):
            raise Refusal(f"--update: must come without --{other}, got both")
    given = given_baseline(arguments.baseline)
    dtypes = sorted(FLOATS, key=str) if dtype is None else [dtype]
    sizes = few_sizes if arguments.quick else sizes_to_launch
    rows = compiled(ops if arguments.ops else [], ops, dtypes, architectures, sizes)
    if arguments.update:
        update(rows, whole=not arguments.ops and dtype is None)
    return show(rows, given, file)


def named_architectures(words: str) -> list[str]:
    """The architectures of these names.

    Raises:
        Refusal: If one is unknown.
    """
    names = list(ARCHITECTURES) if words == "all" else words.split(",")
    for name in names:
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise Refusal(f"--arch: must be among {known} or all, got {name!r}")
    return names


def given_baseline(path: str | None) -> baseline.Figures | None:
    """The figures in the file that was asked for.

    Raises:
        Refusal: If there are none.
    """
    try:
        return None if path is None else baseline.read(Path(path))
    except ValueError as error:
        raise Refusal(f"--{error}") from error


def compiled(
    asked: list[str],
    ops: list[str],
    dtypes: list[torch.dtype],
    architectures: list[str],
    sizes: Callable[[Op], Sequence[Size]],
) -> list[Kernel]:
    """A row for each distinct kernel: Triton's, and where there is an nvcc, those in CUDA C++."""
    if lacks := cuda_kernels.missing():
        print(f"CUDA C++ kernels are left out: needs {lacks}")
    files = cuda_kernels.tasks(asked, architectures)
    wanted = {str(dtype).removeprefix("torch.") for dtype in dtypes} | {""}
    # nvcc is a program of its own, and runs beside: few long tasks at the end would be waited for.
    with processes() as pool, ThreadPoolExecutor(1) as beside:
        compiling = beside.map(lambda task: cuda_kernels.kernels_of(task, wanted), files)
        tasks = plan(pool, ops, dtypes, architectures, sizes)
        rows = dict(with_progress(report(pool, tasks), "compiling", len(tasks)))
        cuda = list(with_progress(compiling, "nvcc", len(files)))
    found = [rows[place] for place in range(len(tasks))]
    return found + [kernel for each in cuda for kernel in each]


def update(rows: Sequence[Kernel], whole: bool) -> None:
    """Write the committed figures of these kernels; keep those of others unless all were here."""
    for backend in ("triton", "cuda"):
        for architecture in ARCHITECTURES:
            mine = [k for k in rows if (k.backend, k.architecture) == (backend, architecture)]
            if not mine:
                continue
            file = baseline.file_of(backend, architecture)
            others = {} if whole or not file.exists() else baseline.read(file)
            made = {(k.op, k.dtype) for k in mine}
            kept = {name: figures for name, figures in others.items() if _whose(name) not in made}
            baseline.write(mine, file, kept)
            print(f"wrote {file}")


def _whose(name: str) -> tuple[str, str]:
    """The op and the dtype of a kernel in a baseline."""
    words = name.split()
    return words[0], next((word for word in words if word in DTYPES), "")


def show(rows: Sequence[Kernel], given: baseline.Figures | None, file: Path | None) -> int:
    """Print the rows and what is wrong with them."""
    known = {
        key: baseline.committed(*key) if given is None else given
        for key in {(k.backend, k.architecture) for k in rows}
    }
    problems: dict[int, list[str]] = {}
    for place, kernel in enumerate(rows):
        figures = known[kernel.backend, kernel.architecture]
        growth = grown(kernel, figures)
        problems[place] = broken(kernel) + ([growth] if growth else [])
    if file is not None:
        versions = {backend: baseline.version(backend) for backend in ("triton", "cuda")}
        listed = [asdict(k) | {"problems": problems[i]} for i, k in enumerate(rows)]
        write_json(file, {"schema": 1, "compilers": versions, "kernels": listed})
    print_table("kernels, ahead of time", COLUMNS, [line(kernel) for kernel in rows])
    failed = 0
    for place, kernel in enumerate(rows):
        counts = known[kernel.backend, kernel.architecture] is not None
        for problem in problems[place]:
            failed += counts
            print(f"{kernel.architecture} {kernel.name}: {problem}")
    for missing in gone(rows):
        failed += any(figures is not None for figures in known.values())
        print(missing)
    for (backend, architecture), figures in sorted(known.items()):
        if figures is None:
            version = baseline.version(backend)
            print(f"{architecture}: no baseline for {version}: its kernels are reported, no more")
    new = sum(
        (figures := known[k.backend, k.architecture]) is not None and k.name not in figures
        for k in rows
        if not k.error
    )
    print(f"{len(rows)} kernels, {failed} promises broken, {new} not in the baseline")
    return 1 if failed else 0


def grown(kernel: Kernel, figures: baseline.Figures | None) -> str | None:
    """What is worse than a baseline allows, if there is one."""
    return None if figures is None else baseline.grown(kernel, figures)


def line(kernel: Kernel) -> tuple[object, ...]:
    """A kernel as a row of the table."""
    if kernel.error:
        return (*head(kernel), *["-"] * (len(COLUMNS) - 5))
    return (
        *head(kernel),
        kernel.registers,
        kernel.spill_loads + kernel.spill_stores,
        kernel.shared,
        f"{kernel.blocks} ({kernel.occupancy:.0%})" if kernel.limit else "-",
        kernel.limit or "-",
        *(
            " ".join(f"{name}:{number}" for name, number in found.items()) or "-"
            for found in (kernel.matrix, kernel.bulk, kernel.loads, kernel.stores)
        ),
        f"{kernel.loop_instructions}" + ("" if kernel.loop else " (no loop)"),
        f"{kernel.cycles[kernel.bound]:.0f}" if kernel.bound else "-",
        kernel.bound or "-",
    )


def head(kernel: Kernel) -> tuple[object, ...]:
    """What names a kernel."""
    dtype, size = kernel.dtype or "-", size_name(kernel.size) or "-"
    return kernel.op, kernel.kernel, kernel.architecture, dtype, size


def run_launched(ops: Sequence[str], dtype: torch.dtype, file: Path | None) -> int:
    """Launch the workloads of these ops, and print what ran otherwise than compiled ahead of time.

    Raises:
        Refusal: Without a GPU that the report knows, or where Triton interprets.
    """
    architecture = launched.architecture_here()
    if architecture is None:
        raise Refusal(f"--launched: needs a GPU, one of {', '.join(ARCHITECTURES)}, got none")
    if INTERPRETED:
        raise Refusal("--launched: TRITON_INTERPRET must be off, got on")
    pairs: list[launched.Pair] = []
    for name in with_progress(ops, "launching", len(ops)):
        if "triton" in OPS[name].backends and dtype in OPS[name].backends["triton"].dtypes:
            for size in OPS[name].timed_on("cuda"):
                pairs += launched.launch_and_compile(OPS[name], dtype, size, architecture)
    rows = [
        (p.ahead.name, p.registers, p.ahead.registers, p.spills, p.ahead.spill_loads, p.shared,
         p.ahead.shared, "yes" if p.same_code else "no", "; ".join(p.differences) or "-")
        for p in pairs
    ]  # fmt: skip
    columns = ("kernel", "regs", "ahead", "spills", "ahead", "shared", "ahead", "same code", "")
    print_table(f"launched on {architecture}, and ahead of time", columns, rows)
    print(launched.summary(pairs))
    if file is not None:
        listed = [asdict(pair) | {"differences": pair.differences} for pair in pairs]
        write_json(file, {"schema": 1, "architecture": architecture, "launches": listed})
    return 1 if any(pair.differences for pair in pairs) else 0


def prune(
    arguments: Namespace, architectures: list[str], dtype: torch.dtype, file: Path | None
) -> int:
    """Print which combinations of options survive, the most promising first, and why others do not.

    Raises:
        Refusal: If the op has no search space, or no such workload.
    """
    op = arguments.prune
    able = search_space.ops_to_prune()
    if op not in able:
        raise Refusal(f"--prune: must be one of {', '.join(able)}, got {op!r}")
    workloads = len(OPS[op].timed_on("cuda"))
    if not 0 <= arguments.workload < workloads:
        raise Refusal(f"--workload: must be 0 to {workloads - 1}, got {arguments.workload}")
    found = []
    with processes() as pool:
        for architecture in architectures:
            tasks = search_space.candidates(pool, op, dtype, architecture, arguments.workload)
            found += list(with_progress(search_space.prune(pool, tasks), architecture, len(tasks)))
    found.sort(key=lambda each: (each[0].architecture, each[0].kernel, *_rank(*each)))
    rows = []
    for task, kernel, reason in found:
        options = " ".join(f"{name}={value}" for name, value in task.instead.items())
        shipped = "shipped" if search_space.is_shipped(task) else ""
        blocks, spills = f"{kernel.blocks} ({kernel.occupancy:.0%})", kernel.spill_loads
        figures = (kernel.registers, spills + kernel.spill_stores, kernel.shared, blocks)
        busy = f"{search_space.merit(kernel):.0%}"
        rows.append((task.architecture, task.kernel, options, shipped, *figures,
                     kernel.bound or "-", busy, reason or "survives"))  # fmt: skip
    columns = ("arch", "kernel", "options", "", "regs", "spills", "shared", "blocks", "bound",
               "busy", "")  # fmt: skip
    print_table(f"search space of {op}", columns, rows)
    left = sum(not reason for _, _, reason in found)
    print(f"{left} of {len(found)} configurations survive")
    if file is not None:
        write_json(file, [asdict(kernel) | {"options": dict(task.instead), "reason": reason}
                          for task, kernel, reason in found])  # fmt: skip
    return 0


def _rank(task: Task, kernel: Kernel, reason: str) -> tuple[object, ...]:
    """Survivors first; of these the busiest, and of those alike the one with the most warps."""
    busy = -search_space.merit(kernel)
    return bool(reason), busy, -kernel.occupancy, *task.instead.values()

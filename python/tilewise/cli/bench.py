"""`tilewise bench`: time every backend beside PyTorch."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise import bench, machine, tune_allocator
from tilewise.bench import Report, Row, Untimed
from tilewise.cli import Refusal
from tilewise.cli.arguments import (
    add_case_arguments,
    named_backend,
    named_device,
    named_dtype,
    named_ops,
    positive,
    size_name,
    writable,
    write_json,
)
from tilewise.cli.console import print_table, with_progress
from tilewise.report import RESULTS, sources_root

QUICK_SECONDS = 0.1  # for each provider, where 0.5 is the rule


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise bench`."""
    add_case_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios there, as PNG")
    parser.add_argument(
        "--threads", metavar="N", type=positive, nargs="+",
        help="with how many threads, in turn (on a CPU: all, then 1)",
    )  # fmt: skip
    parser.add_argument("--budget", metavar="SECONDS", type=positive, help="drop what takes longer")
    parser.add_argument(
        "--save", action="store_true", help="write the results to benchmarks/results/ of a checkout"
    )
    parser.add_argument(
        "--tuned-allocator", action="store_true", help="call tilewise.tune_allocator() first"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="the first workload of each op, with all threads, without torch.compile",
    )  # fmt: skip


def run(arguments: Namespace) -> int:
    """Time what was asked for; always 0, for a slow kernel is a result too."""
    ops = named_ops(arguments.ops)
    backend = named_backend(arguments.backend, ops)
    device, dtype = named_device(arguments.device), named_dtype(arguments.dtype)
    file, picture = writable(arguments.json), writable(arguments.plot)
    threads = arguments.threads or default_threads(device, arguments.quick)
    chosen = bench.works(ops, device, dtype, arguments.quick)
    here = machine.describe()
    if arguments.tuned_allocator:
        here["allocator"] += ", tuned" if tune_allocator() else ", as it is: no glibc"
    if arguments.save:
        file = saved(device, here)
    steps = bench.run(
        chosen, device, threads, backend=backend, compiled=not arguments.quick,
        seconds_each=QUICK_SECONDS if arguments.quick else 0.5, budget=arguments.budget,
    )  # fmt: skip
    report = Report()
    for report in with_progress(steps, "timing", len(chosen)):
        if file is not None:  # after each, so that an interrupted run has measured something
            write_json(file, report.as_json(here))
    show(report, f"tilewise bench on {machine.device_name(device)}")
    if picture is not None:
        plot(report.rows, picture)
    return 0


def saved(device: str, here: Mapping[str, Any]) -> Path:
    """Where the results of this commit on this device are kept.

    Raises:
        Refusal: Away from a checkout, or if they are there already: results are never edited.
    """
    root = sources_root()
    if root is None:
        raise Refusal("--save: must be in a checkout of tilewise, got none")
    tuned = "-tuned" if here["allocator"].endswith("tuned") else ""
    name = f"{here['date'][:10]}-{here['commit']}{tuned}.json"
    file = root / RESULTS / machine.device_name(device) / name
    if file.exists():
        raise Refusal(f"--save: must be a new file, got {file}, and results are never edited")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def default_threads(device: str, quick: bool) -> list[int]:
    """All threads, and on a CPU one as well: nothing disturbs the time of a single thread."""
    every = torch.get_num_threads()
    return [every] if quick or device == "cuda" or every == 1 else [every, 1]


def show(report: Report, title: str) -> None:
    """Print what was timed, what was not, and what was dropped."""
    columns = [
        "op", "direction", "dtype", "size", "provider", "threads", "time", "p10 - p90",
        "host", "rate", "of roof", "ratio", "error", "peak memory",
    ]  # fmt: skip
    print_table(title, columns, [line(row, report) for row in report.rows])
    show_reasons("not timed", report.untimed)
    show_reasons("timed, but outside the rule of `tilewise check`", report.inexact)
    for roof in report.roofs:
        print(
            f"roof, {roof.dtype}, threads {roof.threads}: copy "
            f"{roof.copy_bytes_per_second / 1e9:.1f} GB/s, matrix product "
            f"{flop_rate(roof.matmul_flops_per_second)}"
        )
    for work in report.dropped:
        print(f"dropped to keep the budget: {work}")


def show_reasons(title: str, items: Sequence[Untimed]) -> None:
    """Print each different reason once."""
    columns = ["op", "direction", "dtype", "size", "provider", "threads", title]
    rows = {
        (u.op, u.direction, u.dtype, size_name(u.size), u.provider, u.threads, u.reason): None
        for u in items
    }
    if rows:
        print_table(title, columns, list(rows))


def line(row: Row, report: Report) -> list[str]:
    """A row of the table."""
    roof = report.roof(row.device, row.threads, getattr(torch, row.dtype))
    share = roof.share(row.fair_seconds, row.bytes, row.flops)
    return [
        row.op,
        row.direction,
        row.dtype,
        size_name(row.size),
        row.provider,
        str(row.threads),
        duration(row.seconds),
        f"{duration(row.p10)} - {duration(row.p90)}",
        duration(row.host_seconds),
        rate(row),
        "-" if share is None else f"{share:.0%}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.error:.1e}",
        f"{row.peak_bytes / 2**20:.1f} MiB",
    ]


def rate(row: Row) -> str:
    """Flops a second where a matrix product is what counts, else GB/s."""
    if row.flops:
        return flop_rate(row.flops / row.fair_seconds)
    return f"{row.bytes / row.fair_seconds / 1e9:.1f} GB/s" if row.bytes else "-"


def flop_rate(flops_per_second: float) -> str:
    """Flops a second in the unit that suits them."""
    if flops_per_second < 1e12:
        return f"{flops_per_second / 1e9:.0f} GFLOP/s"
    return f"{flops_per_second / 1e12:.1f} TFLOP/s"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw how many times faster than PyTorch each provider is, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.ratio is not None and row.provider != "reference"]
    labels = [
        f"{r.op} {r.direction} {r.dtype} {size_name(r.size)}, {r.provider}, {r.threads} threads"
        for r in shown
    ]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.22 * len(shown)), layout="constrained")
    draw_ratios(axes, labels, [row.ratio or 0.0 for row in shown], [r.provider for r in shown])
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def draw_ratios(
    axes: Any, labels: Sequence[str], ratios: Sequence[float], names: Sequence[str]
) -> None:
    """Draw one bar each on `axes`, to the right what is faster; a provider has one colour."""
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(names))}
    lengths = [ratio - 1.0 for ratio in ratios]
    axes.barh(labels, lengths, left=1.0, color=[colours[name] for name in names])
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.set_xlabel("times faster than PyTorch (1 = as fast)")

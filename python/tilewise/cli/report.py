"""`tilewise report`: which kernels were verified and timed on a GPU."""

from argparse import ArgumentParser, Namespace

import tilewise  # noqa: F401  (declares the ops)
from tilewise.cli import Refusal
from tilewise.cli.arguments import writable, write_json
from tilewise.cli.console import print_table
from tilewise.report import RESULTS, kernels, sources_root


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise report`."""
    parser.add_argument(
        "--pending", action="store_true",
        help="only kernels whose present source was never verified or never timed",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the list there")


def run(arguments: Namespace) -> int:
    """Print each kernel with the committed results that hold for its present source.

    Raises:
        Refusal: Away from the sources.
    """
    root = sources_root()
    if root is None:
        raise Refusal("needs the sources: run it in a checkout of tilewise")
    file = writable(arguments.json)
    every = kernels(root)
    shown = [kernel for kernel in every if kernel.pending or not arguments.pending]
    if file is not None:
        names = ("name", "hash", "verified", "timed", "pending")
        write_json(file, [{name: getattr(kernel, name) for name in names} for kernel in shown])
    rows = [(k.name, k.hash[:12], k.verified or "never", k.timed or "never") for k in shown]
    if rows:
        print_table("kernels on a GPU", ["kernel", "source", "verified", "timed"], rows)
    pending = sum(kernel.pending for kernel in every)
    print(f"{pending} of {len(every)} kernels have no result for their source in {RESULTS}")
    return 0

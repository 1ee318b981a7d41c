"""The command `tilewise`: one module a subcommand, each with `add_arguments` and `run`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

COMMANDS = {
    "info": "versions, devices, and which backend serves each op here",
    "check": "hold every op, backend, dtype and size to the reference",
    "bench": "time every backend beside PyTorch",
    "report": "which kernels were verified and timed on a GPU",
    "kernels": "what every GPU kernel compiles to, without a GPU",
    "build": "compile the CUDA kernels and warm the caches",
    "train": "train a decoder on text",
    "generate": "continue a prompt with a trained decoder",
    "demo": "see it all work",
    "verify": "run tests of any Triton kernel under the sanitizer",
}


class Refusal(Exception):
    """What a command says, in one line and with exit status 2, when it cannot do what was asked."""


class _Parser(argparse.ArgumentParser):
    """One line for a wrong argument, as for everything else that cannot be done."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    parser = _Parser(prog="tilewise", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    argv = list(sys.argv[1:] if arguments is None else arguments)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv:  # only the one that runs is imported
            try:
                modules[name] = import_module(f"tilewise.cli.{name}")
            except ModuleNotFoundError as missing:  # installed without its dependencies
                print(f"tilewise {name}: needs {missing.name}, which is absent", file=sys.stderr)
                return 2
            modules[name].add_arguments(command)
    parsed = parser.parse_args(argv)
    try:
        status: int = modules[parsed.command].run(parsed)
    except Refusal as refusal:
        print(f"tilewise {parsed.command}: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(f"tilewise {parsed.command}: interrupted", file=sys.stderr)
        return 130
    return status

"""`tilewise info`: what is here, which backend serves each op, and why each other does not."""

import json
from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from tilewise import machine, native
from tilewise.choice import explain
from tilewise.cli.arguments import named_device, named_ops, writable, write_json
from tilewise.cli.console import print_table


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise info`."""
    parser.add_argument("--device", help="choose for this device (cuda where there is one)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="as JSON, to a file or as the output"
    )


def run(arguments: Namespace) -> int:
    """Print what is here."""
    device = named_device(arguments.device)
    file = writable(None if arguments.json == "-" else arguments.json)
    found = information(device)
    if file is not None:
        write_json(file, found)
    elif arguments.json is not None:
        print(json.dumps(found, indent=1))
    if arguments.json is not None:
        return 0
    facts = {**found["machine"], **found["machine"]["versions"]}
    del facts["versions"]
    print_table("this machine", ["what", "is"], [(k, _plain(v)) for k, v in facts.items()])
    rows = [
        (op, backend, "serves" if sentence == "chosen" else sentence)
        for op, answer in found["ops"].items()
        for backend, sentence in answer.items()
    ]
    print_table(f"for a tensor on {device}", ["op", "backend", "here"], rows)
    return 0


def information(device: str) -> dict[str, Any]:
    """The machine, and for each op what `tilewise.explain` says of its first size in float32."""
    ops = {}
    for op in named_ops([]):
        tensors, options = op.inputs(**op.sizes[0], device=device, dtype=torch.float32)
        ops[op.name] = explain(op.name, *tensors, **options)
    here = machine.describe() | {"cuda_kernels": cuda_kernels(), "thread_pool": thread_pool()}
    return {"machine": here, "device": device, "ops": ops}


def cuda_kernels() -> str:
    """Whether the CUDA C++ kernels are built, or could be."""
    if native.is_built():
        return "built"
    return "not built, run `tilewise build`" if native.can_build() else "not built"


def thread_pool() -> str:
    """Which OpenMP runtime, if any, PyTorch and the kernels share the threads of."""
    for line in torch.__config__.parallel_info().splitlines():
        if "OpenMP" in line and line.strip().startswith("OpenMP"):
            return line.strip()
    return "none"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)

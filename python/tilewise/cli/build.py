"""`tilewise build`: compile the CUDA kernels and fill the caches, so that no first call waits."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch

from tilewise import native
from tilewise.check import outputs_and_grads
from tilewise.choice import refusal
from tilewise.cli.arguments import dtype_name, named_ops
from tilewise.cli.console import with_progress
from tilewise.op import Op, stand_in


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise build`."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="an op whose cache to fill (all)")
    parser.add_argument("--force", action="store_true", help="compile even what is built already")
    parser.add_argument("--only-cuda", action="store_true", help="leave the caches as they are")


def run(arguments: Namespace) -> int:
    """Build what can be built here, and say what was done; 1 if the compiler failed."""
    ops = named_ops(arguments.ops)
    status = build_cuda(arguments.force)
    if arguments.only_cuda:
        return status
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for place in dict.fromkeys(("cpu", device)):
        for op in with_progress(ops, f"filling the caches on {place}", len(ops)):
            for line in warm(op, place):
                print(line, flush=True)
    return status


def build_cuda(force: bool) -> int:
    """Compile the CUDA kernels where there is a compiler."""
    if native.is_built() and not force:
        print("CUDA kernels: built already")
        return 0
    if lacks := native.missing():
        print(f"CUDA kernels: not built, needs {lacks}")
        return 0
    begun = time.monotonic()
    try:
        module = native.build(force=force)
    except RuntimeError as error:
        print(f"CUDA kernels: {error}")
        return 1
    print(f"CUDA kernels: {module}, in {time.monotonic() - begun:.0f} s")
    return 0


def warm(op: Op, device: str) -> Iterator[str]:
    """Run the first size of `op` on each backend of `device` in each dtype; say how long it took.

    That compiles its kernels, or finds them in the cache.
    """
    for name, backend in op.backends.items():
        if device not in backend.devices or stand_in(name):
            continue
        dtypes, begun = sorted(backend.dtypes, key=dtype_name), time.monotonic()
        done = []
        for dtype in dtypes:
            tensors, options = op.inputs(**op.sizes[0], device=device, dtype=dtype)
            if refused := refusal(backend, *tensors, **options):
                yield f"{op.name}/{name} {dtype_name(dtype)}: {refused[1]}"
                continue
            outputs_and_grads(op, op.call, tensors, options | {"backend": name})
            done.append(dtype_name(dtype))
        if done:
            yield f"{op.name}/{name}: {', '.join(done)} in {time.monotonic() - begun:.1f} s"

"""Every op, every backend, every dtype and size: read from the declarations, never by hand."""

from functools import partial

import pytest
import torch

import tilewise  # noqa: F401  (declares the ops)
from tilewise import native
from tilewise.check import cases, gradient_inputs
from tilewise.choice import refusal
from tilewise.op import INTERPRETED, OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def label(op, backend, dtype, size):
    shape = ",".join(f"{name}={value}" for name, value in size.items())
    return f"{op.name}-{backend}-{dtype}-{shape}".replace("torch.", "")


# `make test` has a dtype of each kind at every size, the others, which are read and written by the
# same lines but for a width, at an op's first; and what is said of a kernel and not of its numbers
# at the first as well. `make check` has all.
FIRST_SIZES = 3
MAIN_DTYPES = torch.float32, torch.bfloat16

# What stands in for another machine's: of the cases of a test marked `thinned(n)` every n-th such
# one is in `make test`, all in `make check`.
STAND_INS = {"triton"} if INTERPRETED else set()
if native.EMULATED:
    STAND_INS.add("cuda")


def unless(quick):
    return () if quick else pytest.mark.slow


def own_backend(op):
    """The first that is itself here: others take many times as long."""
    return next((b for b in op.backends if b not in STAND_INS), next(iter(op.backends)))


def interpreted(backend):
    return backend == "triton" and INTERPRETED


CASES = [
    pytest.param(
        op, backend, dtype, size, id=label(op, backend, dtype, size),
        marks=unless(dtype in MAIN_DTYPES or size is op.sizes[0]),
    )
    for op in OPS.values()
    for backend, dtype, size in cases(op)
]  # fmt: skip
BACKENDS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS.values()
    for backend in op.backends
]


def case_or_skip(op, backend, dtype=None, size=None):
    """The op, its reference, and tensors for both; or skip aloud, so that no case just vanishes.
    Without a dtype it is fp32, or bf16 where the backend has no other."""
    torch.manual_seed(0)
    size = op.sizes[0] if size is None else size
    if dtype is None:
        dtype = next(t for t in MAIN_DTYPES if t in op.backends[backend].dtypes)
    tensors, options = op.inputs(**size, device=DEVICE, dtype=dtype)
    if refused := refusal(op.backends[backend], *tensors, **options):
        pytest.skip(f"{backend}: {refused[1]}")
    return partial(op.call, **options, backend=backend), partial(op.reference, **options), tensors


def differentiable_or_skip(op, tensors):
    """The positions with a gradient; or skip aloud."""
    wanted = gradient_inputs(op, tensors)
    outs = op.reference(*tensors, **op.inputs(**op.sizes[0], device=DEVICE, dtype=torch.float32)[1])
    if not wanted or not (outs[0] if isinstance(outs, tuple) else outs).is_floating_point():
        pytest.skip(f"{op.name}: has no gradient")
    return wanted


def leaves(op, tensors):
    """Fresh copies, those with a gradient asking for it."""
    wanted = gradient_inputs(op, tensors)
    return [
        t if t is None else t.detach().clone().requires_grad_(i in wanted)
        for i, t in enumerate(tensors)
    ]


def as_list(outs):
    return list(outs) if isinstance(outs, tuple) else [outs]

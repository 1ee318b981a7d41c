"""Rows of 262144 columns, as no other test of these ops has them. Norms: see test_norm_edges."""

import pytest
import torch
from cases import BACKENDS, DEVICE, unless

from tilewise.check import check

COLS = 1 << 18
EMBEDDED = {"batch": 1, "seq": 2, "vocab": 3, "cols": COLS, "positions": 2, "segments": 2}
WIDE = {
    "softmax": {"rows": 2, "cols": COLS},
    "log_softmax": {"rows": 2, "cols": COLS},
    "cross_entropy": {"rows": 2, "classes": COLS},
    "gelu": {"rows": 2, "cols": COLS},
    "bias_gelu": {"rows": 2, "cols": COLS, "dropout_p": 0.1, "seed": 7},
    "glu": {"rows": 2, "cols": COLS},
    "glu_packed": {"rows": 2, "cols": COLS},
    "dropout_add": {"rows": 2, "cols": COLS},
    "embed": EMBEDDED | {"dropout": 0.1},
}
INTERPRETED_FAST = ("softmax", "log_softmax", "cross_entropy")
CASES = [
    pytest.param(
        op, backend, id=f"{op.name}-{backend}",
        marks=unless(backend == "numba" or (backend == "triton" and op.name in INTERPRETED_FAST)),
    )
    for op, backend in (p.values for p in BACKENDS)
    if op.name in WIDE
]  # fmt: skip
EMBEDS = [
    pytest.param(*p.values, id=p.id, marks=unless(p.values[1] == "numba"))
    for p in BACKENDS
    if p.values[0].name == "embed"
]


def held(op, backend, size):
    """Hold outputs and gradients to the rule."""
    results = check(op, backend, torch.float32, size, DEVICE)
    if results[0].skipped:
        pytest.skip(f"{backend}: {results[0].skipped}")
    assert all(r.ok for r in results), [(r.output, r.error, r.allowed) for r in results]


@pytest.mark.parametrize("op, backend", CASES)
def test_262144_columns(op, backend):
    held(op, backend, WIDE[op.name])


@pytest.mark.parametrize("op, backend", EMBEDS)
def test_262144_normalised_columns(op, backend):
    held(op, backend, EMBEDDED | {"norm": "like x"})

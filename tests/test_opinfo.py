"""`tilewise.functional` on the samples that PyTorch tests its own functions with."""

import warnings
from functools import cache

import pytest
import torch
from cases import DEVICE, unless
from test_functional import as_double

from tilewise import functional
from tilewise.check import NUDGES, compare, nudged


@cache
def entries():
    """PyTorch's own list, which takes seconds to import, and a package of its own."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def called(function, sample, change=lambda t: t):
    """The value and the gradients, the floating-point tensors of the sample changed before."""

    def changed(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return change(value.detach()).requires_grad_(value.requires_grad)

    inputs = [changed(t) for t in (sample.input, *sample.args)]
    options = {k: changed(v) for k, v in sample.kwargs.items()}
    torch.manual_seed(42)  # as what PyTorch runs the samples with that drop out
    out = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    given = [t for t in (*inputs, *options.values()) if isinstance(t, torch.Tensor)]
    wanted = [t for t in given if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, cotangent, materialize_grads=True)
    return [out.detach(), *grads]


def assert_is_that_of_torch(function, theirs, sample):
    mine, plain = called(function, sample), called(theirs, sample)
    assert [(t.dtype, t.shape) for t in mine] == [(t.dtype, t.shape) for t in plain]
    if sample.kwargs.get("dropout_p"):  # ours drops others
        return
    truth = called(theirs, sample, as_double)
    yardsticks = [plain, *(called(theirs, sample, nudged) for _ in range(NUDGES))]
    for i, (got, true) in enumerate(zip(mine, truth, strict=True)):
        error, allowed = compare(got, [run[i] for run in yardsticks], true)
        # Some samples of attention have scores of 200, and some of softmax ask for fp64, than which
        # nothing is more exact: there PyTorch's own measure must do.
        if function is functional.scaled_dot_product_attention or got.dtype == torch.float64:
            assert error <= allowed or not torch.testing.assert_close(got, plain[i])
        else:
            assert error <= allowed


def rounds_its_logits(sample, dtype):
    """Ours are of the dtype of the input; PyTorch has an option to sum them up in another."""
    return dtype == torch.float32 or sample.kwargs.get("options") is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=unless(name != "linear_cross_entropy"))  # 371 samples
        for name in functional.__all__
    ],
)
def test_samples(name, dtype):
    found = [e for e in entries() if e.name in (name, f"nn.functional.{name}")]
    if not found:
        pytest.skip(f"{name}: this PyTorch has no samples of it")
    ours = getattr(functional, name)
    if name == "embedding":  # samples begin with the table
        ours = lambda weight, ids, **options: functional.embedding(ids, weight, **options)  # noqa: E731
    torch.manual_seed(0)
    every = [
        (entry.op, sample)
        for entry in found
        for sample in entry.sample_inputs(DEVICE, dtype, requires_grad=True)
    ]
    samples = [pair for pair in every if rounds_its_logits(pair[1], dtype)]
    assert samples
    if left := len(every) - len(samples):
        warnings.warn(f"{name}: {left} of {len(every)} samples sum in another dtype", stacklevel=1)
    for theirs, sample in samples:
        try:
            assert_is_that_of_torch(ours, theirs, sample)
        except AssertionError as error:
            raise AssertionError(sample.summary()) from error

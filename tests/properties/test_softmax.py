"""Softmax and log_softmax: what equality with the reference cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise
from tilewise.check import compare

INF, NAN = float("inf"), float("nan")
MINE = [p for p in BACKENDS if p.values[0].name in ("softmax", "log_softmax")]
WIDTHS = [64, 8200]  # the second is wider than a block of a GPU's registers


def wholes(op, y):
    """Probabilities, whichever of the two gave `y`."""
    return y.exp() if op.name == "log_softmax" else y


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_rows_sum_to_one(op, backend, cols):
    case_or_skip(op, backend)
    x = 5 * torch.randn(4, cols, device=DEVICE)
    p = wholes(op, op.call(x, backend=backend))
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4, device=DEVICE))


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_a_shift_changes_nothing_and_does_not_overflow(op, backend, cols):
    case_or_skip(op, backend)
    x = torch.randint(-8, 8, (4, cols), device=DEVICE).float()  # which the shifts leave exact
    y = op.call(x, backend=backend)
    for shift in (-(2.0**20), 2.0**20):
        assert torch.equal(op.call(x + shift, backend=backend), y)


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_gradients_of_a_row_sum_to_zero(op, backend, cols):
    case_or_skip(op, backend)
    x = torch.randn(4, cols, device=DEVICE).requires_grad_()
    weights = torch.linspace(-1, 2, cols, device=DEVICE)
    (dx,) = torch.autograd.grad((op.call(x, scale=0.5, backend=backend) * weights).sum(), x)
    assert dx.abs().max() > 0
    assert dx.sum(-1).abs().max() < 1e-5 * weights.abs().sum()


@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0])
@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_rows_that_are_not_finite_are_those_of_torch(op, backend, cols, scale):
    case_or_skip(op, backend)
    x = torch.randn(6, cols, device=DEVICE)
    x[0, 3], x[1, 3], x[2, 3], x[3], x[4, 1:] = NAN, INF, -INF, -INF, -INF
    y, expected = op.call(x, scale=scale, backend=backend), op.reference(x, scale=scale)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[3].isnan().all()
    assert y[5].isfinite().all()


@pytest.mark.parametrize("op, backend", MINE)
def test_scale_zero_makes_all_columns_alike_without_a_gradient(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(4, 64, device=DEVICE).requires_grad_()
    y = op.call(x, scale=0.0, backend=backend)
    assert torch.equal(wholes(op, y), torch.full_like(x, 1 / 64))
    assert torch.equal(torch.autograd.grad(y[:, 0].sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("op, backend", MINE)
def test_the_logarithm_keeps_its_digits_beside_a_large_peak(op, backend):
    """A log(total) added to the peak first would round away."""
    case_or_skip(op, backend)
    x = torch.randn(32, 64, device=DEVICE) + 1e4
    truth, theirs = op.reference(x.double()), op.reference(x)
    error, allowed = compare(op.call(x, backend=backend), theirs, truth)
    assert error <= allowed
    if op.name == "log_softmax":
        assert error < 1e-5  # an ulp of the peak is 1e-3


@pytest.mark.parametrize("op, backend", MINE)
def test_a_logarithm_far_below_the_peak_is_finite(op, backend):
    case_or_skip(op, backend)
    x = torch.tensor([[0.0, -300.0, 300.0]], device=DEVICE)
    y = op.call(x, backend=backend)
    expected = {"log_softmax": [-300.0, -600.0, 0.0], "softmax": [0.0, 0.0, 1.0]}[op.name]
    assert y.tolist() == [expected]


@pytest.mark.parametrize("op, backend", MINE)
def test_autocast_answers_in_fp32(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(4, 64, device=DEVICE, dtype=torch.bfloat16)
    assert op.call(x, backend=backend).dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.bfloat16):
        y = op.call(x, backend=backend)
    assert torch.equal(y, op.call(x.float(), backend=backend))


@pytest.mark.parametrize("call", [tilewise.softmax, tilewise.log_softmax])
@pytest.mark.parametrize(
    "error, message, x",
    [
        (TypeError, "x must be floating point, got torch.int64", torch.ones(2, 2).long()),
        (ValueError, r"x must be \[..., cols\], got a scalar", torch.ones(())),
    ],
    ids=["dtype", "scalar"],
)
def test_wrong_input_is_refused(call, error, message, x):
    with pytest.raises(error, match=f"^{call.__name__}: {message}"):
        call(x)

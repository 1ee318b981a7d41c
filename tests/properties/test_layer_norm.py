"""LayerNorm: what equality with the reference cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise
from tilewise.check import compare

MINE = [p for p in BACKENDS if p.values[0].name == "layer_norm"]
X = torch.randn(4, 64, device=DEVICE)
WEIGHT, BIAS = torch.randn(64, device=DEVICE), torch.randn(64, device=DEVICE)


@pytest.mark.parametrize("op, backend", MINE)
def test_rows_have_mean_0_and_variance_1(op, backend):
    case_or_skip(op, backend)
    y = tilewise.layer_norm(100 * X + 7, eps=0.0, backend=backend)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, device=DEVICE))
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(4, device=DEVICE))


@pytest.mark.parametrize("op, backend", MINE)
def test_eps_is_added_to_the_variance(op, backend):
    case_or_skip(op, backend)
    x = torch.tensor([[1.0, -1.0] * 8], device=DEVICE)  # variance 1
    torch.testing.assert_close(tilewise.layer_norm(x, eps=3.0, backend=backend), x / 2)


@pytest.mark.parametrize("op, backend", MINE)
def test_gradient_does_not_see_shift_and_scale(op, backend):
    """The output changes neither with a shift of x nor along x, so a loss of it does not either."""
    case_or_skip(op, backend)
    x = X.clone().requires_grad_()
    y = tilewise.layer_norm(x, WEIGHT, BIAS, 0.0, backend=backend)
    (dx,) = torch.autograd.grad(y.cos().sum(), x)
    small = 1e-5 * dx.norm() * x.norm()
    assert dx.sum(-1).abs().max() < small
    assert (dx * x).sum(-1).abs().max() < small


@pytest.mark.parametrize("cols", [64, 8200])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_large_mean_costs_no_more_than_in_torch(op, backend, cols):
    """E[x^2] - E[x]^2 would leave nothing of a variance of 1 beside a mean of 1e4."""
    case_or_skip(op, backend)
    x = torch.randn(32, cols, device=DEVICE) + 1e4
    truth = torch.nn.functional.layer_norm(x.double(), (cols,))
    theirs = torch.nn.functional.layer_norm(x, (cols,))
    error, allowed = compare(tilewise.layer_norm(x, backend=backend), theirs, truth)
    assert error <= allowed


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_spoilt_row_is_nan_as_in_torch_and_the_others_are_whole(op, backend, spoil):
    case_or_skip(op, backend)
    x = X.clone()
    x[1, 3] = spoil
    y, clean = (tilewise.layer_norm(t, WEIGHT, BIAS, backend=backend) for t in (x, X))
    assert torch.nn.functional.layer_norm(x, (64,), WEIGHT, BIAS)[1].isnan().all()
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("op, backend", MINE)
def test_a_constant_row_is_the_bias(op, backend):
    case_or_skip(op, backend)
    x = torch.full((2, 64), 3.0, device=DEVICE)
    y = tilewise.layer_norm(x, WEIGHT, BIAS, backend=backend)
    assert torch.equal(y, BIAS.expand(2, 64))


@pytest.mark.parametrize("op, backend", MINE)
def test_a_bias_alone_may_ask_for_a_gradient(op, backend):
    case_or_skip(op, backend)
    bias = BIAS.clone().requires_grad_()
    tilewise.layer_norm(X, WEIGHT, bias, backend=backend).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 4.0))


@pytest.mark.parametrize("op, backend", MINE)
def test_autocast_keeps_the_dtype(op, backend):
    case_or_skip(op, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert tilewise.layer_norm(X, WEIGHT, backend=backend).dtype == torch.float32
        assert tilewise.layer_norm(X.half(), WEIGHT, backend=backend).dtype == torch.float16


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "x must be floating point, got torch.int64", (X.long(), WEIGHT)),
        (TypeError, "weight must be torch.float32 or .* got torch.float16", (X, WEIGHT.half())),
        (
            TypeError,
            "bias must be torch.float32 or .* got torch.float64",
            (X, WEIGHT, BIAS.double()),
        ),
        (
            TypeError,
            "bias must have the dtype of weight, torch.float16, got torch.float32",
            (X.half(), WEIGHT.half(), BIAS),
        ),
        (ValueError, r"x must be \[..., cols\], got a scalar", (X[0, 0], None)),
        (ValueError, r"weight \[cols\], got \[4, 64\] and \[3\]", (X, WEIGHT[:3])),
        (ValueError, r"bias \[cols\], got \[4, 64\] and \[3\]", (X, WEIGHT, BIAS[:3])),
        (RuntimeError, "weight must be on .* got meta", (X, WEIGHT.to("meta"))),
        (RuntimeError, "bias must be on .* got meta", (X, WEIGHT, BIAS.to("meta"))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_refused(error, message, arguments):
    with pytest.raises(error, match="layer_norm: .*" + message):
        tilewise.layer_norm(*arguments)

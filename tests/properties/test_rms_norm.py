"""RMSNorm: what equality with the reference cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise

MINE = [p for p in BACKENDS if p.values[0].name == "rms_norm"]
X, WEIGHT = torch.randn(4, 64, device=DEVICE), torch.ones(64, device=DEVICE)


@pytest.mark.parametrize("op, backend", MINE)
def test_rows_have_unit_root_mean_square(op, backend):
    case_or_skip(op, backend)
    y = tilewise.rms_norm(100 * X, eps=0.0, backend=backend)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, device=DEVICE))


@pytest.mark.parametrize("op, backend", MINE)
def test_scale_of_the_input_does_not_matter(op, backend):
    case_or_skip(op, backend)
    one, other = (tilewise.rms_norm(c * X, WEIGHT, 0.0, backend=backend) for c in (1, 2**20))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op, backend", MINE)
def test_gradient_is_orthogonal_to_the_input(op, backend):
    """The output does not change along x, so neither does a loss."""
    case_or_skip(op, backend)
    x = X.clone().requires_grad_()
    dx = torch.autograd.grad(tilewise.rms_norm(x, None, 0.0, backend=backend).cos().sum(), x)[0]
    assert (dx * x).sum(-1).abs().max() < 1e-5 * dx.norm() * x.norm()


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_spoilt_row_is_as_the_formula_says_and_the_others_are_whole(op, backend, spoil):
    case_or_skip(op, backend)
    x = X.clone()
    x[1, 3] = spoil
    y, clean = (tilewise.rms_norm(t, WEIGHT, backend=backend) for t in (x, X))
    expected = torch.nn.functional.rms_norm(x, (64,), WEIGHT, 1e-6)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("op, backend", MINE)
def test_autocast_keeps_the_dtype(op, backend):
    case_or_skip(op, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert tilewise.rms_norm(X, WEIGHT, backend=backend).dtype == torch.float32
        assert tilewise.rms_norm(X.half(), WEIGHT, backend=backend).dtype == torch.float16


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "x must be floating point, got torch.int64", (X.long(), WEIGHT)),
        (TypeError, "weight must be torch.float32 or", (X, WEIGHT.half())),
        (ValueError, r"x must be \[..., cols\], got a scalar", (X[0, 0], None)),
        (ValueError, r"weight \[cols\], got \[4, 64\] and \[3\]", (X, WEIGHT[:3])),
        (RuntimeError, "weight must be on", (X, WEIGHT.to("meta"))),
    ],
    ids=["dtype of x", "dtype of weight", "scalar", "shape", "device"],
)
def test_wrong_input_is_refused(error, message, arguments):
    with pytest.raises(error, match="rms_norm: .*" + message):
        tilewise.rms_norm(*arguments)

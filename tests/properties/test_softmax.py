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


SCORES = {"scale": 0.7, "softcap": 3.0}


def gradients(op, x, bias, **options):
    """The result, and what a fixed gradient of it does to `x` and to `bias`."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias)]
    y = op.call(*leaves, **options)
    weights = torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape)
    return y, *torch.autograd.grad((y * weights).nan_to_num(0, 0, 0).sum(), leaves)


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_causal_is_the_mask_that_it_says(op, backend, cols):
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"causal": True})
    x, bias = torch.randn(2, 3, cols, device=DEVICE), torch.randn(3, cols, device=DEVICE)
    seen = torch.ones(3, cols, dtype=torch.bool, device=DEVICE).tril(cols - 3)
    causal = gradients(op, x, bias, causal=True, backend=backend, **SCORES)
    masked = gradients(op, x, bias, mask=seen, backend=backend, **SCORES)
    torch.testing.assert_close(causal, masked)
    assert (wholes(op, causal[0])[:, 0, -2:] == 0).all()
    assert (causal[1][:, 0, -2:] == 0).all()


@pytest.mark.parametrize("shape", [(5, 1, 1, 9), (3, 4, 9), (5, 3, 1, 1), (1, 1, 4, 9), (9,)])
@pytest.mark.parametrize("op, backend", MINE)
def test_a_broadcast_mask_or_bias_is_the_expanded_one(op, backend, shape):
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"mask": "k"})
    x, bias = torch.randn(5, 3, 4, 9, device=DEVICE), torch.randn(shape, device=DEVICE)
    mask = torch.rand(shape, device=DEVICE) < 0.6
    options = {"fully_masked": "zero", "backend": backend}
    y, dx, dbias = gradients(op, x, bias, mask=mask, **options)
    whole = gradients(op, x, bias.expand(x.shape), mask=mask.expand(x.shape), **options)
    assert torch.equal(y, whole[0])
    assert torch.equal(dx, whole[1])
    torch.testing.assert_close(dbias, whole[2].sum_to_size(shape))


@pytest.mark.parametrize("op, backend", MINE)
def test_five_dimensions_and_three(op, backend):
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"mask": "k"})
    x, bias = torch.randn(2, 3, 4, 5, 6, device=DEVICE), torch.randn(3, 1, 5, 6, device=DEVICE)
    mask = torch.rand(2, 1, 1, 1, 6, device=DEVICE) < 0.6
    mask[..., 0] = True
    ours = gradients(op, x, bias, mask=mask, causal=True, backend=backend)
    torch.testing.assert_close(
        ours, gradients(op, x, bias, mask=mask, causal=True, backend="reference")
    )
    flat = op.call(x[0, :, 0], bias[:, 0], mask=mask[0, :, 0], causal=True, backend=backend)
    torch.testing.assert_close(flat, ours[0][0, :, 0])


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_what_is_hidden_may_be_anything(op, backend, cols):
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"mask": "k"})
    x, bias = torch.randn(3, cols, device=DEVICE), torch.randn(3, cols, device=DEVICE)
    mask = torch.rand(3, cols, device=DEVICE) < 0.6
    mask[:, :2] = True
    clean = gradients(op, x, bias, mask=mask, backend=backend, **SCORES)
    for anything in (NAN, INF, -INF):
        soiled = (t.masked_fill(~mask, anything) for t in (x, bias))
        assert all(
            map(torch.equal, gradients(op, *soiled, mask=mask, backend=backend, **SCORES), clean)
        )


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("op, backend", MINE)
def test_a_row_of_nothing_is_nan_or_zero(op, backend, cols):
    """By the mask, by causality, or by scores of -inf; neighbours are left alone."""
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"mask": "k"})
    mask = torch.ones(3, cols, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    x, bias = torch.randn(3, cols, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    bias[2] = -INF
    y, dx, _ = gradients(op, x, bias, mask=mask, backend=backend)
    assert y[1:].isnan().all()
    torch.testing.assert_close(y[0], op.reference(x[0]))
    y, dx, _ = gradients(op, x, bias, mask=mask, fully_masked="zero", backend=backend)
    assert (wholes(op, y[1:]) == 0).all()
    assert (dx[1:] == 0).all()
    torch.testing.assert_close(y[0], op.reference(x[0]))
    late = op.call(x[:, :2], causal=True, backend=backend)  # three queries of two keys
    assert late[0].isnan().all()
    assert not late[1:].isnan().any()


@pytest.mark.parametrize("op, backend", MINE)
def test_softcap_bounds_the_scores_and_keeps_small_ones(op, backend):
    case_or_skip(op, backend, torch.float32, op.sizes[0] | {"softcap": 1.0})
    x = torch.tensor([[-1e4, 1e4, 0.0, 1e-3]], device=DEVICE)
    y = op.call(x, softcap=2.0, backend=backend)
    torch.testing.assert_close(y, op.reference(torch.tensor([[-2, 2, 0, 1e-3]], device=DEVICE)))
    x = torch.randn(32, 64, device=DEVICE)
    truth, theirs = (op.reference(t, softcap=50.0) for t in (x.double(), x))
    error, allowed = compare(op.call(x, softcap=50.0, backend=backend), theirs, truth)
    assert error <= allowed


@pytest.mark.parametrize("call", [tilewise.softmax, tilewise.log_softmax])
@pytest.mark.parametrize(
    "error, message, tensors, options",
    [
        (TypeError, "bias must be torch.float16 or torch.float32, got torch.float64",
         [torch.ones(2, 2).half(), torch.ones(2, 2).double()], {}),
        (TypeError, "mask must be torch.bool, got torch.float32",
         [torch.ones(2, 2)], {"mask": torch.ones(2, 2)}),
        (ValueError, r"bias must be broadcastable to \[2, 2\], got \[3\]",
         [torch.ones(2, 2), torch.ones(3)], {}),
        (ValueError, r"mask must be broadcastable to \[2\], got \[2, 2\]",
         [torch.ones(2)], {"mask": torch.ones(2, 2).bool()}),
        (RuntimeError, "bias must be on cpu, got meta",
         [torch.ones(2, 2), torch.ones(2, device="meta")], {}),
        (ValueError, "softcap must be positive, got 0.0", [torch.ones(2, 2)], {"softcap": 0.0}),
        (ValueError, r"x must be \[..., queries, cols\] if causal, got \[2\]",
         [torch.ones(2)], {"causal": True}),
        (ValueError, "fully_masked must be nan or zero, got 'one'",
         [torch.ones(2, 2)], {"fully_masked": "one"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_options_are_refused(call, error, message, tensors, options):
    with pytest.raises(error, match=f"^{call.__name__}: {message}"):
        call(*tensors, **options)


@pytest.mark.parametrize("make, call", [
    (tilewise.nn.Softmax, tilewise.softmax), (tilewise.nn.LogSoftmax, tilewise.log_softmax)
])  # fmt: skip
def test_modules_take_the_options(make, call):
    x, bias, mask = torch.randn(2, 3, 4), torch.randn(3, 4), torch.rand(2, 3, 4) < 0.7
    options = {"softcap": 1.5, "causal": True, "fully_masked": "zero"}
    ours = make(-1, **options)(x, bias, mask)
    assert torch.equal(ours, call(x, bias, mask=mask, **options))
    assert torch.equal(make(1, scale=0.5)(x), call(x.mT, scale=0.5).mT)
    with pytest.raises(ValueError, match="dim must be the last with bias, mask or causal, got 1"):
        make(1, causal=True)(x)


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

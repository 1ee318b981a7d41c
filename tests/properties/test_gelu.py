"""GELU: what equality with the reference cannot say."""

import math
from functools import partial

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise
from tilewise.check import compare

INF, NAN = float("inf"), float("nan")
MINE = [p for p in BACKENDS if p.values[0].name == "gelu"]
FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])


@FORMS
@pytest.mark.parametrize("op, backend", MINE)
def test_matches_torch_over_the_whole_line(op, backend, approximate):
    """The seams of any approximation, and both ends, where it is x and where it is 0."""
    case_or_skip(op, backend)
    x = torch.linspace(-8, 8, 16001, device=DEVICE)[None]
    results = []
    for dtype, call in (
        (torch.float32, partial(tilewise.gelu, backend=backend)),
        (torch.float32, torch.nn.functional.gelu),
        (torch.float64, torch.nn.functional.gelu),
    ):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = call(leaf, approximate=approximate)
        results.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
    for ours, theirs, truth in zip(*results, strict=True):
        error, allowed = compare(ours, theirs, truth)
        assert error <= allowed
    ends = torch.logspace(1.2, 18, 100, device=DEVICE)
    assert torch.equal(tilewise.gelu(ends, approximate, backend=backend), ends)
    assert not tilewise.gelu(-ends, approximate, backend=backend).any()


@FORMS
@pytest.mark.parametrize("op, backend", MINE)
def test_odd_part_is_half_of_x(op, backend, approximate):
    case_or_skip(op, backend)
    x = torch.linspace(0, 6, 1000, device=DEVICE)
    up, down = (tilewise.gelu(t, approximate, backend=backend) for t in (x, -x))
    torch.testing.assert_close(up - down, x)


@pytest.mark.parametrize("op, backend", MINE)
def test_the_two_forms_are_not_the_same(op, backend):
    case_or_skip(op, backend)
    x = torch.tensor([2.0], device=DEVICE)
    exact, approximated = (tilewise.gelu(x, a, backend=backend).cpu() for a in ("none", "tanh"))
    torch.testing.assert_close(exact, torch.tensor([1 + math.erf(math.sqrt(2))]))
    u = math.sqrt(2 / math.pi) * (2 + 0.044715 * 2**3)
    torch.testing.assert_close(approximated, torch.tensor([1 + math.tanh(u)]))
    assert not torch.isclose(exact, approximated, rtol=1.3e-6)


@FORMS
@pytest.mark.parametrize("op, backend", MINE)
def test_what_is_not_finite_is_that_of_torch(op, backend, approximate):
    case_or_skip(op, backend)
    x = torch.tensor([NAN, INF, -INF, 1.0], device=DEVICE).requires_grad_()
    double = x.detach().double().requires_grad_()  # in fp32 torch's vectors make inf NaN
    y = tilewise.gelu(x, approximate, backend=backend)
    expected = torch.nn.functional.gelu(double, approximate=approximate)
    torch.testing.assert_close(y, expected.float(), equal_nan=True)
    (got,), (wanted,) = (torch.autograd.grad(o.sum(), t) for o, t in ((y, x), (expected, double)))
    torch.testing.assert_close(got, wanted.float(), equal_nan=True)


@pytest.mark.parametrize("op, backend", MINE)
def test_a_scalar_and_any_number_of_dimensions(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    y = tilewise.gelu(x, backend=backend)
    assert y.shape == x.shape
    assert torch.equal(tilewise.gelu(x[1, 1, 1, 1], backend=backend), y[1, 1, 1, 1])
    assert torch.equal(tilewise.gelu(x.permute(3, 0, 2, 1), backend=backend), y.permute(3, 0, 2, 1))


@pytest.mark.parametrize("op, backend", MINE)
def test_autocast_keeps_the_dtype(op, backend):
    case_or_skip(op, backend)
    x = torch.randn(4, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert tilewise.gelu(x, backend=backend).dtype == torch.float32
        assert tilewise.gelu(x.half(), backend=backend).dtype == torch.float16


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "x must be floating point, got torch.int64", (torch.ones(2).long(),)),
        (ValueError, "approximate must be one of none, tanh, got 'erf'", (torch.ones(2), "erf")),
    ],
    ids=["dtype", "name"],
)
def test_wrong_input_is_refused(error, message, arguments):
    with pytest.raises(error, match="^gelu: " + message):
        tilewise.gelu(*arguments)

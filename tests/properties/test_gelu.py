"""GELU: what equality with the reference cannot say."""

import math
from functools import partial

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip
from test_ops import ops_called

import tilewise
from tilewise.check import compare
from tilewise.rng import keep_mask

INF, NAN = float("inf"), float("nan")
MINE = [p for p in BACKENDS if p.values[0].name == "gelu"]
BIASED = [p for p in BACKENDS if p.values[0].name == "bias_gelu"]
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


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, backend", MINE)
def test_every_number_of_16_bits_within_an_ulp(op, backend, dtype, approximate):
    case_or_skip(op, backend)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    x = x[x.isfinite()]
    ours = tilewise.gelu(x, approximate, backend=backend).double()
    truth = torch.nn.functional.gelu(x.double(), approximate=approximate)
    ulp = truth.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    # Where x * cdf(-x) runs out the fp32 error of the distribution, 1e-7, is all that there is.
    assert bool(((ours - truth).abs() <= ulp + 1e-6)[truth.abs() < 6e4].all())


@FORMS
@pytest.mark.parametrize("op, backend", BIASED)
def test_bias_and_dropout_are_the_ops_one_after_the_other(op, backend, approximate, monkeypatch):
    """The gradient of the bias is a sum in fp32, of more rows than it has parts."""
    case_or_skip(op, backend)
    if bound := {"cuda": "MIN_PARTS", "triton": "MAX_PARTS"}.get(backend):
        monkeypatch.setattr(f"tilewise.kernels.{backend}.gelu.PART_ELEMENTS", 1)
        monkeypatch.setattr(f"tilewise.kernels.{backend}.gelu.{bound}", 32)
    torch.manual_seed(0)
    x, dy = torch.randn(2, 70, 36, device=DEVICE).unbind()
    bias = torch.randn(36, device=DEVICE)
    options = {"dropout_p": 0.4, "seed": 5, "offset": 2**33, "backend": backend}
    inputs = [t.clone().requires_grad_() for t in (x, bias)]
    y = tilewise.bias_gelu(*inputs, approximate, **options)
    kept = keep_mask(0.4, 5, 2**33, torch.arange(70, device=DEVICE), 36)
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    truth = torch.nn.functional.gelu(leaves[0] + leaves[1], approximate=approximate)
    truth = torch.where(kept, truth / 0.6, 0)
    assert torch.equal(y != 0, kept & (truth.float() != 0))
    torch.testing.assert_close(y, truth.float())
    ours = torch.autograd.grad(y, inputs, dy)
    theirs = torch.autograd.grad(truth, leaves, dy.double())
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("op, backend", BIASED)
def test_a_frozen_input_costs_no_memory(op, backend):
    case_or_skip(op, backend)
    for frozen in (0, 1):
        inputs = [torch.randn(5, 12, device=DEVICE), torch.randn(12, device=DEVICE)]
        inputs[1 - frozen].requires_grad_()
        y = tilewise.bias_gelu(*inputs, backend=backend)
        ((_, arguments),) = ops_called(y.sum().backward)
        assert list(arguments[9:11]) == [frozen != 0, frozen != 1]


BIASES = torch.ones(3, 4), torch.ones(4)
REFUSED = [
    (TypeError, "x must be floating point, got torch.int64", (BIASES[0].long(), BIASES[1]), {}),
    (TypeError, "bias must be torch.float32 or torch.float32, got torch.float16",
     (BIASES[0], BIASES[1].half()), {}),
    (ValueError, r"bias \[cols\], got \[3, 4\] and \[3\]", (BIASES[0], BIASES[1][1:]), {}),
    (ValueError, "approximate must be one of none, tanh, got 'erf'", (*BIASES, "erf"), {}),
    (ValueError, "dropout_p must be from 0 to 1, got -0.1", BIASES, {"dropout_p": -0.1}),
    (RuntimeError, "bias must be on cpu, got meta", (BIASES[0], BIASES[1].to("meta")), {}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments, options", REFUSED)
def test_a_wrong_bias_is_refused(error, message, arguments, options):
    with pytest.raises(error, match="^bias_gelu: .*" + message):
        tilewise.bias_gelu(*arguments, **options)


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

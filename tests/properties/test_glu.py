"""Gated linear units: what equality with the reference cannot say."""

import math
from functools import partial

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip
from test_ops import ops_called

import tilewise
from tilewise.check import compare
from tilewise.ops.glu import glu_reference

INF, NAN = float("inf"), float("nan")
MINE = [p for p in BACKENDS if p.values[0].name == "glu"]
PACKED = [p for p in BACKENDS if p.values[0].name == "glu_packed"]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]
EACH = pytest.mark.parametrize("activation", ACTIVATIONS)
GATE, UP = torch.randn(2, 4, 64, device=DEVICE)


@EACH
@pytest.mark.parametrize("op, backend", MINE)
def test_linear_in_up(op, backend, activation):
    case_or_skip(op, backend)
    one, two = (tilewise.glu(GATE, c * UP, activation, backend=backend) for c in (1, 2))
    assert torch.equal(2 * one, two)
    assert not tilewise.glu(GATE, torch.zeros_like(UP), activation, backend=backend).any()


@EACH
@pytest.mark.parametrize("op, backend", MINE)
def test_every_activation_and_its_slope_over_the_whole_line(op, backend, activation):
    case_or_skip(op, backend)
    gate = torch.linspace(-30, 30, 6001, device=DEVICE)[None]
    up = torch.linspace(-2, 2, 6001, device=DEVICE)[None]
    results = []
    for dtype, call in (
        (torch.float32, partial(tilewise.glu, backend=backend)),
        (torch.float32, glu_reference),
        (torch.float64, glu_reference),
    ):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (gate, up)]
        y = call(*leaves, activation)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaves)))
    for ours, theirs, truth in zip(*results, strict=True):
        error, allowed = compare(ours, theirs, truth)
        assert error <= allowed


@EACH
@pytest.mark.parametrize("op, backend", MINE)
def test_what_is_extreme_is_that_of_torch(op, backend, activation):
    case_or_skip(op, backend)
    gate = torch.tensor(
        [NAN, INF, -INF, 1.0, 1.0, 0.0, 200.0, -200.0], device=DEVICE
    ).requires_grad_()
    up = torch.tensor([1.0, 1.0, 1.0, NAN, INF, 1.0, 1.0, 1.0], device=DEVICE).requires_grad_()
    y = tilewise.glu(gate, up, activation, backend=backend)
    # In fp32 torch's vectors make NaN of gelu(inf).
    double = [t.detach().double().requires_grad_() for t in (gate, up)]
    expected = glu_reference(*double, activation)
    torch.testing.assert_close(y, expected.float(), equal_nan=True)
    got = torch.autograd.grad(y.sum(), (gate, up))
    wanted = torch.autograd.grad(expected.sum(), double)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), equal_nan=True)


@pytest.mark.parametrize("op, backend", MINE)
def test_beyond_the_limit_nothing_changes_and_nothing_flows_back(op, backend):
    """The formula of gpt-oss, by hand; NaN is not beyond it, and at the limit the slope is that
    from below."""
    case_or_skip(op, backend)
    gate = torch.tensor([8.0, 7.0, -200.0, 1.0, 1.0, 1.0, NAN], device=DEVICE).requires_grad_()
    up = torch.tensor([1.0, 7.0, -7.0, 7.5, -9.0, INF, 1.0], device=DEVICE).requires_grad_()
    options = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0}
    y = tilewise.glu(gate, up, **options, backend=backend)

    def value(g, u):
        return g / (1 + math.exp(-1.702 * g)) * (u + 1)

    expected = [value(7, 1), value(7, 7), value(-200, -7), value(1, 7), value(1, -7), value(1, 7)]
    torch.testing.assert_close(y[:6].tolist(), expected, rtol=1e-6, atol=1e-30)
    assert y[6].isnan()
    dgate, dup = torch.autograd.grad(y[:6].sum(), (gate, up))
    assert (dgate[:6] != 0).tolist() == [False, True, False, True, True, True]
    assert (dup[:6] != 0).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("op, backend", PACKED)
def test_packed_is_glu_of_the_halves(op, backend):
    """Also where the second half is misaligned; the gradient is one tensor."""
    case_or_skip(op, backend)
    for cols in (64, 63):
        x = torch.randn(5, 7, 2 * cols, device=DEVICE, requires_grad=True)
        halves = [t.detach().clone().requires_grad_() for t in x.chunk(2, -1)]
        options = {"activation": "gelu", "limit": 1.0, "backend": backend}
        y, whole = tilewise.glu_packed(x, **options), tilewise.glu(*halves, **options)
        torch.testing.assert_close(y, whole)
        dy = torch.randn(5, 7, 1, device=DEVICE).expand(y.shape)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, torch.cat(torch.autograd.grad(whole, halves, dy), -1))


@pytest.mark.parametrize("op, backend", MINE)
def test_a_frozen_input_costs_no_memory(op, backend):
    case_or_skip(op, backend)
    for frozen in (0, 1):
        inputs = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((GATE, UP))]
        y = tilewise.glu(*inputs, backend=backend)
        ((_, arguments),) = ops_called(y.sum().backward)
        assert list(arguments[7:9]) == [frozen != 0, frozen != 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EACH
@pytest.mark.parametrize("op, backend", MINE)
def test_halves_are_rounded_once(op, backend, activation, dtype):
    """Every finite number of the dtype: as near as the truth rounded, but for a tie of the last."""
    case_or_skip(op, backend)
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    gate = gate[gate.isfinite() & (gate.abs() < 100)]
    ours = tilewise.glu(gate, torch.ones_like(gate), activation, backend=backend)
    truth = glu_reference(gate.double(), torch.ones_like(gate).double(), activation)
    apart = (ours.double() - truth).abs()
    ulp = truth.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert bool((apart <= ulp + 1e-6).all())


@pytest.mark.parametrize("op, backend", MINE)
def test_halves_of_a_packed_tensor_are_read_where_they_lie(op, backend):
    case_or_skip(op, backend)
    packed = torch.randn(5, 7, 128, device=DEVICE)
    gate, up = packed.chunk(2, -1)
    ((_, arguments),) = ops_called(lambda: tilewise.glu(gate, up, backend=backend))
    assert [t.data_ptr() for t in arguments[:2]] == [gate.data_ptr(), up.data_ptr()]
    whole = tilewise.glu(gate.contiguous(), up.contiguous(), backend=backend)
    assert torch.equal(tilewise.glu(gate, up, backend=backend), whole)


@pytest.mark.parametrize("op, backend", MINE)
def test_scalars(op, backend):
    case_or_skip(op, backend)
    whole = tilewise.glu(GATE, UP, backend=backend)
    assert torch.equal(tilewise.glu(GATE[1, 2], UP[1, 2], backend=backend), whole[1, 2])


@pytest.mark.parametrize("op, backend", MINE)
def test_autocast_keeps_the_dtype(op, backend):
    case_or_skip(op, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert tilewise.glu(GATE, UP, backend=backend).dtype == torch.float32
        assert tilewise.glu(GATE.half(), UP.half(), backend=backend).dtype == torch.float16


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "gate must be floating point, got torch.int64", (GATE.long(), UP)),
        (TypeError, "up must have the dtype of gate, torch.float32, got", (GATE, UP.half())),
        (ValueError, r"one shape, got \[4, 64\] and \[64\]", (GATE, UP[0])),
        (ValueError, "activation must be one of silu, .*, got 'tanh'", (GATE, UP, "tanh")),
        (RuntimeError, "up must be on .* got meta", (GATE, UP.to("meta"))),
    ],
    ids=["dtype of gate", "dtype of up", "shape", "name", "device"],
)
def test_wrong_input_is_refused(error, message, arguments):
    with pytest.raises(error, match="^glu: .*" + message):
        tilewise.glu(*arguments)


@pytest.mark.parametrize(
    "message, options",
    [
        ("limit must be positive, got 0.0", {"limit": 0.0}),
        ("alpha must be positive and finite, got -1.0", {"alpha": -1.0}),
        ("alpha must be 1 unless activation is 'silu', got 2.0",
         {"alpha": 2.0, "activation": "relu"}),
        ("up_offset must be finite, got inf", {"up_offset": INF}),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(message, options):
    with pytest.raises(ValueError, match="^glu: " + message):
        tilewise.glu(GATE, UP, **options)


@pytest.mark.parametrize(
    "error, message, x",
    [
        (TypeError, "x must be floating point, got torch.int64", GATE.long()),
        (ValueError, r"x must be \[..., 2 \* cols\], got \[4, 63\]", GATE[:, 1:]),
    ],
)
def test_wrong_packed_input_is_refused(error, message, x):
    with pytest.raises(error, match="^glu_packed: " + message):
        tilewise.glu_packed(x)

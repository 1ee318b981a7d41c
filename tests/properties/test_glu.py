"""Gated linear units: what equality with the reference cannot say."""

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

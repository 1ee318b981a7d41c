"""linear_cross_entropy: memory modes, products left out, and what equality cannot say."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise import linear_loss
from tilewise.check import compare, nudged
from tilewise.choice import refusal
from tilewise.kernels.numba import _products
from tilewise.op import OPS

OP = OPS["linear_cross_entropy"]
MODES = linear_loss.MODES


@pytest.fixture(params=[*OP.backends, "reference"])
def backend(request):
    size = {"tokens": 2, "dim": 3, "classes": 3}
    tensors, options = OP.inputs(**size, device=DEVICE, dtype=torch.float32)
    if request.param in OP.backends:
        refused = refusal(OP.backends[request.param], *tensors, **options)
        if refused:
            pytest.skip(f"{request.param}: {refused[1]}")
    return request.param


@pytest.fixture
def small_parts(monkeypatch):
    """Several parts, the last one not whole, at sizes that a test can afford."""
    monkeypatch.setattr(linear_loss, "TOKENS_BUDGET", {"cpu": 9000, "other": 9000})
    monkeypatch.setattr(linear_loss, "SLICE_BUDGET", 9000)


def inputs(tokens=41, dim=32, classes=133, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device=DEVICE).to(dtype)
    weight = (2 * torch.randn(classes, dim, device=DEVICE) / dim**0.5).to(dtype)
    bias = torch.randn(classes, device=DEVICE).to(dtype)
    target = torch.randint(classes, (tokens,), device=DEVICE)
    target[3:4] = -100
    return hidden, weight, bias, target


def losses_and_gradients(call, hidden, matrix, bias, target, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, matrix, bias)]
    loss = call(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), device=DEVICE).view(loss.shape).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def plain(hidden, matrix, target, linear_bias, **options):
    return F.cross_entropy(F.linear(hidden, matrix, linear_bias).float(), target, **options)


def exact(hidden, matrix, target, linear_bias, **options):
    return F.cross_entropy(F.linear(hidden, matrix, linear_bias), target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory", MODES)
def test_in_parts_it_is_the_loss_of_torch(backend, memory, reduction, dtype, small_parts):
    """Bias and class weights too, with an upstream gradient that is not 1."""
    tensors = inputs(dtype=dtype)
    factors = torch.rand(133, device=DEVICE) + 0.5
    options = {"reduction": reduction, "label_smoothing": 0.1}
    ours = losses_and_gradients(
        tilewise.linear_cross_entropy, *tensors, weight=factors, memory=memory, backend=backend,
        **options,
    )  # fmt: skip
    theirs = losses_and_gradients(plain, *tensors, weight=factors, **options)
    double = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = losses_and_gradients(exact, *double, weight=factors.double(), **options)
    for mine, yardstick, right in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == yardstick.dtype
        error, allowed = compare(mine, yardstick, right)
        assert error <= allowed


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_costs_no_product(backend, memory, reduction, frozen, small_parts):
    if backend == "reference":
        pytest.skip("reference: its products are autograd's")
    hidden, weight, bias, target = inputs(tokens=16)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    loss = tilewise.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, memory=memory, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]


def test_a_second_backward_is_like_the_first(backend):
    for memory in MODES:
        hidden, weight, _, target = inputs()
        hidden.requires_grad_()
        loss = 3 * tilewise.linear_cross_entropy(
            hidden, weight.requires_grad_(), target, memory=memory, backend=backend
        )
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, (hidden, weight))
        for was, now, again in zip(kept, first, second, strict=True):
            assert torch.equal(was, now)
            assert torch.equal(was, again)


@pytest.mark.parametrize("memory", ["fast", "min"])
def test_the_second_derivative(memory):
    hidden, weight, bias, target = inputs(tokens=3, dim=4, classes=5, dtype=torch.float64)
    target = target % 5

    def loss(hidden, weight, bias):
        return tilewise.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, memory=memory, z_loss=0.1, softcap=3.0
        )

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


class Peak(TorchDispatchMode):
    """The most bytes that were there at once of what was made within the block."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in (*args, *(kwargs or {}).values())
                  if isinstance(t, torch.Tensor)}  # fmt: skip
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in before:
                    self.alive[storage._cdata] = (
                        torch.multiprocessing.reductions.StorageWeakRef(storage),
                        storage.nbytes(),
                    )
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def shapes_alone(logits, target, *rest):
    losses = logits.new_empty(target.shape, dtype=torch.float32)
    return losses, losses, losses.new_empty(3, *target.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("memory, most", [("fast", 2.2e9), ("lean", 300e6), ("min", 200e6)])
def test_the_peak_at_the_size_of_a_large_model(memory, most, dtype):
    """Beyond the gradients themselves, on tensors without memory: both passes, and no gradients."""
    tokens, dim, classes = 4096, 4096, 128256
    hidden = torch.empty(tokens, dim, dtype=dtype, device="meta")
    weight = torch.empty(classes, dim, dtype=dtype, device="meta")
    target = torch.empty(tokens, dtype=torch.int64, device="meta")
    room = linear_loss.Room(
        shapes_alone, lambda *arguments: None, lambda *arguments: shapes_alone(*arguments)[:2]
    )
    numbers = (-100, 0.0, 0.0, 0.0, 1.0)
    factor = torch.empty((), device="meta")
    gradients = hidden.nbytes + weight.nbytes
    with Peak() as peak:
        linear_loss.forward(
            room, hidden, weight, target, None, None, None, *numbers, memory, False, False, False
        )
    assert 0 < peak.most <= 300e6
    if memory != "min":
        with Peak() as peak:
            linear_loss.forward(
                room, hidden, weight, target, None, None, factor, *numbers, memory,
                True, True, False,
            )  # fmt: skip
        assert gradients < peak.most <= gradients + most
    dlosses, statistics = (torch.empty(*s, tokens, device="meta") for s in ((), (3,)))
    with Peak() as peak:
        linear_loss.backward(
            room, dlosses, hidden, weight, target, None, None, statistics, *numbers, memory,
            True, True, False,
        )  # fmt: skip
    assert gradients < peak.most <= gradients + most


def test_logits_are_never_whole_on_a_cpu():
    """At the size of the benchmark: what is made at once beside the gradients, in truth."""
    hidden, weight, _, target = inputs(tokens=1024, dim=16, classes=50257)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with Peak() as peak:
        loss = tilewise.linear_cross_entropy(*leaves, target, memory="lean", backend="reference")
    assert peak.most > 200e6  # the reference makes them: the peak is seen
    problem = linear_loss.Problem(hidden, weight, None, target, None, (), "lean", (True,) * 3)
    assert linear_loss._tokens_at_once(problem) * 50304 * 4 <= 64e6
    assert loss.isfinite()


def test_many_classes(backend):
    """262144 of them, in every mode."""
    if backend in ("triton", "cuda") and DEVICE == "cpu":
        pytest.skip(f"{backend}: too many to interpret")
    tensors = inputs(tokens=8, dim=16, classes=262144)
    tensors[3][1] = 262143
    truth = losses_and_gradients(exact, *[t.double() for t in tensors[:3]], tensors[3])
    near = [[nudged(t) for t in tensors] for _ in range(3)]
    theirs = [losses_and_gradients(exact, *run) for run in (tensors, *near)]
    for memory in MODES:
        ours = losses_and_gradients(
            tilewise.linear_cross_entropy, *tensors, memory=memory, backend=backend
        )
        for group in zip(ours, truth, *theirs, strict=True):
            # As one row: of 8192 blocks some would be luckier than any run of the yardstick.
            mine, right, *yardsticks = (t.reshape(1, -1) for t in group)
            error, allowed = compare(mine, yardsticks, right)
            assert error <= allowed


def test_denominators_and_wrong_targets(backend):
    hidden, weight, _, target = inputs()
    options = {"backend": backend}
    total = tilewise.linear_cross_entropy(hidden, weight, target, reduction="sum", **options)
    denom = torch.tensor(7.0, device=DEVICE)
    mean = tilewise.linear_cross_entropy(hidden, weight, target, denom=denom, **options)
    torch.testing.assert_close(mean, total / 7)
    target[:] = -100
    for memory in MODES:
        loss = tilewise.linear_cross_entropy(hidden, weight, target, memory=memory, **options)
        assert loss.isnan()
    target[5] = 133
    losses = tilewise.linear_cross_entropy(hidden, weight, target, reduction="none", **options)
    assert losses[5].isnan()
    assert not losses[6:].any()
    with pytest.raises(ValueError, match="target must be -100 or from 0 to 132, got 133 in row 5"):
        tilewise.linear_cross_entropy(hidden, weight, target, check_inputs=True, **options)


def test_autocast_multiplies_in_lower_precision(backend):
    hidden, weight, bias, target = inputs()
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = tilewise.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, backend=backend
        )
    lower = [t.bfloat16() for t in (hidden, weight, bias)]
    expected = tilewise.linear_cross_entropy(
        lower[0], lower[1], target, linear_bias=lower[2], backend=backend
    )
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32


def test_leading_shapes_and_strides(backend):
    hidden, weight, _, target = inputs(tokens=24)
    flat = tilewise.linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    wide = torch.cat([weight, weight], 1)[:, :32]
    apart = torch.stack([hidden, hidden], -1)[..., 0].view(4, 6, 32)
    losses = tilewise.linear_cross_entropy(
        apart, wide, target.view(4, 6).int(), reduction="none", backend=backend
    )
    assert losses.shape == (4, 6)
    torch.testing.assert_close(losses.flatten(), flat)


H, W, T = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
REFUSED = [
    (TypeError, "hidden must be floating point, got torch.int64", T, W, T, {}),
    (ValueError, "hidden must be [..., dim], got a scalar", H[0, 0], W, T, {}),
    (ValueError, "linear_weight must be [classes, 3], got [4, 2]", H, W[:, :2], T, {}),
    (ValueError, "linear_weight must have at least one class, got none", H, W[:0], T, {}),
    (ValueError, "linear_bias must be [4], got [3]", H, W, T, {"linear_bias": H[0]}),
    (RuntimeError, "linear_weight must be on cpu, got meta", H, W.to("meta"), T, {}),
    (TypeError, "linear_weight must be torch.float32, got torch.float64", H, W.double(), T, {}),
    (ValueError, "hidden must be [..., dim] and target [...], got [2, 3] and [1]", H, W, T[:1], {}),
    (ValueError, "memory must be one of fast, lean, min, got 'all'", H, W, T, {"memory": "all"}),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, hidden, weight, target, options", REFUSED)
def test_refuses(error, sentence, hidden, weight, target, options):
    with pytest.raises(error, match=f"^linear_cross_entropy: {re.escape(sentence)}"):
        tilewise.linear_cross_entropy(hidden, weight, target, **options)


def test_scores_beyond_half_precision(backend):
    """fp16 products that overflow are inf, and so is the loss: as loud as PyTorch's."""
    hidden = torch.full((2, 64), 60.0, device=DEVICE, dtype=torch.float16)
    weight = torch.full((5, 64), 60.0, device=DEVICE, dtype=torch.float16)
    target = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss = tilewise.linear_cross_entropy(hidden, weight, target, backend=backend)
    assert not math.isfinite(float(loss))


@pytest.mark.parametrize("memory", MODES)
def test_gradients_are_proportional_to_the_one_from_above(backend, memory):
    """To powers of two, whose products are exact; of 1 there is nothing to multiply by."""
    *tensors, target = inputs()
    found = []
    for upstream in (1.0, 2.0, 0.5, 0.0):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = tilewise.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], memory=memory, backend=backend
        )
        found.append((upstream, torch.autograd.grad(upstream * loss, leaves)))
    for upstream, gradients in found:
        for ours, unit in zip(gradients, found[0][1], strict=True):
            assert torch.equal(ours, upstream * unit)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "depth, cols", [(1, 64), (60, 400), (255, 64), (512, 64), (513, 400), (1100, 64)]
)
def test_products_of_numba(depth, cols, turned, add):
    """Of any depth, from rows or columns, rows left over, onto what is there or not."""
    torch.manual_seed(0)
    a, b, start = torch.randn(75, depth), torch.randn(depth, cols), torch.randn(75, cols + 16)
    out = start.clone()[:, :cols]
    _products.product(out, a.t().contiguous().t() if turned else a, b, add)
    start = start[:, :cols] if add else torch.zeros(75, cols)
    truth = start.double() + a.double() @ b.double()
    error, allowed = compare(out, start + a @ b, truth)
    assert error <= allowed


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dim", [1, 255, 256, 257, 700])
def test_logits_of_numba(dim, biased):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(67, dim), torch.randn(141, dim), torch.randn(141)
    out = torch.empty(67, 150)[:, :141]
    _products.logits(out, hidden, weight, bias if biased else None)
    theirs, truth = (
        h @ w.t() + biased * b
        for h, w, b in ((hidden, weight, bias), (hidden.double(), weight.double(), bias.double()))
    )
    error, allowed = compare(out, theirs, truth)
    assert error <= allowed

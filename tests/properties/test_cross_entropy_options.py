"""cross_entropy: its options, its form in place, and its lse."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from loss_cases import DTYPES, OP, assert_right, loss_and_gradient, rows_of, runnable

import tilewise
from tilewise.check import nudged


@pytest.fixture(params=[*OP.backends, "reference"])
def backend(request):
    return runnable(request.param)


ALL = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.5}


def by_hand(logits, target, weight, label_smoothing, z_loss, softcap, logit_scale):
    """The formula once more, a row at a time, in sums of Python."""
    losses, normalisers = [], []
    for row, true in zip(logits.tolist(), target.tolist(), strict=True):
        scores = [softcap * math.tanh(logit_scale * x / softcap) for x in row]
        lse = math.log(math.fsum(math.exp(s) for s in scores))
        spread = math.fsum(w * (lse - s) for w, s in zip(weight, scores, strict=True)) / len(row)
        loss = (1 - label_smoothing) * weight[true] * (lse - scores[true])
        losses.append(loss + label_smoothing * spread + z_loss * lse * lse)
        normalisers.append(lse)
    return torch.tensor([losses, normalisers], dtype=torch.float64)


def test_the_formula_by_hand(backend):
    logits, target = rows_of(7, 65)
    weight = torch.rand(65) + 0.5
    truth = by_hand(logits, target, weight.tolist(), **ALL)
    ours = tilewise.cross_entropy_with_lse(
        logits, target, weight=weight.to(DEVICE), reduction="none", backend=backend, **ALL
    )
    torch.testing.assert_close(torch.stack(ours).cpu().double(), truth, rtol=1e-6, atol=1e-6)


def test_a_cap_below_one(backend):
    logits, target = rows_of(5, 33)
    options = {"softcap": 0.5, "reduction": "none"}
    truth, theirs, ours = (
        loss_and_gradient(tilewise.cross_entropy, t, target, **options, backend=by)
        for t, by in ((logits.double(), "reference"), (logits, "reference"), (logits, backend))
    )
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1], truth[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_class_weights_are_those_of_torch(backend, dtype, reduction, smoothing):
    logits, target = rows_of(33, 131, dtype)
    target[5:9] = -100
    weight = torch.rand(131, device=DEVICE)
    weight[target[0]] = 0
    options = {"label_smoothing": smoothing, "reduction": reduction}
    truth = loss_and_gradient(
        F.cross_entropy, logits.double(), target, weight=weight.double(), **options
    )
    theirs = loss_and_gradient(F.cross_entropy, logits.float(), target, weight=weight, **options)
    options["weight"] = weight
    ours = loss_and_gradient(tilewise.cross_entropy, logits, target, **options, backend=backend)
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1].to(dtype), truth[1])


@pytest.mark.parametrize("options", [{}, ALL, {"reduction": "none"}, {"denom": 7}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_in_place_is_the_gradient_of_the_loss(backend, dtype, options):
    for classes in (1, 9, 200, 8200):
        logits, target = rows_of(5, classes, dtype)
        target[1] = -100
        weight = torch.rand(classes, device=DEVICE) + 0.5
        leaf = logits.clone().requires_grad_()
        loss = tilewise.cross_entropy(leaf, target, weight=weight, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        written = tilewise.cross_entropy_(logits, target, weight=weight, backend=backend, **options)
        torch.testing.assert_close(written, loss.detach(), rtol=0, atol=0)
        rounding = torch.finfo(dtype).eps * gradient.abs().amax()
        assert bool(((logits - gradient).abs() <= rounding).all())


def test_in_place_leaves_its_neighbours_alone(backend):
    memory = torch.randn(3, 4, 70, device=DEVICE)
    before, logits = memory.clone(), memory[:, :-1, 3:40]
    target = torch.randint(37, (3, 3), device=DEVICE)
    alone = logits.clone()
    loss = tilewise.cross_entropy_(logits, target, backend=backend)
    expected = tilewise.cross_entropy_(alone, target, backend=backend)
    torch.testing.assert_close((loss, logits), (expected, alone))
    memory[:, :-1, 3:40] = before[:, :-1, 3:40]
    assert torch.equal(memory, before)


def test_in_place_is_registered_properly(backend):
    if backend == "reference":
        pytest.skip("reference: launches nothing")
    logits, target = rows_of(4, 9)
    torch.library.opcheck(
        torch.ops.tilewise.cross_entropy_.default,
        (logits[None], target[None], None, None, -100, 0.0, 0.0, 0.0, 1.0, backend),
    )


def test_in_place_refuses_what_it_cannot_write():
    x, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="^cross_entropy_: logits must be without gradient, got"):
        tilewise.cross_entropy_(x.clone().requires_grad_(), target)
    for wrong in (torch.zeros(3, 2).t(), x[:1].expand(2, 3)):
        with pytest.raises(ValueError, match="^cross_entropy_: logits must be rows of neighbour"):
            tilewise.cross_entropy_(wrong, target)


def test_the_gradient_of_lse_is_the_softmax(backend):
    logits, target = rows_of(6, 33)
    target[2] = -100
    leaf, row = logits.clone().requires_grad_(), torch.tensor([2], device=DEVICE)
    _, lse = tilewise.cross_entropy_with_lse(leaf, target, backend=backend)
    assert lse[2] == 0
    (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    runs = [logits.double(), logits, *(nudged(logits) for _ in range(3))]
    expected, *theirs = (torch.softmax(run, -1).index_fill(0, row, 0) for run in runs)
    assert_right(gradient, theirs, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_narrow_and_misaligned_targets(backend, dtype):
    logits, target = rows_of(6, 130)
    narrow = torch.cat([target[:1], target]).to(dtype)[1:]
    loss, gradient = loss_and_gradient(tilewise.cross_entropy, logits, narrow, backend=backend)
    expected = loss_and_gradient(tilewise.cross_entropy, logits, target, backend=backend)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_denominators(backend):
    logits, target = rows_of(6, 9)
    target[1] = -100
    total, slope = loss_and_gradient(
        tilewise.cross_entropy, logits, target, reduction="sum", backend=backend
    )
    for denom in (4, 4.0, torch.tensor(4, device=DEVICE), torch.tensor([4.0], device=DEVICE)):
        loss, gradient = loss_and_gradient(
            tilewise.cross_entropy, logits, target, denom=denom, backend=backend
        )
        assert loss == total / 4
        assert torch.equal(gradient, slope / 4)
    target[:] = -100
    assert tilewise.cross_entropy(logits, target, denom=4, backend=backend) == 0


@pytest.mark.parametrize("scale", [0.0, 0.5, 65536.0])
def test_an_upstream_gradient_is_a_factor(backend, scale):
    logits, target = rows_of(5, 33)
    leaf = logits.requires_grad_()
    loss = tilewise.cross_entropy(leaf, target, reduction="none", backend=backend)
    one, scaled = (
        torch.autograd.grad(loss, leaf, torch.full_like(loss, g), retain_graph=True)[0]
        for g in (1.0, scale)
    )
    assert torch.equal(scaled, one * scale)


def test_a_class_that_is_nearly_certain_keeps_its_digits(backend):
    """In fp32 p - 1 has a few bits left, and so has the loss."""
    logits = torch.zeros(1, 1000, device=DEVICE)
    logits[0, 3] = 20
    target = torch.full((1,), 3, device=DEVICE)
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target)
    if backend == "reference":
        pytest.skip("reference: as PyTorch")
    ours = loss_and_gradient(tilewise.cross_entropy, logits, target, backend=backend)
    for mine, right in zip(ours, truth, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert bool(((mine.double() - right).abs() <= 8 * eps * right.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_logits_far_apart_and_rising(backend, dtype):
    """The sum's shift must follow: every block is far above the one before."""
    classes = 8200
    logits = torch.linspace(-6e4, 6e4, classes, device=DEVICE).to(dtype).repeat(3, 1)
    logits[1] = logits[1].flip(0)
    logits[2] = -6e4
    target = torch.tensor([classes - 1, 0, 5], device=DEVICE)
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, reduction="none")
    theirs = loss_and_gradient(F.cross_entropy, logits.float(), target, reduction="none")
    ours = loss_and_gradient(
        tilewise.cross_entropy, logits, target, reduction="none", backend=backend
    )
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1].to(dtype), truth[1])


@pytest.mark.parametrize("classes", [2, 1021, 8191, 262144])
def test_any_number_of_classes(backend, classes):
    if classes > 10000 and backend in ("triton", "cuda") and DEVICE == "cpu":
        pytest.skip(f"{backend}: too many to interpret")
    logits, target = rows_of(3, classes + 1)
    logits = logits[:, 1:]  # misaligned
    target[:2] = torch.tensor([0, classes - 1])
    target[2] %= classes
    options = {"reduction": "none", "label_smoothing": 0.1}
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, **options)
    theirs = loss_and_gradient(F.cross_entropy, logits, target, **options)
    ours = loss_and_gradient(tilewise.cross_entropy, logits, target, **options, backend=backend)
    for mine, yardstick, right in zip(ours, theirs, truth, strict=True):
        assert_right(mine, yardstick, right)

"""Cross-entropy: what agreement with the reference on random rows cannot say."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from loss_cases import DTYPES, OP, assert_right, loss_and_gradient, rows_of, runnable

import tilewise
from tilewise.op import wide_dtype
from tilewise.ops import cross_entropy as module


@pytest.fixture(params=[*OP.backends, "reference"])
def backend(request):
    return runnable(request.param)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_is_the_loss_of_torch(backend, dtype, reduction, smoothing):
    logits, target = rows_of(67, 131, dtype)
    target[5:9] = -100
    options = {"label_smoothing": smoothing, "reduction": reduction}
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, **options)
    theirs = loss_and_gradient(F.cross_entropy, logits.float(), target, **options)
    ours = loss_and_gradient(tilewise.cross_entropy, logits, target, **options, backend=backend)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1].to(dtype), truth[1])


@pytest.mark.parametrize("classes", [50257, 128256])
def test_many_classes(backend, classes):
    logits, target = rows_of(3, classes)
    target[1] = classes - 1
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, reduction="none")
    theirs = loss_and_gradient(F.cross_entropy, logits, target, reduction="none")
    ours = loss_and_gradient(
        tilewise.cross_entropy, logits, target, reduction="none", backend=backend
    )
    for mine, yardstick, right in zip(ours, theirs, truth, strict=True):
        assert_right(mine, yardstick, right)


def test_true_classes_at_the_ends_of_blocks(backend):
    classes = 8200
    ends = [1024 * n + i for n in range(9) for i in (-1, 0, 1)]
    places = [*ends[1:], classes - 1]
    logits, _ = rows_of(len(places), classes)
    target = torch.tensor(places, device=DEVICE)
    runs = [(t, "reference") for t in (logits.double(), logits)] + [(logits, backend)]
    truth, theirs, ours = (
        loss_and_gradient(tilewise.cross_entropy, t, target, reduction="none", backend=by)
        for t, by in runs
    )
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1], truth[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_numba_past_the_caches(dtype, monkeypatch):
    """To rows that begin on lines of the caches and end within one."""
    from tilewise.kernels.numba import _logits, _stream

    logits, target = rows_of(5, 2181, dtype)
    numbers, dlosses = (-100, 0.1, 0.0, 0.0, 1.0), torch.rand(1, 5, dtype=_logits._wide(logits))
    _, _, statistics = _logits.row_losses(logits[None], target[None], None, numbers)
    found = []
    for least in (_stream.STREAMED_BYTES, 0):
        monkeypatch.setattr(_stream, "STREAMED_BYTES", least)
        memory = torch.full((1, 5, 2240), 7, dtype=dtype)
        _logits.row_gradients(
            memory[..., :2181], dlosses, None, logits[None], target[None], None, statistics,
            0, 2181, numbers,
        )  # fmt: skip
        found.append(memory)
    assert torch.equal(*found)
    assert bool((found[1][..., 2181:] == 7).all()) and not bool((found[1][..., :2181] == 7).any())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradient_rows_sum_to_zero(backend, smoothing):
    logits, target = rows_of(37, 127)
    _, gradient = loss_and_gradient(
        tilewise.cross_entropy, logits, target, label_smoothing=smoothing, backend=backend,
        reduction="none",
    )  # fmt: skip
    rounding = torch.finfo(torch.float32).eps * gradient.double().abs().amax(-1)
    assert bool((gradient.double().sum(-1).abs() <= 127 * rounding).all())
    assert bool((gradient.abs().amax(-1) > 0).all())


def test_a_common_shift_changes_no_bit(backend):
    torch.manual_seed(0)
    logits = torch.randint(-64, 64, (9, 300), device=DEVICE) / 16  # exact, with 4096 added too
    target = torch.randint(300, (9,), device=DEVICE)
    options = {"reduction": "none", "backend": backend}
    near = loss_and_gradient(tilewise.cross_entropy, logits, target, **options)
    far = loss_and_gradient(tilewise.cross_entropy, logits + 4096, target, **options)
    assert torch.equal(near[0], far[0])
    assert torch.equal(near[1], far[1])


def test_the_gradient_of_a_sure_class_keeps_its_digits(backend):
    logits = torch.zeros(2, 8, device=DEVICE, dtype=torch.bfloat16)
    logits[:, 3] = 8  # p = 0.9977, and p - 1 has no digit left once p is a bfloat16
    target = torch.full((2,), 3, device=DEVICE)
    options = {"reduction": "none"}
    _, truth = loss_and_gradient(F.cross_entropy, logits.double(), target, **options)
    _, ours = loss_and_gradient(tilewise.cross_entropy, logits, target, **options, backend=backend)
    eps = torch.finfo(torch.bfloat16).eps
    assert bool(((ours.double() - truth).abs() <= eps * truth.abs()).all())


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_are_not_read(backend, ignore_index):
    logits, target = rows_of(6, 9)
    target[target == ignore_index] = 0
    options = {"ignore_index": ignore_index, "reduction": "none", "backend": backend}
    before = loss_and_gradient(tilewise.cross_entropy, logits, target, **options)
    target[[1, 4]] = ignore_index
    logits[1], logits[4, 3] = math.nan, math.inf
    after = loss_and_gradient(tilewise.cross_entropy, logits, target, **options)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now[[0, 2, 3, 5]], was[[0, 2, 3, 5]])
        assert torch.equal(now[[1, 4]], torch.zeros_like(now[[1, 4]]))


def test_nothing_but_ignored_rows(backend):
    logits, _ = rows_of(5, 9)
    target = torch.full((5,), -100, device=DEVICE)
    mean, _ = loss_and_gradient(tilewise.cross_entropy, logits, target, backend=backend)
    assert mean.isnan()
    total, gradient = loss_and_gradient(
        tilewise.cross_entropy, logits, target, reduction="sum", backend=backend
    )
    assert total == 0
    assert not gradient.any()


@pytest.mark.parametrize("wrong", [9, -1, -101, 2**40, -(2**40)])
def test_a_target_that_is_no_class(backend, wrong):
    logits, target = rows_of(6, 9)
    options = {"reduction": "none", "backend": backend}
    before = loss_and_gradient(tilewise.cross_entropy, logits, target, **options)
    target[2] = wrong
    after = loss_and_gradient(tilewise.cross_entropy, logits, target, **options)
    for was, now in zip(before, after, strict=True):
        assert bool(now[2].isnan().all())
        kept = [0, 1, 3, 4, 5]
        assert torch.equal(now[kept], was[kept])
    assert tilewise.cross_entropy(logits, target, backend=backend).isnan()
    sentence = f"cross_entropy: target must be -100 or from 0 to 8, got {wrong} in row 2"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tilewise.cross_entropy(logits, target, check_inputs=True, backend=backend)


def test_checked_inputs_that_are_right(backend):
    logits, target = rows_of(6, 9)
    target[3] = -100
    checked = tilewise.cross_entropy(logits, target, check_inputs=True, backend=backend)
    assert torch.equal(checked, tilewise.cross_entropy(logits, target, backend=backend))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [5, 8200])
def test_infinite_and_missing_logits_are_those_of_torch(backend, classes, smoothing):
    logits, target = rows_of(12, classes)
    target[:] = classes - 2
    logits[0, 0] = -math.inf
    logits[1, classes - 2] = -math.inf
    logits[2, :-1] = -math.inf
    logits[3] = -math.inf
    logits[4, 0] = math.inf
    logits[5, classes - 2] = math.inf
    logits[6, classes - 1] = math.nan
    logits[7, : classes - 2] = -math.inf
    logits[8, : classes - 2] = math.nan  # whole blocks of it, with a shift and without
    logits[9, 2:] = math.nan
    logits[10, : classes - 2] = -math.inf
    logits[10, 1] = math.nan
    options = {"reduction": "none", "label_smoothing": smoothing}
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, **options)
    theirs = loss_and_gradient(F.cross_entropy, logits, target, **options)
    ours = loss_and_gradient(tilewise.cross_entropy, logits, target, **options, backend=backend)
    assert_right(ours[0], theirs[0], truth[0])
    assert_right(ours[1], theirs[1], truth[1])


def views():
    x = torch.randn(3, 5, 7, 11, device=DEVICE)
    return {
        "all tokens but the last": x[0, :, :-1],
        "every other row": x[0, 0, ::2],
        "part of each row": x[0, 0, :, 2:9],
        "one row for all": x[0, 0, :1].expand(7, -1),
        "batch and seq exchanged": x[0].transpose(0, 1),
        "one row": x[0, 0, 0],
        "four dimensions": x,
    }


@pytest.mark.parametrize("view", views())
def test_logits_are_not_copied(backend, view, monkeypatch):
    if backend == "reference":
        pytest.skip("reference: launches nothing")
    logits, seen = views()[view], []
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=DEVICE)
    forward = module._forward

    def record(*args):
        seen.append(args[0].data_ptr())
        return forward(*args)

    monkeypatch.setattr(module, "_forward", record)
    losses = tilewise.cross_entropy(logits, target, reduction="none", backend=backend)
    assert seen == [logits.data_ptr()]
    copied = tilewise.cross_entropy(logits.contiguous(), target, reduction="none", backend=backend)
    torch.testing.assert_close(losses, copied)  # CUDA's order of a sum follows the alignment


@pytest.mark.parametrize("view", views())
def test_the_gradient_of_a_view_is_that_of_its_copy(backend, view):
    logits = views()[view].requires_grad_()
    target = torch.randint(logits.shape[-1], logits.shape[:-1], device=DEVICE)
    loss = tilewise.cross_entropy(logits, target, backend=backend)
    copy = logits.detach().contiguous().requires_grad_()
    loss_of_copy = tilewise.cross_entropy(copy, target, backend=backend)
    (gradient,), (expected,) = (
        torch.autograd.grad(*pair) for pair in ((loss, logits), (loss_of_copy, copy))
    )
    torch.testing.assert_close((loss, gradient), (loss_of_copy, expected))


@pytest.mark.parametrize("rows", [16384, 16385, 50001])
def test_the_sum_does_not_know_the_number_of_threads(backend, rows):
    if backend in ("triton", "cuda") and DEVICE == "cpu":
        pytest.skip(f"{backend}: too many rows to interpret")
    logits, target = rows_of(rows, 4)
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses.append(loss_and_gradient(
                tilewise.cross_entropy, logits, target, reduction="sum", backend=backend
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for loss, gradient in losses[1:]:
        assert torch.equal(loss, losses[0][0])
        assert torch.equal(gradient, losses[0][1])
    truth, _ = loss_and_gradient(F.cross_entropy, logits.double(), target, reduction="sum")
    theirs, _ = loss_and_gradient(F.cross_entropy, logits, target, reduction="sum")
    assert_right(losses[0][0], theirs, truth)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (2, 3, 2, 7), (0, 7)])
def test_any_leading_shape(backend, shape):
    logits = torch.randn(shape, device=DEVICE)
    target = torch.randint(7, shape[:-1], device=DEVICE)
    losses = tilewise.cross_entropy(logits, target, reduction="none", backend=backend)
    assert losses.shape == target.shape
    flat = tilewise.cross_entropy(
        logits.view(-1, 7), target.view(-1), reduction="none", backend=backend
    )
    assert torch.equal(losses.view(-1), flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_leaves_it_in_single_precision(backend, dtype):
    if backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip(f"{backend}: has no float64")
    logits, target = rows_of(6, 9, dtype)
    plain = tilewise.cross_entropy(logits, target, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = tilewise.cross_entropy(logits, target, backend=backend)
    assert cast.dtype == plain.dtype == wide_dtype(dtype)
    assert torch.equal(cast, plain)


X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
REFUSED = [
    (TypeError, "logits must be floating point, got torch.int64", T, T, {}),
    (
        TypeError,
        "target must be one of torch.int64, torch.int32, torch.uint8, got torch.int16",
        X,
        T.short(),
        {},
    ),
    (ValueError, "logits must be [..., classes], got a scalar", X[0, 0], T, {}),
    (ValueError, "logits must have at least one class, got [2, 0]", X[:, :0], T, {}),
    (
        ValueError,
        "logits must be [..., classes] and target [...], got [2, 3] and [1]",
        X,
        T[:1],
        {},
    ),
    (RuntimeError, "target must be on cpu, got meta", X, T.to("meta"), {}),
    (
        ValueError,
        "label_smoothing must be between 0 and 1, got 1.5",
        X,
        T,
        {"label_smoothing": 1.5},
    ),
    (
        ValueError,
        "reduction must be one of mean, sum, none, got 'max'",
        X,
        T,
        {"reduction": "max"},
    ),
    (ValueError, "z_loss must be at least 0 and finite, got -1.0", X, T, {"z_loss": -1.0}),
    (ValueError, "softcap must be above 0 and finite, or None, got 0.0", X, T, {"softcap": 0.0}),
    (ValueError, "logit_scale must be finite, got inf", X, T, {"logit_scale": math.inf}),
    (TypeError, "weight must be floating point, got torch.int64", X, T, {"weight": T}),
    (ValueError, "weight must be [3], got [2]", X, T, {"weight": X[:, 0]}),
    (RuntimeError, "weight must be on cpu, got meta", X, T, {"weight": X[0].to("meta")}),
    (
        ValueError,
        "weight must be without gradient, got requires_grad=True",
        X,
        T,
        {"weight": torch.ones(3, requires_grad=True)},
    ),
    (
        ValueError,
        "denom must come with reduction 'mean', got 'sum'",
        X,
        T,
        {"denom": 2, "reduction": "sum"},
    ),
    (ValueError, "denom must be one number, got [3]", X, T, {"denom": X[0]}),
    (RuntimeError, "denom must be on cpu, got meta", X, T, {"denom": X[0, 0].to("meta")}),
    (TypeError, "denom must be a tensor or a number, got str", X, T, {"denom": "2"}),
    (
        ValueError,
        "backend must be one of cuda, numba, triton, reference, got 'jax'",
        X,
        T,
        {"backend": "jax"},
    ),
    (TypeError, "takes torch.bfloat16, torch.float16, torch.float32, torch.float64", X.to(
        torch.float8_e5m2), T, {"backend": "numba"}),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, logits, target, options", REFUSED)
def test_refuses(error, sentence, logits, target, options):
    with pytest.raises(error, match=f"^cross_entropy: .*{re.escape(sentence)}"):
        tilewise.cross_entropy(logits, target, **options)

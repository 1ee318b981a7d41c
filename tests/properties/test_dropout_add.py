"""Dropout and a residual: what equality with the reference on one seed cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise
from tilewise.rng import keep_mask

INF, NAN = float("inf"), float("nan")
MINE = [p for p in BACKENDS if p.values[0].name == "dropout_add"]
X, RESIDUAL = torch.randn(2, 6, 130, device=DEVICE).unbind()


@pytest.mark.parametrize("each", [False, True], ids=["one seed", "a seed a row"])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("op, backend", MINE)
def test_keeps_what_the_rule_says_forwards_and_backwards(op, backend, p, each):
    case_or_skip(op, backend)
    seed = torch.arange(6, device=DEVICE) * 2**40 if each else -(2**63)
    rows = 0 if each else torch.arange(6, device=DEVICE)
    kept = keep_mask(p, seed, 2**33, rows, 130)
    x = X.clone().requires_grad_()
    y = tilewise.dropout_add(x, torch.zeros_like(x), p, seed=seed, offset=2**33, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y != 0, kept)
    assert torch.equal(dx != 0, kept)
    torch.testing.assert_close(y[kept], x.detach()[kept] / (1 - p))
    torch.testing.assert_close(dx[kept], torch.full_like(dx[kept], 1 / (1 - p) if p < 1 else 0))


@pytest.mark.parametrize("op, backend", MINE)
def test_what_is_dropped_may_be_anything(op, backend):
    case_or_skip(op, backend)
    kept = keep_mask(0.5, 1, 0, torch.arange(6, device=DEVICE), 130)
    x = torch.where(kept, X, torch.where(X > 0, NAN, INF))
    y = tilewise.dropout_add(x, RESIDUAL, 0.5, seed=1, backend=backend)
    assert bool(y.isfinite().all())
    assert torch.equal(y[~kept], RESIDUAL[~kept])


@pytest.mark.parametrize("op, backend", MINE)
def test_nothing_is_kept_but_the_seed_which_the_generator_draws(op, backend):
    case_or_skip(op, backend)
    x = X.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        generator = torch.Generator(DEVICE).manual_seed(7)
        y = tilewise.dropout_add(x, RESIDUAL, 0.5, generator=generator, backend=backend)
    assert [t.numel() for t in saved] == [1]
    (dx,) = torch.autograd.grad(y.sum(), x)
    kept = y.detach() != RESIDUAL
    assert torch.equal(dx != 0, kept)
    assert 0.4 < float(kept.float().mean()) < 0.6
    generator.manual_seed(7)
    again = tilewise.dropout_add(X, RESIDUAL, 0.5, generator=generator, backend=backend)
    assert torch.equal(again, y)
    assert not torch.equal(
        tilewise.dropout_add(X, RESIDUAL, 0.5, generator=generator, backend=backend), y
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op, backend", MINE)
def test_a_wide_residual_is_added_before_anything_is_rounded(op, backend, dtype):
    case_or_skip(op, backend)
    x, residual = X.to(dtype).requires_grad_(), RESIDUAL.clone().requires_grad_()
    y = tilewise.dropout_add(x, residual, 0.5, seed=1, backend=backend)
    plain = tilewise.dropout_add(x.float(), residual, 0.5, seed=1, backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(y, plain)
    dx, dresidual = torch.autograd.grad(y, (x, residual), RESIDUAL)
    assert dx.dtype == dtype
    assert torch.equal(dresidual, RESIDUAL)


@pytest.mark.parametrize("op, backend", MINE)
def test_only_in_training(op, backend):
    case_or_skip(op, backend)
    y = tilewise.dropout_add(X, RESIDUAL, 0.5, training=False, backend=backend)
    assert torch.equal(y, X + RESIDUAL)


REFUSED = [
    (TypeError, "x must be floating point, got torch.int64", (X.long(), RESIDUAL), {}),
    (TypeError, "residual must be torch.float16 or torch.float32, got torch.bfloat16",
     (X.half(), RESIDUAL.bfloat16()), {}),
    (ValueError, r"of one shape, got \[6, 130\] and \[130\]", (X, RESIDUAL[0]), {}),
    (ValueError, "p must be from 0 to 1, got 1.5", (X, RESIDUAL, 1.5), {}),
    (ValueError, "must be given seed or generator, got both", (X, RESIDUAL),
     {"seed": 1, "generator": torch.Generator()}),
    (RuntimeError, "residual must be on .* got meta", (X, RESIDUAL.to("meta")), {}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments, options", REFUSED)
def test_wrong_input_is_refused(error, message, arguments, options):
    with pytest.raises(error, match="^dropout_add: .*" + message):
        tilewise.dropout_add(*arguments, **options)

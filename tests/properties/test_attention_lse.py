"""The lse of attention and what is merged by it; derivatives, and all options at once."""

from functools import partial

import pytest
import torch
from attention_cases import EVERY, able, inputs, near
from cases import DEVICE

from tilewise import attention, attention_with_lse, merge_attention
from tilewise.ops.attention import ATTENTION

INF = float("inf")
ALL = {
    "window": (6, 2), "softcap": 1.5, "dropout_p": 0.3, "seed": 11, "offset": 2, "scale": 0.4,
}  # fmt: skip


def everything(dtype):
    """Tensors and options: all there are at once, but for a query that attends to nothing."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = inputs(4, 7, dim=3, v_dim=2, dtype=dtype)
    bias = torch.randn(2, 1, 7, generator=generator).to(DEVICE, dtype)
    sinks = torch.randn(2, generator=generator).to(DEVICE, dtype)
    mask = torch.ones(2, 1, 4, 7, dtype=torch.bool, device=DEVICE)
    mask[:, :, 1, 3:5] = False
    slopes = torch.tensor([0.25, 0.5], device=DEVICE)
    return (q, k, v, bias, sinks), ALL | {"mask": mask, "alibi_slopes": slopes}


@EVERY
def test_the_gradient_of_lse_is_the_probabilities(backend):
    q, k, v = (t.detach().requires_grad_() for t in inputs(5, 20))
    able(backend, q, k, v)
    eye = torch.eye(20, device=DEVICE).expand(2, 1, 20, 20)
    p = attention(q, k, eye, backend="reference").detach()
    _, lse = attention_with_lse(q, k, v, scale=8**-0.5, backend=backend)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    expected = 8**-0.5 * (p @ k.detach()), 8**-0.5 * (p.mT @ q.detach()).sum(1, keepdim=True)
    near([dq, dk], expected)
    assert not dv.any()


@EVERY
def test_the_gradient_of_lse_to_a_bias_is_the_probabilities(backend):
    q, k, v = inputs(5, 20)
    bias = torch.randn(2, 2, 5, 20, device=DEVICE).requires_grad_()
    able(backend, q, k, v, bias)
    eye = torch.eye(20, device=DEVICE).expand(2, 1, 20, 20)
    p = attention(q, k, eye, bias.detach(), backend="reference")
    _, lse = attention_with_lse(q, k, v, bias, backend=backend)
    near(torch.autograd.grad(lse.sum(), bias), [p])


@EVERY
@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_what_is_not_used_costs_the_gradient_nothing(backend, used):
    leaves = [t.detach().requires_grad_() for t in inputs(5, 20)]
    able(backend, *leaves)

    def loss(backend):
        out, lse = attention_with_lse(*leaves, backend=backend)
        parts = {"out": [out], "lse": [lse], "both": [out, lse]}[used]
        return sum(part.square().sum() for part in parts)

    ours, theirs = (
        torch.autograd.grad(loss(name), leaves, materialize_grads=True)
        for name in (backend, "reference")
    )
    near(ours, theirs)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lse_is_wide_and_out_the_same_as_without(backend, dtype):
    q, k, v = inputs(5, 20, dtype=dtype)
    able(backend, q, k, v)
    out, lse = attention_with_lse(q, k, v, causal=True, backend=backend)
    assert torch.equal(out, attention(q, k, v, causal=True, backend=backend))
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert lse.shape == q.shape[:3]


@EVERY
def test_with_nothing_to_attend_to_lse_is_minus_infinity(backend):
    leaves = [t.detach().requires_grad_() for t in inputs(12, 5)]
    able(backend, *leaves)
    out, lse = attention_with_lse(*leaves, causal=True, backend=backend)
    assert bool((lse[:, :, :7] == -INF).all())
    assert bool(lse[:, :, 7:].isfinite().all())
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, :7].any()


# --- Merging.


def part(tensors, keys, **options):
    q, k, v = tensors
    return attention_with_lse(q, k[:, :, keys], v[:, :, keys], **options, backend="reference")


def test_merging_is_associative_and_commutes():
    tensors = inputs(5, 37, dtype=torch.float64)
    a, b, c = (part(tensors, keys) for keys in (slice(9), slice(9, 20), slice(20, None)))
    left = merge_attention(*merge_attention(*a, *b), *c)
    near(left, merge_attention(*a, *merge_attention(*b, *c)))
    near(left, part(tensors, slice(None)))
    assert all(map(torch.equal, merge_attention(*a, *b), merge_attention(*b, *a)))


def test_the_gradient_goes_through_a_merge():
    leaves = [t.detach().requires_grad_() for t in inputs(5, 37, dtype=torch.float64)]
    sinks = torch.randn(2, dtype=torch.float64, device=DEVICE).requires_grad_()

    def gradients(out, lse):
        loss = out.square().sum() + lse.square().sum()
        return torch.autograd.grad(loss, (*leaves, sinks))

    halves = part(leaves, slice(20), sinks=sinks), part(leaves, slice(20, None))
    whole = part(leaves, slice(None), sinks=sinks)
    near(gradients(*merge_attention(*halves[0], *halves[1])), gradients(*whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_with_nothing_to_attend_to_changes_nothing(dtype):
    out = torch.randn(2, 2, 5, 8, device=DEVICE, dtype=dtype).requires_grad_()
    lse = torch.randn(2, 2, 5, device=DEVICE).requires_grad_()
    nothing = torch.zeros_like(out), torch.full_like(lse, -INF)
    leaves = [t.detach().requires_grad_() for t in nothing]
    merged = merge_attention(out, lse, *leaves)
    assert torch.equal(merged[0], out)
    near(merged[1:], [lse])
    grads = torch.autograd.grad([t.sum() for t in merged], (out, lse, *leaves))
    assert torch.equal(grads[0], torch.ones_like(out))
    assert not any(g.any() or g.isnan().any() for g in grads[2:])
    assert grads[1].isfinite().all()
    both = merge_attention(*nothing, *leaves)
    assert not both[0].any()
    assert bool((both[1] == -INF).all())
    grads = torch.autograd.grad([t.sum() for t in both], leaves)
    assert not any(g.any() for g in grads)


def test_far_parts_weigh_nothing():
    out = torch.ones(1, 1, 1, 2, device=DEVICE)
    lse = torch.zeros(1, 1, 1, device=DEVICE)
    merged = merge_attention(out, lse + 3e4, -out, lse - 3e4)
    assert torch.equal(merged[0], out)
    assert torch.equal(merged[1], lse + 3e4)


# --- All at once.


@EVERY
@pytest.mark.parametrize("op", [attention, attention_with_lse])
def test_derivatives(backend, op):
    tensors, options = everything(torch.float64)
    if backend != "reference" and torch.float64 not in ATTENTION.backends[backend].dtypes:
        pytest.skip(f"{backend}: finite differences need float64")
    able(backend, *tensors, **options)
    leaves = [t.detach().requires_grad_() for t in tensors]
    call = partial(op, **options, backend=backend)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_derivatives_of_a_merge():
    shapes = (1, 2, 3, 2), (1, 2, 3), (1, 2, 3, 2), (1, 2, 3)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(merge_attention, leaves)
    assert torch.autograd.gradgradcheck(merge_attention, leaves)


@EVERY
@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_wanted_gets_a_gradient(backend, wanted):
    tensors, options = everything(torch.float32)
    able(backend, *tensors, **options)
    leaves = [t.detach().requires_grad_() for t in tensors]
    one = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    whole = torch.autograd.grad(attention(*leaves, **options, backend=backend).sum(), leaves)
    alone = torch.autograd.grad(attention(*one, **options, backend=backend).sum(), one[wanted])
    near(alone, whole[wanted : wanted + 1])


@EVERY
def test_all_at_once_compiled(backend):
    tensors, options = everything(torch.float32)
    able(backend, *tensors, **options)
    leaves = [t.detach().requires_grad_() for t in tensors]
    call = partial(attention_with_lse, **options, backend=backend)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)

    def run(call):
        outs = call(*leaves)
        return [*outs, *torch.autograd.grad([out.sum() for out in outs], leaves)]

    near(run(compiled), run(call))


@EVERY
def test_all_at_once_is_the_same_every_time(backend):
    tensors, options = everything(torch.float32)
    able(backend, *tensors, **options)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def run():
        out = attention(*leaves, **options, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, run(), first))


def test_transformed_it_is_the_reference():
    """vmap has its own batch dimension; the mask of dropout is that of each sample alone."""
    tensors, options = everything(torch.float64)
    several = [torch.stack([t, t + 1]) for t in tensors]
    call = partial(attention, **options)
    expected = [call(*[t[i] for t in several]) for i in range(2)]
    torch.testing.assert_close(torch.vmap(call)(*several), torch.stack(expected))
    tangents = [t.cos() for t in tensors]
    _, ours = torch.func.jvp(call, tensors, tuple(tangents))
    _, theirs = torch.func.jvp(partial(call, backend="reference"), tensors, tuple(tangents))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_autocast_leaves_a_bias_in_fp32(backend):
    (q, k, v, bias, sinks), options = everything(torch.float32)
    low = [t.bfloat16() for t in (q, k, v)]
    able(backend, *low, bias, sinks, **options)
    call = partial(attention, **options, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(call(q, k, v, bias, sinks), call(*low, bias, sinks))
        lowered = call(q, k, v, bias.half(), sinks.half())
    assert torch.equal(lowered, call(*low, bias.half().bfloat16(), sinks.half().bfloat16()))


def test_the_pairs_that_count_as_work_are_those_that_meet():
    q, k, v = inputs(9, 14)
    for causal in (False, True):
        for window in (None, (3, None), (None, 2), (2, 1), (0, 0), (20, 20)):
            eye = torch.eye(14, device=DEVICE).expand(2, 1, 14, 14)
            options = {"causal": causal, "window": window}
            pairs = attention(q, k, eye, **options, backend="reference").count_nonzero()
            assert ATTENTION.flops(q, k, v, **options) == int(pairs) * 2 * (8 + 8)

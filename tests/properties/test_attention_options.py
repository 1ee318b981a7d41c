"""What each option of attention means, said by another option or by other inputs."""

import pytest
import torch
from attention_cases import EVERY, able, inputs, near, with_gradients
from cases import DEVICE

from tilewise import attention, attention_with_lse
from tilewise.rng import keep_mask

pytestmark = pytest.mark.thinned(2)

INF, NAN = float("inf"), float("nan")
SEEN_BOTH = pytest.mark.parametrize("seq_q, seq_k", [(5, 20), (20, 5), (12, 12)])


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)


def distance(seq_q, seq_k):
    """How many positions each key lies to the right of each query."""
    own = torch.arange(seq_q, device=DEVICE)[:, None] + seq_k - seq_q
    return torch.arange(seq_k, device=DEVICE) - own


# --- Window.


@EVERY
@SEEN_BOTH
@pytest.mark.parametrize(
    "window, causal",
    [((3, None), False), ((None, 2), False), ((3, 2), False), ((0, 0), False), ((4, 6), True),
     ((50, 50), False), ((None, 0), False)],
)  # fmt: skip
def test_a_window_is_a_mask(backend, seq_q, seq_k, window, causal):
    tensors, away = inputs(seq_q, seq_k), distance(seq_q, seq_k)
    left, right = (10**6 if n is None else n for n in window)
    mask = (away >= -left) & (away <= (0 if causal else right))
    ours = with_gradients(backend, *tensors, window=window, causal=causal)
    near(ours, with_gradients("reference", *tensors, mask=mask))


@EVERY
def test_a_window_without_limits_is_none(backend):
    tensors = inputs(5, 20)
    expected = with_gradients(backend, *tensors)
    for a, b in zip(with_gradients(backend, *tensors, window=(None, None)), expected, strict=True):
        assert torch.equal(a, b)


# --- ALiBi.


@EVERY
@SEEN_BOTH
@pytest.mark.parametrize("each", [False, True], ids=["heads", "batch and heads"])
def test_slopes_are_a_bias_by_distance(backend, seq_q, seq_k, each):
    tensors = inputs(seq_q, seq_k)
    slopes = torch.tensor([[0.5, 0.25], [0.1, 0.9]], device=DEVICE)
    slopes = slopes if each else slopes[0]
    bias = -slopes[..., None, None] * distance(seq_q, seq_k).abs()
    ours = with_gradients(backend, *tensors, alibi_slopes=slopes)
    near(ours, with_gradients("reference", *tensors, bias.expand(2, 2, -1, -1))[:4])


# --- Softcap.


@EVERY
def test_no_score_passes_the_softcap(backend):
    q, k, v = inputs(5, 20)
    q = 1000 * q
    able(backend, q, k, v, softcap=2.0)
    eye = torch.eye(20, device=DEVICE).expand(2, 1, 20, 20)
    p, lse = attention_with_lse(q, k, eye, softcap=2.0, backend=backend)
    eps = 100 * torch.finfo(torch.float32).eps
    assert float(p.min()) >= torch.tensor(-4.0).exp() / 20 * (1 - eps)
    assert float(lse.abs().max()) <= 2 + torch.tensor(20.0).log() + eps


@EVERY
def test_a_bias_comes_after_the_softcap(backend):
    q, k, v = inputs(5, 20)
    bias = 10 * randn(2, 5, 20)
    able(backend, q, k, v, bias, softcap=0.5)
    _, lse = attention_with_lse(0 * q, k, v, bias, softcap=0.5, backend=backend)
    near([lse], [torch.logsumexp(bias, -1).expand(2, -1, -1)])


# --- Bias.


@EVERY
@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 20), (1, 2, 1, 20), (2, 5, 20), (5, 1), (20,), (1,), ()], ids=str
)
def test_the_gradient_of_a_bias_is_summed_over_what_is_broadcast(backend, shape):
    tensors, bias = inputs(5, 20), randn(*shape)
    full = bias.expand(2, 2, 5, 20).contiguous()
    *ours, dbias = with_gradients(backend, *tensors, bias)
    *expected, whole = with_gradients("reference", *tensors, full)
    near([*ours, dbias], [*expected, whole.sum_to_size(shape)])


@EVERY
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1), (2, 3, 1, 0)], ids=str)
def test_a_bias_lies_in_memory_as_it_likes(backend, order):
    tensors, bias = inputs(5, 20), randn(2, 2, 5, 20)
    laid_out = torch.empty_permuted(bias.shape, order, device=DEVICE).copy_(bias)
    near(with_gradients(backend, *tensors, laid_out), with_gradients("reference", *tensors, bias))


@EVERY
def test_a_bias_of_minus_infinity_is_a_mask(backend):
    tensors = inputs(5, 20)
    mask = torch.rand(2, 1, 5, 20, device=DEVICE) < 0.6
    mask[:, :, 3] = False  # nothing to attend to
    bias = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -INF)
    *ours, dbias = with_gradients(backend, *tensors, bias)
    near(ours, with_gradients("reference", *tensors, mask=mask))
    assert not ours[0][:, :, 3].any()
    assert not dbias[~mask].any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_bias_may_be_fp32_and_its_gradient_is(backend, dtype):
    q, k, v = inputs(5, 20, dtype=dtype)
    bias, sinks = randn(2, 5, 20), randn(2)
    able(backend, q, k, v, bias, sinks)
    *_, dbias, dsinks = with_gradients(backend, q, k, v, bias, sinks)
    assert dbias.dtype == dsinks.dtype == torch.float32
    *_, dbias, dsinks = with_gradients(backend, q, k, v, bias.to(dtype), sinks.to(dtype))
    assert dbias.dtype == dsinks.dtype == dtype


@EVERY
@pytest.mark.parametrize("shape", [(2, 1, 1, 20), (20,)], ids=str)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_bias_behind_padding_is_never_seen(backend, shape, poison):
    q, k, v = inputs(5, 20)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    mask[..., 13:] = False
    bias = randn(2, 2, 5, 20)
    clean = with_gradients(backend, q, k, v, bias, mask=mask)
    for t in (k, v):
        t[:, :, 13:] = poison
    bias[..., 13:] = poison
    ours = with_gradients(backend, q, k, v, bias, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert not ours[4][..., 13:].any()


# --- Sinks.


@EVERY
@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_is_a_key_without_a_value(backend, causal):
    q, k, v = inputs(12, 20)
    sinks, bias = randn(2), randn(2, 2, 12, 20)
    ours = with_gradients(backend, q, k, v, bias, sinks, causal=causal)
    if causal:
        hidden = distance(12, 20) > 0
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
    column = sinks[:, None, None].expand(2, 2, 12, 1)
    whole = torch.cat([bias, column], -1)
    if causal:
        whole = whole.masked_fill(torch.nn.functional.pad(hidden, (0, 1)), -INF)
    out, dq, dk, dv, dbias = with_gradients("reference", q, k, v, whole)
    expected = [out, dq, dk[:, :, :-1], dv[:, :, :-1], dbias[..., :-1]]
    near(ours, [*expected, dbias[..., -1].sum((0, 2))])


@EVERY
@pytest.mark.parametrize("hidden", ["by a mask", "by the window", "by a bias"])
def test_with_only_a_sink_out_is_zero_and_lse_the_sink(backend, hidden):
    q, k, v = (t.detach().requires_grad_() for t in inputs(12, 5))
    sinks = randn(2).requires_grad_()
    bias, options = None, {}
    if hidden == "by a mask":
        options["mask"] = torch.zeros(2, 1, 12, 1, dtype=torch.bool, device=DEVICE)
    elif hidden == "by the window":
        options["window"] = (None, 0)  # of the first queries: there are more than keys
    else:
        bias = torch.full((12, 1), -INF, device=DEVICE)
    able(backend, q, k, v, bias, sinks, **options)
    out, lse = attention_with_lse(q, k, v, bias, sinks, **options, backend=backend)
    rows = slice(7) if hidden == "by the window" else slice(12)
    assert not out[:, :, rows].any()
    near([lse[:, :, rows]], [sinks[:, None].expand(2, 2, len(range(12)[rows]))])
    grads = torch.autograd.grad(
        out[:, :, rows].sum() + lse[:, :, rows].sum(), (q, k, v, sinks), allow_unused=True
    )
    assert not any(g is not None and g.any() for g in grads[:3])
    near([grads[3]], [torch.full((2,), 2.0 * len(range(12)[rows]), device=DEVICE)])


@EVERY
def test_a_sink_of_minus_infinity_is_none(backend):
    tensors = inputs(12, 5)
    sinks = torch.full((2,), -INF, device=DEVICE)
    *ours, dsinks = with_gradients(backend, *tensors, None, sinks, causal=True)
    near(ours, with_gradients("reference", *tensors, causal=True))
    assert not dsinks.any()


# --- Dropout.


def identity(seq_k, requires_grad=False):
    v = torch.eye(seq_k, device=DEVICE).expand(2, 1, seq_k, seq_k).contiguous()
    return v.requires_grad_(requires_grad)


@EVERY
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seq_q, seq_k", [(5, 21), (70, 37)])
def test_dropout_keeps_what_the_rule_says_forwards_and_backwards(backend, p, seq_q, seq_k):
    q, k, _ = inputs(seq_q, seq_k)
    drop = {"dropout_p": p, "seed": -(2**62), "offset": 2**33}
    able(backend, q, k, k, **drop)
    rows = torch.arange(2 * 2 * seq_q, device=DEVICE).view(2, 2, seq_q)
    kept = keep_mask(p, drop["seed"], drop["offset"], rows, seq_k)
    v = identity(seq_k, requires_grad=True)
    out = attention(q, k, v, **drop, backend=backend)
    plain = attention(q, k, v, backend="reference").detach()
    assert torch.equal(out != 0, kept)
    near([out * (1 - p)], [torch.where(kept, plain, 0)])
    (dv,) = torch.autograd.grad(out.sum(), v)
    near([dv[..., 0]], [out.detach().sum((1, 2), keepdim=True)[:, 0]])


@EVERY
def test_dropout_does_not_depend_on_who_shares_the_keys(backend):
    """Rows count query heads."""
    q, k, v = inputs(5, 20, heads=4, kv_heads=2)
    drop = {"dropout_p": 0.4, "seed": 5}
    ours = with_gradients(backend, q, k, v, **drop)
    own = with_gradients(
        "reference", q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), **drop
    )
    grouped = [t.view(2, 2, 2, 20, 8).sum(2) for t in own[2:]]
    near(ours, [*own[:2], *grouped])


@EVERY
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(backend, p):
    tensors = inputs(5, 20)
    ours = with_gradients(backend, *tensors, dropout_p=p, seed=1)
    plain = with_gradients(backend, *tensors)
    assert all(torch.equal(a, b * (1 - p)) for a, b in zip(ours, plain, strict=True))


@EVERY
def test_dropout_leaves_lse_as_it_is(backend):
    q, k, v = inputs(5, 20)
    able(backend, q, k, v, dropout_p=0.5)
    _, lse = attention_with_lse(q, k, v, dropout_p=0.5, seed=3, backend=backend)
    near([lse], [attention_with_lse(q, k, v, backend="reference")[1]])


@EVERY
def test_a_seed_is_a_number_or_a_tensor_or_drawn(backend):
    q, k, v = inputs(5, 20)
    able(backend, q, k, v, dropout_p=0.5)

    def run(**drop):
        return attention(q, k, v, dropout_p=0.5, **drop, backend=backend)

    number, tensor = 2**40 + 1, torch.tensor(2**40 + 1, device=DEVICE)
    expected = run(seed=number, offset=number)
    assert torch.equal(run(seed=tensor, offset=tensor), expected)
    assert torch.equal(run(seed=tensor, offset=number), expected)
    assert not torch.equal(run(seed=number), expected)
    drawn = [run(generator=torch.Generator(DEVICE).manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn)
    torch.manual_seed(7)
    first, second = run(), run()
    assert torch.equal(first, drawn[0])
    assert not torch.equal(first, second)


@EVERY
def test_nan_reaches_the_gradient_of_its_sink(backend):
    q, k, v = inputs(5, 7, dtype=torch.bfloat16)
    q[0, 1, 2] = NAN
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    able(backend, q, k, v, None, sinks)
    out = attention(q, k, v, sinks=sinks, backend=backend)
    (dsinks,) = torch.autograd.grad(out.sum(), sinks)
    assert dsinks.isnan().tolist() == [False, True]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 19, 33])
def test_nan_is_in_every_row_that_it_was_a_score_of(backend, dtype, place):
    """And in no other; a score of many among them, in a tile that is not the first."""
    q, k, v = inputs(20, 150, dtype=dtype)
    able(backend, q, k, v)
    q, k = q.clone(), k.clone()
    if place < 20:
        q[0, 1, place, 2] = NAN
    else:
        k[1, 0, place + 110, 3] = NAN
    rows = attention(q, k, v, backend=backend).isnan()
    expected = torch.zeros_like(rows)
    if place < 20:
        expected[0, 1, place] = True
    else:
        expected[1] = True
    assert torch.equal(rows, expected)

"""What equality with the reference cannot say: symmetries, layouts, poison."""

from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from attention_cases import EVERY, able, inputs, near, with_gradients
from cases import DEVICE

from tilewise import attention, attention_with_lse, merge_attention
from tilewise.ops.attention import ATTENTION, attention_reference

# log2(e) to 45 digits
LOG2_E = Decimal("1.44269504088896340735992468100189213742664595")


@EVERY
@pytest.mark.parametrize("seq_q, seq_k", [(5, 5), (3, 20), (20, 3), (66, 130)])
def test_causal_is_the_mask_aligned_at_the_last_query(backend, seq_q, seq_k):
    if backend == "triton" and DEVICE == "cpu" and seq_q == 66:
        pytest.skip("triton: slow in the interpreter, and the declared sizes have it")
    q, k, v = inputs(seq_q, seq_k)
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool, device=DEVICE).tril(seq_k - seq_q)
    near(with_gradients(backend, q, k, v, causal=True), with_gradients(backend, q, k, v, mask=mask))


@EVERY
@pytest.mark.parametrize("first", [1, 17, 32])
def test_queries_do_not_see_each_other(backend, first):
    """Blocks of queries with one left over, however they are cut."""
    q, k, v = inputs(65, 9, batch=1, heads=1)
    parts = [with_gradients(backend, part, k, v) for part in (q[:, :, :first], q[:, :, first:])]
    whole = with_gradients(backend, q, k, v)[0]
    near([torch.cat([out for out, *_ in parts], 2)], [whole])
    expected = with_gradients("reference", q[:, :, :first], k, v)
    near(parts[0], expected)


@EVERY
def test_the_order_of_keys_does_not_matter(backend):
    q, k, v = inputs(5, 37)
    mask = torch.rand(5, 37, device=DEVICE) < 0.7
    order = torch.randperm(37, device=DEVICE)
    out, dq, dk, dv = with_gradients(backend, q, k, v, mask=mask)
    shuffled = with_gradients(backend, q, k[:, :, order], v[:, :, order], mask=mask[:, order])
    near(shuffled, [out, dq, dk[:, :, order], dv[:, :, order]])


@EVERY
def test_heads_that_share_keys_are_heads_with_equal_keys(backend):
    q, k, v = inputs(5, 20, heads=6, kv_heads=2)
    out, dq, dk, dv = with_gradients(backend, q, k, v)
    own = with_gradients(backend, q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    grouped = [t.view(2, 2, 3, 20, 8).sum(2) for t in own[2:]]
    near([out, dq, dk, dv], [*own[:2], *grouped])


@pytest.mark.parametrize("backend", ATTENTION.backends)
def test_two_halves_of_the_keys_merge_by_their_sums(backend):
    q, k, v = inputs(5, 37)
    able(backend, q, k, v)
    whole = attention_with_lse(q, k, v, backend=backend)
    left = attention_with_lse(q, k[:, :, :9], v[:, :, :9], backend=backend)
    right = attention_with_lse(q, k[:, :, 9:], v[:, :, 9:], backend=backend)
    near(merge_attention(*left, *right), whole)


@EVERY
@pytest.mark.parametrize("shape", [(2, 1, 1, 20), (1, 2, 1, 20), (20,)], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_lies_behind_padding_is_never_seen(backend, shape, poison):
    q, k, v = inputs(5, 20)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    mask[..., 13:] = False
    clean = with_gradients(backend, q, k, v, mask=mask)
    for t in (k, v):
        t[:, :, 13:] = poison
    for ours, expected in zip(with_gradients(backend, q, k, v, mask=mask), clean, strict=True):
        assert torch.equal(ours, expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_attend_to_is_zero(backend, dtype):
    q, k, v = inputs(5, 4, dtype=dtype)
    mask = torch.ones(5, 4, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    out, dq, dk, dv = with_gradients(backend, q, k, v, mask=mask, causal=True)
    assert not out[:, :, [0, 2]].any()
    assert not dq[:, :, [0, 2]].any()
    assert all(t.isfinite().all() and t.any() for t in (out, dq, dk, dv))
    assert not any(t.any() for t in with_gradients(backend, q, k, v, mask=mask[2]))


@EVERY
def test_a_negative_scale_turns_the_queries_round(backend):
    q, k, v = inputs(5, 20)
    out, dq, dk, dv = with_gradients(backend, q, k, v, scale=-0.3)
    turned = with_gradients(backend, -q, k, v, scale=0.3)
    near([out, dq, dk, dv], [turned[0], -turned[1], *turned[2:]])
    average = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(out.shape)
    near(with_gradients(backend, q, k, v, scale=0.0)[:1], [average])


@pytest.mark.parametrize("backend", ATTENTION.backends)
@pytest.mark.parametrize("v_dim", [8, 24])
def test_the_output_lies_in_memory_as_the_queries_do(backend, v_dim):
    for order in [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)]:
        q, k, v = inputs(5, 4, v_dim=v_dim)
        able(backend, q, k, v)
        q = torch.empty_permuted(q.shape, (*order, 3), device=DEVICE).copy_(q).requires_grad_()
        out = attention(q, k, v, backend=backend)
        assert sorted(range(3), key=out.stride, reverse=True) == list(order)
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert dq.stride() == q.stride()


@pytest.mark.parametrize("backend", ATTENTION.backends)
def test_the_number_of_threads_does_not_change_the_bits(backend):
    if backend != "numba":
        pytest.skip(f"{backend}: does not run on torch's threads")
    q, k, v = inputs(150, 300, heads=4, kv_heads=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(backend, q, k, v, causal=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_autocast_lowers_the_precision(backend):
    q, k, v = inputs(5, 20)
    able(backend, q, k, v)
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(attention(q, k.bfloat16(), v, backend=backend), expected)
        double = attention(q.double(), k.double(), v.double(), backend=backend)
    assert double.dtype == torch.float64


def test_the_reference_is_the_function_of_torch():
    q, k, v = inputs(6, 6, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6, device=DEVICE) < 0.8
    for options in ({}, {"causal": True}, {"mask": mask | torch.eye(6, dtype=bool, device=DEVICE)}):
        native = ATTENTION.native(q, k, v, **options)
        torch.testing.assert_close(attention_reference(q, k, v, **options), native)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scale", [0.125, 88**-0.5, 0.7, 1.0, 3.3, -0.3])
def test_numba_scales_by_two_parts_that_are_twice_as_exact(scale, double):
    """High scores are scaled by both: an error of one rounding would count score times."""
    from tilewise.kernels.numba._online_softmax import scaling

    sign, size, (main, rest) = scaling(scale, double)
    exact = Fraction(size) * Fraction(LOG2_E)
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    assert sign * size == scale
    assert main > 0 and rest > 0
    assert abs(Fraction(main) + Fraction(rest) - exact) <= Fraction(eps) ** 2 * exact


def test_numbas_probabilities_are_as_exact_as_torchs_by_the_rule():
    """Of scores that are exact: the values are the unit vectors, so that the outputs are them."""
    keys = 256
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-12, 13, (1, 1, keys, 64), generator=generator) / 4 for _ in range(2))
    able("numba", q, k, k)
    scores = q.double() @ k.double().mT / 8
    assert torch.equal(scores, (q @ k.mT / 8).double())
    exact = scores.softmax(-1)

    def error(p):
        seen = exact > 1e-6  # the smaller are rounded to less than that of what sums to 1
        return (p.double() / exact - 1)[seen].square().mean().sqrt()

    ours = attention(q, k, torch.eye(keys)[None, None], backend="numba")
    assert error(ours) <= 2 * error(scores.float().softmax(-1))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("seq_q, seq_k", [(1, 5), (6, 19), (19, 19), (35, 50)])
def test_numbas_gradients_are_of_the_probabilities_of_the_output(heads, kv_heads, seq_q, seq_k):
    """To the bit, however either pass cuts the queries, of a tile of keys, of which no sums are
    rescaled. One query of one head is differentiated at a time: the gradients of the values are its
    probabilities, as the output of unit vectors is."""
    q, k, _ = inputs(seq_q, seq_k, batch=1, heads=heads, kv_heads=kv_heads)
    able("numba", q, k, k)
    one_at_a_time = torch.eye(heads * seq_q).view(-1, heads, seq_q, 1).expand(-1, -1, -1, seq_k)
    units = torch.eye(seq_k).expand(heads * seq_q, kv_heads, -1, -1).contiguous().requires_grad_()
    q, k = (t.expand(len(units), -1, -1, -1) for t in (q, k))
    p = attention(q, k, units, causal=True, backend="numba")
    (found,) = torch.autograd.grad(p, units, one_at_a_time)
    for number in range(heads * seq_q):
        head, query = divmod(number, seq_q)
        column = found[number, head * kv_heads // heads, :, 0]
        assert torch.equal(column, p[number, head, query].detach()), (head, query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("seq_q, seq_k", [(5, 3), (18, 40), (33, 33)])
def test_numbas_gradients_are_the_same_whichever_are_wanted(dtype, wanted, seq_q, seq_k):
    """What one does not write another does not read."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, seq, 16, generator=generator).to(dtype) for seq in (seq_q, seq_k, seq_k)
    )
    able("numba", q, k, v)

    def gradients(*wanted):
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((q, k, v))]
        out = attention(*given, backend="numba")
        return torch.autograd.grad(out.float().square().sum(), [given[i] for i in wanted])

    assert torch.equal(gradients(wanted)[0], gradients(0, 1, 2)[wanted])

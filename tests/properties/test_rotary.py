"""Rotary embedding: what agreement with the reference on random tensors cannot say."""

import itertools
import math
import re

import pytest
import torch
from cases import DEVICE
from torch._dynamo.testing import CompileCounter

import tilewise
from tilewise import rotary_tables
from tilewise.check import compare
from tilewise.choice import refusal
from tilewise.op import OPS, wide_dtype

OP = OPS["rotary"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=[*OP.backends, "reference"])
def backend(request):
    tensors, options = OP.inputs(**OP.sizes[0], device=DEVICE, dtype=torch.float32)
    if request.param in OP.backends:
        refused = refusal(OP.backends[request.param], *tensors, **options)
        if refused:
            pytest.skip(f"{request.param}: {refused[1]}")
    return request.param


def heads(*shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape, device=DEVICE).to(dtype)


def tables(positions, dim, **options):
    return rotary_tables(positions, dim, 100.0, DEVICE, **options)


def assert_within_rounding(a, b, size):
    """Equal but for a few roundings of values of this size."""
    assert bool(((a - b).abs() <= 8 * EPS * size).all())


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_know_only_the_difference_of_positions(backend, interleaved):
    dim, cos_sin = 16, tables(64, 16)
    q, k = heads(1, 2, 1, dim), heads(1, 2, 1, dim, seed=1)

    def score(i, j):
        options = {"interleaved": interleaved, "backend": backend}
        turned, _ = tilewise.rotary(q, q, *cos_sin, offset=i, **options)
        _, other = tilewise.rotary(k, k, *cos_sin, offset=j, **options)
        return (turned.double() * other.double()).sum(-1)

    size = q.norm(dim=-1) * k.norm(dim=-1)
    for difference in (0, 1, 7, -5):
        expected = score(20, 20 + difference)
        for i in (5, 13, 37, 50):
            assert_within_rounding(score(i, i + difference), expected, size)
    assert bool(((score(20, 20) - score(20, 27)).abs() > 1e-3 * size).any())


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_are_kept_and_the_gradient_turns_back(backend, interleaved):
    q, k = heads(2, 3, 9, 10), heads(2, 1, 9, 10, seed=1)
    cos, sin = tables(12, 6)
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    options = {"interleaved": interleaved, "offset": 3, "backend": backend}
    turned = tilewise.rotary(*leaves, cos, sin, **options)
    back = torch.autograd.grad(turned, leaves, [t.detach() for t in turned])
    for before, there, again in zip((q, k), turned, back, strict=True):
        size = before.norm(dim=-1, keepdim=True)
        assert_within_rounding(there.norm(dim=-1, keepdim=True), size, size)
        assert_within_rounding(again, before, size)
        assert not torch.equal(there[..., :6], before[..., :6])
        assert torch.equal(there[..., 6:], before[..., 6:])


def test_the_pairs_are_those_of_the_formula(backend):
    q = torch.arange(1.0, 9.0, device=DEVICE).view(1, 1, 1, 8)
    cos = torch.zeros(1, 3, device=DEVICE)  # a quarter turn: (a, b) -> (-b, a)
    halves, _ = tilewise.rotary(q, q, cos, cos + 1, backend=backend)
    assert halves.flatten().tolist() == [-4, -5, -6, 1, 2, 3, 7, 8]
    pairs, _ = tilewise.rotary(q, q, cos, cos + 1, interleaved=True, backend=backend)
    assert pairs.flatten().tolist() == [-2, 1, -4, 3, -6, 5, 7, 8]


def layouts():
    """Views of q and k, each with strides of its own."""
    packed = heads(2, 5, 3, 7, 16)  # batch, seq, (q, k, v), heads, dim
    return {
        "batch, heads, seq": (heads(2, 7, 5, 16), heads(2, 3, 5, 16)),
        "batch, seq, heads": (heads(2, 5, 7, 16).transpose(1, 2), heads(2, 7, 5, 16)),
        "seq, batch, heads": (heads(5, 2, 7, 16).permute(1, 2, 0, 3), heads(2, 7, 5, 16)),
        "packed": (packed[:, :, 0].transpose(1, 2), packed[:, :, 1].transpose(1, 2)),
        "part of a cache": (heads(2, 7, 9, 16)[:, :, 2:7], heads(2, 3, 5, 20)[..., :16]),
        "expanded": (heads(1, 1, 5, 16).expand(2, 7, -1, -1), heads(2, 1, 5, 16)),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_are_kept(backend, layout, interleaved, monkeypatch):
    if backend == "reference":
        pytest.skip("reference: launches nothing")
    from tilewise.ops import rotary as module

    (q, k), (cos, sin) = layouts()[layout], tables(9, 12)
    forward, seen = module._forward, []

    def record(*args):
        seen.extend(t.data_ptr() for t in args[:4])
        return forward(*args)

    monkeypatch.setattr(module, "_forward", record)
    options = {"interleaved": interleaved, "offset": 1}
    turned = tilewise.rotary(q, k, cos, sin, **options, backend=backend)
    assert seen == [t.data_ptr() for t in (q, k, cos, sin)]
    inputs = q.double(), k.double(), cos.double(), sin.double()
    truth = OP.reference(*inputs, **options)
    plain = OP.reference(q, k, cos, sin, **options)
    for x, ours, theirs, right in zip((q, k), turned, plain, truth, strict=True):
        assert ours.stride() == torch.empty_like(x).stride()
        error, allowed = compare(ours.contiguous(), theirs, right)
        assert error <= allowed


@pytest.mark.parametrize("layout", layouts())
def test_gradients_of_any_stride(backend, layout):
    (q, k), (cos, sin) = layouts()[layout], tables(9, 16)
    leaves = [torch.randn(t.shape, device=DEVICE, requires_grad=True) for t in (q, k)]
    turned = tilewise.rotary(*leaves, cos, sin, backend=backend)
    ours = torch.autograd.grad(turned, leaves, (q, k), retain_graph=True)
    straight = torch.autograd.grad(turned, leaves, (q.contiguous(), k.contiguous()))
    for a, b in zip(ours, straight, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bent", range(3), ids=["batch", "head", "seq"])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "dq", "dk"])
def test_one_stride_that_no_vector_divides(backend, which, bent):
    """Vectors are for heads that can all be read by them."""
    plain = [heads(2, 3, 5, 64, seed=i) for i in range(4)]
    strides = [3 * 5 * 80, 5 * 80, 80]
    for i in range(bent + 1):  # so that what is further out still lies behind what is further in
        strides[i] += 8 * (bent - i)
    strides[bent] += 1
    odd = torch.zeros(8000, device=DEVICE).as_strided((2, 3, 5, 64), (*strides, 1))
    mixed = [odd.copy_(t) if i == which else t for i, t in enumerate(plain)]
    cos, sin = tables(5, 64)
    found = []
    for q, k, dq, dk in (plain, mixed):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        outs = tilewise.rotary(q, k, cos, sin, backend=backend)
        found.append((*outs, *torch.autograd.grad(outs, (q, k), (dq, dk))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)])
def test_position_ids_take_rows_of_the_tables(backend, shape):
    q, k = heads(2, 3, 5, 8), heads(2, 1, 5, 8, seed=1)
    cos, sin = tables(20, 8)
    ids = torch.randint(17, shape, device=DEVICE)
    turned = tilewise.rotary(q, k, cos, sin, position_ids=ids, offset=3, backend=backend)
    for b, positions in enumerate(ids.expand(2, 5).tolist()):
        for s, position in enumerate(positions):
            one = tilewise.rotary(
                q[b : b + 1, :, s : s + 1], k[b : b + 1, :, s : s + 1], cos, sin,
                offset=position + 3, backend=backend,
            )  # fmt: skip
            assert torch.equal(turned[0][b, :, s], one[0][0, :, 0])
            assert torch.equal(turned[1][b, :, s], one[1][0, :, 0])


def test_a_strided_column_of_position_ids(backend):
    q, (cos, sin) = heads(2, 3, 5, 8), tables(20, 8)
    ids = torch.randint(17, (5, 2), device=DEVICE)
    strided = tilewise.rotary(q, q, cos, sin, position_ids=ids.T, backend=backend)
    straight = tilewise.rotary(q, q, cos, sin, position_ids=ids.T.contiguous(), backend=backend)
    assert torch.equal(strided[0], straight[0])


@pytest.mark.parametrize("wrong", [20, -1, 2**40, -(2**40)])
def test_a_position_that_the_tables_do_not_have(backend, wrong, monkeypatch):
    # Elsewhere they are made of NaN, and one that was forgotten would not be seen among the others.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    q, k = heads(2, 3, 5, 8), heads(2, 1, 5, 8, seed=1)
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    cos, sin = tables(20, 6)
    ids = torch.arange(10, device=DEVICE).view(2, 5)
    right = tilewise.rotary(q, k, cos, sin, position_ids=ids, backend=backend)
    ids[1, 2] = wrong
    turned = tilewise.rotary(*leaves, cos, sin, position_ids=ids, backend=backend)
    grads = torch.autograd.grad(turned, leaves, [torch.ones_like(t) for t in turned])
    for expected, there, dx in zip(right, turned, grads, strict=True):
        assert bool(there[1, :, 2, :6].isnan().all())
        assert bool(dx[1, :, 2, :6].isnan().all())
        assert torch.equal(there[1, :, 2, 6:], expected[1, :, 2, 6:])
        assert int(there.isnan().sum()) == int(dx.isnan().sum()) == 6 * there.shape[1]
        finite = ~there.isnan()
        assert torch.equal(there[finite], expected[finite])


@pytest.mark.parametrize("lengths", [(5, 0, 4, 1), (0, 0, 10), (10,), (1,) * 10, (3, 4), ()])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_sequences_are_those_sequences_alone(backend, lengths, interleaved):
    """Bit by bit; empty ones hold no row, and rows past the last are 0, whatever is there."""
    q, k = (heads(10, n, 10, seed=n) for n in (3, 1))
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    total = int(ends[-1])
    for x in (q, k):
        x[total:] = math.nan
        x.requires_grad_()
    cos, sin = tables(12, 8)
    options = {"interleaved": interleaved, "offset": 2, "backend": backend}
    turned = tilewise.rotary(q, k, cos, sin, cu_seqlens=ends, **options)
    grads = torch.autograd.grad(turned, (q, k), [torch.ones_like(y) for y in turned])
    assert not any(bool(y[total:].any()) for y in (*turned, *grads))
    for first, last in itertools.pairwise(ends.tolist()):
        alone = [x.detach()[first:last].transpose(0, 1)[None] for x in (q, k)]
        expected = tilewise.rotary(*alone, cos, sin, **options)
        for ours, theirs in zip(turned, expected, strict=True):
            assert torch.equal(ours[first:last], theirs[0].transpose(0, 1))


def test_a_packed_sequence_longer_than_the_tables(backend):
    q, (cos, sin) = heads(9, 2, 8), tables(4, 6)
    ends = torch.tensor([0, 3, 9], dtype=torch.int32, device=DEVICE)
    y, _ = tilewise.rotary(q, q, cos, sin, cu_seqlens=ends, backend=backend)
    assert y.isnan().any(-1)[:, 0].tolist() == [False] * 7 + [True] * 2
    assert torch.equal(y[..., 6:], q[..., 6:])


def test_a_frozen_key_is_not_turned_back(backend, monkeypatch):
    if backend == "reference":
        pytest.skip("reference: launches nothing")
    from tilewise.ops import rotary as module

    q, k = heads(2, 3, 5, 8).requires_grad_(), heads(2, 1, 5, 8, seed=1)
    backward, seen = module._backward, []
    monkeypatch.setattr(module, "_backward", lambda *a: seen.extend(a[:2]) or backward(*a))
    turned, _ = tilewise.rotary(q, k, *tables(5, 8), backend=backend)
    torch.autograd.grad(turned, q, q.detach())
    assert [t.shape[1] for t in seen] == [3, 0]


def test_tables_that_require_a_gradient_get_it(backend):
    q, k = heads(1, 2, 3, 4), heads(1, 2, 3, 4, seed=1)
    cos, sin = (t.requires_grad_() for t in tables(3, 4))
    out = tilewise.rotary(q, k, cos, sin, backend=backend)
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), (cos, sin))
    expected = OP.reference(q, k, cos, sin)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            grads,
            torch.autograd.grad(expected[0].sum() + expected[1].sum(), (cos, sin)),
            strict=True,
        )
    )
    assert bool(grads[0].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_single_precision_tables_for_half_heads(backend, dtype):
    """Rounded to bfloat16, the tables alone would cost more than the rounding of the result."""
    q, (cos, sin) = heads(1, 2, 64, 32, dtype=dtype), tables(3000, 32)
    out, _ = tilewise.rotary(q, q, cos, sin, offset=2900, backend=backend)
    truth, _ = OP.reference(q.double(), q.double(), cos.double(), sin.double(), offset=2900)
    assert out.dtype == dtype
    error, allowed = compare(out, truth.to(dtype), truth)
    assert error <= allowed


def test_a_decoding_step_is_not_compiled_anew(backend):
    """The offset of a cache grows by one a token, and every value must not be a new graph."""
    q, (cos, sin) = heads(1, 2, 1, 8), tables(40, 8)
    counter = CompileCounter()

    def step(q, offset):
        return tilewise.rotary(q, q, cos, sin, offset=offset, backend=backend)[0]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for offset in range(2, 30):
        assert torch.equal(compiled(q, offset), step(q, offset))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tables_are_right_at_late_positions(dtype):
    cos, sin = rotary_tables(100_001, 8, dtype=dtype)
    assert cos.shape == sin.shape == (100_001, 4)
    assert cos.dtype == sin.dtype == dtype
    for position in (0, 1, 100_000):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            here = float(cos[position, i]), float(sin[position, i])
            rounding = torch.finfo(dtype).eps
            if dtype == torch.float64:  # that of the angle, which is as large as the position
                rounding *= max(angle, 1)
            assert math.dist(here, (math.cos(angle), math.sin(angle))) <= rounding
    assert bool((cos[:3, 0].double() - torch.arange(3.0).cos().double()).abs().max() < 0.01)


Q, K, C = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 8), torch.zeros(9, 4)
IDS = torch.zeros(2, 5, dtype=torch.int64)
ENDS = torch.tensor([0, 3], dtype=torch.int32)
REFUSED = [
    (TypeError, "q must be floating point, got torch.int64", (Q.long(), K, C, C), {}),
    (TypeError, "k must be torch.float32, got torch.float16", (Q, K.half(), C, C), {}),
    (TypeError, "cos must be torch.float32 or torch.float32, got torch.float16",
     (Q, K, C.half(), C), {}),
    (TypeError, "sin must be torch.float16 or torch.float32, got torch.float64",
     (Q.half(), K.half(), C, C.double()), {}),
    (TypeError, "sin must be torch.float32 like cos, got torch.float16",
     (Q.half(), K.half(), C, C.half()), {}),
    (ValueError, "q must be [batch, heads, seq, dim] and k [batch, kv_heads, seq, dim], "
     "got [3, 5, 8] and [2, 1, 5, 8]", (Q[0], K, C, C), {}),
    (ValueError, "got [2, 3, 5, 8] and [2, 1, 4, 8]", (Q, K[:, :, 1:], C, C), {}),
    (ValueError, "got [2, 3, 5, 8] and [2, 1, 5, 6]", (Q, K[..., 2:], C, C), {}),
    (ValueError, "cos and sin must be [positions, rotary_dim / 2], not empty, "
     "got [9, 4] and [9, 3]", (Q, K, C, C[:, 1:]), {}),
    (ValueError, "got [0, 4] and [0, 4]", (Q, K, C[:0], C[:0]), {}),
    (ValueError, "rotary_dim must be at most dim = 6, got 8",
     (Q[..., 2:], K[..., 2:], C, C), {}),
    (ValueError, "positions must be from 0 to 8, got 5 to 9", (Q, K, C, C), {"offset": 5}),
    (ValueError, "positions must be from 0 to 8, got -1 to 3", (Q, K, C, C), {"offset": -1}),
    (TypeError, "position_ids must be torch.int64, got torch.int32", (Q, K, C, C),
     {"position_ids": IDS.int()}),
    (ValueError, "position_ids must be [5] or [2, 5], got [2, 4]", (Q, K, C, C),
     {"position_ids": IDS[:, 1:]}),
    (RuntimeError, "k must be on cpu, got meta", (Q, K.to("meta"), C, C), {}),
    (RuntimeError, "sin must be on cpu, got meta", (Q, K, C, C.to("meta")), {}),
    (RuntimeError, "position_ids must be on cpu, got meta", (Q, K, C, C),
     {"position_ids": IDS.to("meta")}),
    (ValueError, "backend must be one of cuda, numba, triton, reference, got 'metal'",
     (Q, K, C, C), {"backend": "metal"}),
    (ValueError, "with cu_seqlens q must be [total, heads, dim] and k [total, kv_heads, dim], "
     "got [2, 3, 5, 8] and [2, 1, 5, 8]", (Q, K, C, C), {"cu_seqlens": ENDS}),
    (ValueError, "must be given position_ids or cu_seqlens, got both", (Q[0], Q[0], C, C),
     {"cu_seqlens": ENDS, "position_ids": IDS}),
    (TypeError, "cu_seqlens must be torch.int32, got torch.int64", (Q[0], Q[0], C, C),
     {"cu_seqlens": ENDS.long()}),
    (ValueError, "cu_seqlens must be [batch + 1], got [0]", (Q[0], Q[0], C, C),
     {"cu_seqlens": ENDS[:0]}),
    (ValueError, "offset must be at least 0, got -1", (Q[0], Q[0], C, C),
     {"cu_seqlens": ENDS, "offset": -1}),
    (RuntimeError, "cu_seqlens must be on cpu, got meta", (Q[0], Q[0], C, C),
     {"cu_seqlens": ENDS.to("meta")}),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, tensors, options", REFUSED)
def test_refuses(error, sentence, tensors, options):
    with pytest.raises(error, match=f"^rotary: .*{re.escape(sentence)}$"):
        tilewise.rotary(*tensors, **options)


@pytest.mark.parametrize(
    "error, sentence, arguments",
    [
        (
            TypeError,
            "dtype must be floating point, got torch.int64",
            (3, 4, 1.0, None, torch.int64),
        ),
        (ValueError, "positions must be at least 1, got 0", (0, 4)),
        (ValueError, "dim must be even and at least 2, got 3", (3, 3)),
        (ValueError, "dim must be even and at least 2, got 0", (3, 0)),
        (ValueError, "base must be positive, got 0", (3, 4, 0)),
    ],
)
def test_tables_refuse(error, sentence, arguments):
    with pytest.raises(error, match=f"^rotary_tables: {re.escape(sentence)}$"):
        rotary_tables(*arguments)


def test_autocast_keeps_the_dtype(backend):
    q, (cos, sin) = heads(1, 2, 3, 4), tables(3, 4)
    plain = tilewise.rotary(q, q, cos, sin, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = tilewise.rotary(q, q, cos, sin, backend=backend)
    assert cast[0].dtype == wide_dtype(q.dtype)
    assert torch.equal(cast[0], plain[0])

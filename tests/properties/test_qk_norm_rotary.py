"""QK norm and rotary embedding in one pass: what agreement on random tensors cannot say."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

import tilewise
from tilewise.check import compare
from tilewise.op import OPS

OP = OPS["qk_norm_rotary"]
MINE = [p for p in BACKENDS if p.values[0] is OP]


def made(heads=3, kv_heads=1, seq=11, dim=24, rotary_dim=16):
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, seq, dim, device=DEVICE) for n in (heads, kv_heads))
    weights = torch.randn(2, dim, device=DEVICE).unbind()
    return q, k, *weights, *tilewise.rotary_tables(seq + 3, rotary_dim, 100.0, DEVICE)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("op, backend", MINE)
def test_is_the_two_ops_one_after_the_other(op, backend, interleaved):
    case_or_skip(op, backend)
    q, k, q_weight, k_weight, cos, sin = made()
    ours = tilewise.qk_norm_rotary(
        q, k, q_weight, k_weight, cos, sin, eps=0.1, interleaved=interleaved, backend=backend
    )
    runs = []
    for dtype in (torch.float32, torch.float64):
        heads = [
            torch.nn.functional.rms_norm(x.to(dtype), x.shape[-1:], w.to(dtype), 0.1)
            for x, w in ((q, q_weight), (k, k_weight))
        ]
        tables = cos.to(dtype), sin.to(dtype)
        runs.append(OPS["rotary"].reference(*heads, *tables, interleaved=interleaved))
    for mine, theirs, truth in zip(ours, *runs, strict=True):
        error, allowed = compare(mine, theirs, truth)
        assert error <= allowed


@pytest.mark.parametrize("op, backend", MINE)
def test_packed_sequences_are_those_sequences_alone(op, backend):
    """Values and gradients, bit by bit; what is past the last sequence may be NaN and becomes 0."""
    case_or_skip(op, backend)
    q, k, q_weight, k_weight, cos, sin = made(seq=13)
    tokens = [x[0].transpose(0, 1).clone() for x in (q, k)]
    for x in tokens:
        x[11:] = float("nan")
        x.requires_grad_()
    ends = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=DEVICE)
    options = {"eps": 0.1, "offset": 2, "backend": backend}
    turned = tilewise.qk_norm_rotary(
        *tokens, q_weight, k_weight, cos, sin, cu_seqlens=ends, **options
    )
    grads = torch.autograd.grad(turned, tokens, [torch.ones_like(y) for y in turned])
    assert not any(bool(y[11:].any()) for y in (*turned, *grads))
    for first, last in ((0, 4), (4, 11)):
        alone = [x[:1, :, first:last].clone().requires_grad_() for x in (q, k)]
        expected = tilewise.qk_norm_rotary(*alone, q_weight, k_weight, cos, sin, **options)
        wanted = torch.autograd.grad(expected, alone, [torch.ones_like(y) for y in expected])
        for ours, theirs in zip((*turned, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(ours[first:last].transpose(0, 1), theirs[0])


@pytest.mark.parametrize("op, backend", MINE)
def test_an_unknown_position_and_an_extreme_head_harm_no_other(op, backend):
    case_or_skip(op, backend)
    q, k, q_weight, k_weight, cos, sin = made()
    q[1, 2, 3] = 0.0
    q[0, 1, 4] = 1e30  # its square is inf, and its norm 0
    q[0, 1, 5] = float("nan")
    ids = torch.arange(22, device=DEVICE).view(2, 11) % 11
    ids[1, 7] = 14
    y, _ = tilewise.qk_norm_rotary(
        q, k, q_weight, k_weight, cos, sin, position_ids=ids, backend=backend
    )
    expected, _ = OP.reference(q, k, q_weight, k_weight, cos, sin, position_ids=ids)
    assert torch.equal(y.isnan(), expected.isnan())
    assert bool(y[1, :, 7, :16].isnan().all())
    assert not bool(y[1, 2, 3].any())
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("op, backend", MINE)
def test_only_one_number_a_head_is_kept_besides_the_arguments(op, backend):
    case_or_skip(op, backend)
    given = made()
    inputs = [t.clone().requires_grad_(i < 4) for i, t in enumerate(given)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilewise.qk_norm_rotary(*inputs, backend=backend)
    own = {t.data_ptr() for t in inputs}
    assert sorted(t.numel() for t in saved if t.data_ptr() not in own) == [22, 66]


Q, K, W, C = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 8), torch.zeros(8), torch.zeros(9, 4)
REFUSED = [
    (TypeError, "k must be torch.float32, got torch.float16", (Q, K.half(), W, W, C, C), {}),
    (TypeError, "q_weight must be torch.float32 or torch.float32, got torch.float16",
     (Q, K, W.half(), W.half(), C, C), {}),
    (TypeError, "k_weight must be torch.float16 like q_weight, got torch.float32",
     (Q.half(), K.half(), W.half(), W, C, C), {}),
    (ValueError, r"k_weight must be \[8\], got \[7\]", (Q, K, W, W[1:], C, C), {}),
    (ValueError, "positions must be from 0 to 8, got 5 to 9", (Q, K, W, W, C, C), {"offset": 5}),
    (RuntimeError, "q_weight must be on cpu, got meta", (Q, K, W.to("meta"), W, C, C), {}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments, options", REFUSED)
def test_wrong_input_is_refused(error, message, arguments, options):
    with pytest.raises(error, match="^qk_norm_rotary: .*" + message):
        tilewise.qk_norm_rotary(*arguments, **options)

"""Packed sequences: each is attention by itself, and nothing beyond them is ever seen."""

from functools import partial

import pytest
import torch
from attention_cases import near
from cases import DEVICE, label
from packed_cases import EVERY, INF, OPTIONS, VARLEN, able, packed, randn, same, with_gradients
from pairs import all_pairs

from tilewise import (
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_with_lse,
)
from tilewise.check import check, failures
from tilewise.op import OPS
from tilewise.rng import keep_mask


def one_by_one(arguments, **options):
    """What `with_gradients` returns, of each sequence by itself, by the reference of attention."""
    q, k, v, ends_q, ends_k, _, _, *more = arguments
    bias, sinks = [*more, None, None][:2]
    leaves = [t if t is None else t.detach().requires_grad_() for t in (q, k, v, bias, sinks)]
    q, k, v, bias, sinks = leaves
    outs = []
    slopes = options.pop("alibi_slopes", None)
    for b in range(len(ends_q) - 1):
        rows_q, rows_k = (slice(int(e[b]), int(e[b + 1])) for e in (ends_q, ends_k))
        heads = (
            t[rows].transpose(0, 1)[None] for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k))
        )
        own = None
        if bias is not None:
            seq_q, seq_k = (rows.stop - rows.start for rows in (rows_q, rows_k))
            own = bias[b % len(bias), None, :, :seq_q, :seq_k]
        if slopes is not None:
            options["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[b]
        outs.append(attention_with_lse(*heads, own, sinks, **options, backend="reference"))
    out = torch.cat([o[0].transpose(0, 1) for o, _ in outs])
    lse = torch.cat([e[0] for _, e in outs], 1)
    cotangent = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(out.dtype).view(out.shape)
    loss = (out * cotangent).sum() + lse.masked_fill(lse == -INF, 0).square().sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [out.detach(), lse.detach(), *grads]


@EVERY
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_attention_by_itself(backend, name):
    more, options = OPTIONS[name]
    arguments = (*packed(), *more)
    same(with_gradients(backend, *arguments, **options), one_by_one(arguments, **options))


@EVERY
@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dropout_counts_sequences_heads_and_positions(backend, p):
    lengths = ((3, 5), (7, 4), (20, 33))
    q, k, _, *rest = packed(lengths)
    drop = {"dropout_p": p, "seed": -(2**62), "offset": 2**33}
    v = torch.zeros(len(k), 2, 33, device=DEVICE)
    for b, (_, seq_k) in enumerate(lengths):
        v[int(rest[1][b]) :][:seq_k] = torch.eye(33, device=DEVICE)[:seq_k, None]
    able(backend, q, k, v, *rest, **drop)
    out = attention_varlen(q, k, v, *rest, **drop, backend=backend)
    plain = attention_varlen(q, k, v, *rest, backend="reference")
    for b, (seq_q, seq_k) in enumerate(lengths):
        rows = (b * 4 + torch.arange(4, device=DEVICE)) * rest[2]
        rows = rows + torch.arange(seq_q, device=DEVICE)[:, None]
        kept = keep_mask(p, drop["seed"], drop["offset"], rows, 33)
        own = slice(int(rest[0][b]), int(rest[0][b + 1]))
        near([out[own] * (1 - p)], [torch.where(kept, plain[own], 0)])
        assert torch.equal(out[own][..., :seq_k] != 0, kept[..., :seq_k])


@pytest.mark.parametrize("backend", VARLEN.backends)
def test_a_sequence_does_not_know_the_others(backend):
    arguments = packed(((70, 90), (33, 20)), kv_heads=4)
    able(backend, *arguments)
    q, k, v, *_ = arguments
    whole = attention_varlen(*arguments, causal=True, backend=backend)
    ends = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (33, 20)]
    alone = (q[70:], k[90:], v[90:], *ends, *arguments[-2:])
    assert torch.equal(attention_varlen(*alone, causal=True, backend=backend), whole[70:])


@pytest.mark.parametrize("backend", VARLEN.backends)
def test_the_number_of_threads_changes_no_bit(backend):
    if backend != "numba":
        pytest.skip(f"{backend}: does not run on torch's threads")
    lengths = ((150, 300), (1, 200), (64, 64), (90, 10))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(backend, *packed(lengths), causal=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", VARLEN.backends)
def test_the_output_lies_in_memory_as_the_queries_do(backend):
    arguments = packed()
    able(backend, *arguments)
    for q in (arguments[0], arguments[0].contiguous()):
        out = attention_varlen(q, *arguments[1:], backend=backend)
        assert (out.stride(0) < out.stride(1)) == (q.stride(0) < q.stride(1))


@EVERY
def test_derivatives(backend):
    (bias, sinks), options = OPTIONS["all"]
    arguments = packed(((2, 3), (3, 1), (0, 2)), dim=3, v_dim=2, past=1, dtype=torch.float64)
    bias, slopes = bias[:3, :, :3, :3].double(), options["alibi_slopes"][:3]
    options = options | {"alibi_slopes": slopes, "dropout_p": 0.3, "seed": 5}
    able(backend, *arguments, bias, sinks.double(), **options)
    if backend != "reference" and torch.float64 not in VARLEN.backends[backend].dtypes:
        pytest.skip(f"{backend}: finite differences need float64")

    def call(q, k, v, bias, sinks):
        out, lse = attention_varlen_with_lse(
            q, k, v, *arguments[3:], bias, sinks, **options, backend=backend
        )
        return out, lse.masked_fill(lse == -INF, 0)

    leaves = [t.detach().requires_grad_() for t in (*arguments[:3], bias, sinks.double())]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@EVERY
@pytest.mark.parametrize("wanted", [0, 1, 2, 7, 8])
def test_only_what_is_wanted_gets_a_gradient(backend, wanted):
    (bias, sinks), options = OPTIONS["all"]
    arguments = (*packed(), bias, sinks)
    able(backend, *arguments, **options)
    one = list(arguments)
    one[wanted] = one[wanted].detach().requires_grad_()
    out = attention_varlen(*one, **options, backend=backend)
    cotangent = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    (alone,) = torch.autograd.grad((out * cotangent).sum(), one[wanted])
    leaves = [t.detach().requires_grad_() if i in (0, 1, 2, 7, 8) else t
              for i, t in enumerate(arguments)]  # fmt: skip
    out = attention_varlen(*leaves, **options, backend=backend)
    (whole,) = torch.autograd.grad((out * cotangent).sum(), leaves[wanted])
    near([alone], [whole])


@EVERY
def test_the_gradient_of_lse_alone(backend):
    q, k, v, *rest = packed()
    able(backend, q, k, v, *rest)
    leaf = k.detach().requires_grad_()
    grads = []
    for name in (backend, "reference"):
        _, lse = attention_varlen_with_lse(q, leaf, v, *rest, backend=name)
        loss = lse.masked_fill(lse == -INF, 0).square().sum()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    near(grads[:1], grads[1:])


@EVERY
def test_compiled_it_is_the_same(backend):
    (bias, sinks), options = OPTIONS["all"]
    arguments = (*packed(), bias, sinks)
    able(backend, *arguments, **options)
    call = partial(with_gradients_of, backend, arguments, options)
    near(call(torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)),
         call(attention_varlen))  # fmt: skip


def with_gradients_of(backend, arguments, options, call):
    leaves = [t.detach().requires_grad_() for t in arguments[:3]]
    out = call(*leaves, *arguments[3:], **options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@EVERY
def test_autocast_lowers_the_precision(backend):
    q, k, v, *rest = packed()
    able(backend, q, k, v, *rest)
    expected = attention_varlen(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest, randn(1, 1, 20, 33), backend=backend
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = attention_varlen(q, k.bfloat16(), v, *rest, randn(1, 1, 20, 33), backend=backend)
    assert torch.equal(ours, expected)


@EVERY
def test_equal_sequences_are_a_batch(backend):
    arguments = packed(((9, 12),) * 3)
    able(backend, *arguments)
    q, k, v, *_ = arguments
    out = attention_varlen(*arguments, window=(4, 2), backend=backend)
    heads = (t.unflatten(0, (3, -1)).transpose(1, 2) for t in (q, k, v))
    batch = attention(*heads, window=(4, 2), backend="reference")
    near([out.unflatten(0, (3, -1)).transpose(1, 2)], [batch])


# --- Every two options, by the rule.

FACTORS = {
    "lengths": (((6, 19), (1, 1), (19, 6)), ((9, 9), (0, 3), (4, 0))),
    "kv_heads": (1, 2, 4),
    "v_dim": (None, 12),
    "past": (0, 3),
    "bias": (None, "h", "b", "bh"),
    "bias_dtype": ("like q", "float32"),
    "sinks": (False, True),
    "alibi": (None, "h", "bh"),
    "causal": (False, True),
    "left": (None, 3),
    "right": (None, 2),
    "softcap": (None, 1.5),
    "dropout_p": (0.0, 0.3),
    "scale": (None, -0.6),
}
CASES = []
for chosen in all_pairs(FACTORS):
    size = {n: v for n, v in chosen.items() if v not in (None, False, 0.0, "like q")}
    CASES.append({"heads": 4, "dim": 8} | size)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", VARLEN.backends)
@pytest.mark.parametrize("size", CASES, ids=[label(VARLEN, "", "", s) for s in CASES])
def test_every_two_options(backend, dtype, size):
    op = OPS["attention_varlen_with_lse"]
    results = check(op, backend, dtype, size, DEVICE)
    if results[0].skipped:
        pytest.skip(f"{backend}: {results[0].skipped}")
    assert all(r.ok for r in results), failures(results)


@pytest.mark.parametrize("causal", [False, True])
def test_of_sequences_one_by_one_it_is_the_function_of_torch(causal):
    lengths = ((3, 3), (1, 1), (20, 20))
    tensors, options = VARLEN.inputs(
        lengths=lengths, heads=4, kv_heads=2, dim=8, causal=causal, device=DEVICE,
        dtype=torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(
        VARLEN.reference(*tensors, **options), VARLEN.native(*tensors, **options)
    )

"""Attention in 16 bits of heads of every width: those padded to one, and values narrower than keys.

In all pairs; what is only limited by the window has kernels of its own, as long as rows can be
moved 16 bytes at a time.
"""

import pytest
import torch
from cases import DEVICE, interpreted, label
from packed_cases import with_gradients as of_packed
from pairs import all_pairs

from tilewise import attention_with_lse
from tilewise.check import check, failures
from tilewise.choice import refusal
from tilewise.op import HALVES
from tilewise.ops.attention import ATTENTION, WITH_LSE

EVERY = pytest.mark.parametrize("backend", ATTENTION.backends)
WHOLE = (
    (24, 24), (80, 80), (96, 64), (96, 96), (128, 96), (160, 128), (192, 128), (128, 192),
    (192, 192), (224, 224), (256, 8), (256, 256),
)  # fmt: skip
PLAIN = {
    "dim, v_dim": WHOLE,
    "seqs": ((20, 45), (70, 40), (33, 100)),
    "dtype": sorted(HALVES, key=str),
    "kv_heads": (2, 1),
    "causal": (False, True),
    "left": (None, 15),
    "right": (None, 30),
}
SCORED = PLAIN | {
    "dim, v_dim": (*WHOLE, (59, 59), (111, 111), (129, 33), (191, 127), (33, 250)),
    "mask": (None, "bk", "hqk"),
    "bias": (None, "hqk", "bk"),
    "sinks": (False, True),
    "alibi": (None, "bh"),
    "softcap": (None, 1.5),
    "dropout_p": (0.0, 0.3),
}


def cases_of(op, factors):
    for case in all_pairs(factors):
        options = {name: value for name, value in case.items() if value not in (None, False, 0.0)}
        (dim, v_dim), (seq_q, seq_k) = options.pop("dim, v_dim"), options.pop("seqs")
        sizes = {"batch": 1, "heads": 2, "seq_q": seq_q, "seq_k": seq_k, "dim": dim, "v_dim": v_dim}
        dtype, size = options.pop("dtype"), sizes | options
        yield pytest.param(op, dtype, size, id=label(op, "", dtype, size))


CASES = [*cases_of(WITH_LSE, PLAIN), *cases_of(ATTENTION, SCORED)]


def able(backend, *sizes, dtype=torch.bfloat16):
    if interpreted(backend) and DEVICE == "cpu":
        pytest.skip(f"{backend}: slow in the interpreter, and the declared sizes have it")
    q, v = (torch.zeros(1, 1, 1, n, dtype=dtype, device=DEVICE) for n in sizes)
    if no := refusal(ATTENTION.backends[backend], q, q, v):
        pytest.skip(f"{backend}: {no[1]}")


@EVERY
@pytest.mark.thinned(3)
@pytest.mark.parametrize("op, dtype, size", CASES)
def test_outputs_and_gradients(backend, op, dtype, size):
    able(backend, size["dim"], size["v_dim"], dtype=dtype)
    results = check(op, backend, dtype, size, DEVICE)
    assert not results[0].skipped
    assert all(r.ok for r in results), failures(results)


def tensors_of(dim, v_dim, *, seq_q=33, seq_k=70, dtype=torch.bfloat16):
    """q, k and v."""
    generator = torch.Generator().manual_seed(dim)
    shapes = (1, 2, seq_q, dim), (1, 1, seq_k, dim), (1, 1, seq_k, v_dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def differentiated(backend, tensors, dout, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = attention_with_lse(*leaves, **options, backend=backend)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * dout).sum(), leaves)]


WIDE = pytest.mark.parametrize("widths", [(96, 96), (192, 128), (256, 256), (201, 77)], ids=str)


@EVERY
@WIDE
def test_poison_around_is_never_seen(backend, widths):
    """Beside the heads, and in the rows before and behind."""
    able(backend, *widths)
    tensors = tensors_of(*widths)
    dout = torch.randn_like(tensors[0][..., :1].expand(-1, -1, -1, widths[1]))
    clean = differentiated(backend, tensors, dout)
    nan = float("nan")
    around = [torch.nn.functional.pad(t, (8, 8, 9, 9), value=nan)[:, :, 9:-9, 8:-8]
              for t in tensors]  # fmt: skip
    assert all(map(torch.equal, differentiated(backend, around, dout), clean))


@EVERY
@WIDE
@pytest.mark.parametrize("causal", [False, True])
def test_the_bits_of_packed_sequences_are_those_of_a_batch(backend, widths, causal):
    if backend != "cuda":
        pytest.skip(f"{backend}: has other tiles for packed sequences")
    able(backend, *widths)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in tensors_of(*widths))
    cut = {"q": (0, 20, 33), "k": (0, 60, 70)}
    ends = [torch.tensor(cut[name], dtype=torch.int32, device=DEVICE) for name in "qk"]
    out, lse, *grads = of_packed(backend, q, k, v, *ends, 20, 60, causal=causal)
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(out.dtype).view(out.shape)
    for b in range(2):
        own = [slice(*cut[name][b : b + 2]) for name in "qkk"]
        leaves = [
            t[r].transpose(0, 1)[None].detach().requires_grad_()
            for t, r in zip((q, k, v), own, strict=True)
        ]
        expected, expected_lse = attention_with_lse(*leaves, causal=causal, backend=backend)
        lost = (expected * weight[own[0]].transpose(0, 1)[None]).sum()
        lost = lost + expected_lse.masked_fill(expected_lse == -torch.inf, 0).square().sum()
        wanted = [expected, *torch.autograd.grad(lost, leaves)]
        ours = [out[own[0]], *(g[r] for g, r in zip(grads, own, strict=True))]
        assert torch.equal(lse[:, own[0]], expected_lse[0])
        for mine, its in zip(ours, wanted, strict=True):
            assert torch.equal(mine, its[0].transpose(0, 1))

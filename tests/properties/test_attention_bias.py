"""The gradient of a bias, in 16 bits: of whatever dims it has, however its sum is shared out, of
nothing that is not seen, and without a tensor of all scores."""

from importlib import import_module
from itertools import combinations, pairwise

import pytest
import torch
from attention_cases import able, with_gradients
from cases import DEVICE, interpreted
from packed_cases import LENGTHS, NAN, packed
from packed_cases import with_gradients as of_packed
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise import attention_with_lse
from tilewise.check import check, failures
from tilewise.ops.attention import ATTENTION

EVERY = pytest.mark.parametrize("backend", ATTENTION.backends)
BASE = {"batch": 2, "heads": 4, "kv_heads": 2, "seq_q": 70, "seq_k": 75, "dim": 24, "v_dim": 16}
SMALL = BASE | {"seq_q": 2, "seq_k": 3, "dim": 8, "v_dim": 8}
DIMS = ["".join(dims) for n in range(5) for dims in combinations("bhqk", n)]
# Blocks of CUDA C++ have tiles of 64 by 64; of 512 and more of them there is one part.
SHARED_OUT = [
    SMALL | {"batch": 5, "bias": "hqk"},
    SMALL | {"heads": 2, "kv_heads": 2, "seq_q": 150, "bias": "bk"},
    BASE | {"batch": 3, "seq_q": 150, "bias": "k", "causal": True},
    pytest.param(
        SMALL | {"batch": 3, "heads": 520, "kv_heads": 260, "bias": "hqk"}, marks=pytest.mark.slow
    ),
]


def of_bfloat16(backend, seq_q, seq_k, *shapes):
    """q, k and v of 3 batches, 4 heads and 2 of keys, and others of these shapes."""
    if interpreted(backend) and DEVICE == "cpu":
        pytest.skip(f"{backend}: slow in the interpreter, and the declared sizes have it")
    generator = torch.Generator().manual_seed(0)
    heads = (3, 4, seq_q, 72), (3, 2, seq_k, 72), (3, 2, seq_k, 24)
    return [
        torch.randn(s, generator=generator).to(DEVICE, torch.bfloat16) for s in (*heads, *shapes)
    ]


def holds(backend, size):
    of_bfloat16(backend, 1, 1)
    results = check(ATTENTION, backend, torch.bfloat16, size, DEVICE)
    if results[0].skipped:
        pytest.skip(f"{backend}: {results[0].skipped}")
    assert "dbias" in [r.output for r in results]
    assert all(r.ok for r in results), failures(results)


@EVERY
@pytest.mark.thinned(2)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("dims", DIMS)
def test_a_bias_of_any_dims(backend, dims, options):
    holds(backend, BASE | {"bias": dims} | options)


@EVERY
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"left": 40, "right": 3, "dropout_p": 0.3}, {"left": 2, "right": 1}],
    ids=str,
)
@pytest.mark.parametrize("seq_k", [80, 131])
def test_a_bias_with_an_element_for_every_score(backend, seq_k, options):
    """And where queries see few keys, which is another kernel's."""
    holds(backend, BASE | {"bias": "bhqk", "seq_k": seq_k, "seq_q": 130} | options)


@EVERY
@pytest.mark.parametrize("size", SHARED_OUT, ids=str)
def test_its_sum_is_shared_out_whole(backend, size):
    holds(backend, size)


@EVERY
@pytest.mark.parametrize("shape", [(3, 4, 150, 75), (3, 1, 1, 75), (1, 1, 150, 75)], ids=str)
def test_runs_in_any_order_have_the_same_bits(backend, shape, monkeypatch):
    tensors = of_bfloat16(backend, 150, 75, shape)
    runs = []
    for order in ("forward", "reverse", "3", "8"):  # of blocks and threads, where CUDA is emulated
        monkeypatch.setenv("TILEWISE_EMULATION_ORDER", order)
        runs.append(with_gradients(backend, *tensors, causal=True, dropout_p=0.2, seed=3)[-1])
    assert all(torch.equal(a, b) for a, b in pairwise(runs))


@EVERY
@pytest.mark.parametrize("shape", [(3, 4, 70, 90), (1, 4, 70, 90), (3, 1, 1, 90)], ids=str)
def test_of_keys_behind_padding_nothing_is_seen(backend, shape):
    q, k, v, bias = of_bfloat16(backend, 70, 90, shape)
    mask = torch.ones(1, 1, 1, 90, dtype=torch.bool, device=DEVICE)
    mask[..., 10:80] = False
    clean = with_gradients(backend, q, k, v, bias, mask=mask)
    k[:, :, 10:80], v[:, :, 10:80], bias[..., 10:80] = NAN, NAN, NAN
    ours = with_gradients(backend, q, k, v, bias, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert not ours[4][..., 10:80].any()
    assert ours[4].any()


@EVERY
@pytest.mark.parametrize("lengths", [LENGTHS, ((70, 90), (0, 70), (65, 1))], ids=str)
def test_of_no_sequence_nothing_is_seen(backend, lengths):
    of_bfloat16(backend, 1, 1)
    q, k, v, *rest = packed(lengths, past=3, dtype=torch.bfloat16)
    bias = torch.randn(len(lengths), 1, *rest[2:]).to(DEVICE)
    outside = torch.ones_like(bias, dtype=torch.bool)
    for own, (seq_q, seq_k) in zip(outside, lengths, strict=True):
        own[:, :seq_q, :seq_k] = False
    clean = of_packed(backend, q, k, v, *rest, bias)
    for t in (q, k, v):
        t[-3:] = NAN
    bias[outside] = NAN
    ours = of_packed(backend, q, k, v, *rest, bias)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))
    assert not ours[5][outside].any()
    assert ours[5][~outside].any()


@EVERY
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "dropout_p": 0.2, "seed": 1}], ids=str)
def test_what_is_added_to_all_keys_moves_lse_alone(backend, options):
    """As closely as sums in fp32 can say, whatever out is rounded to."""
    q, k, v, bias, dout = of_bfloat16(backend, 70, 90, (3, 4, 70, 90), (3, 4, 70, 24))
    able(backend, q, k, v, bias, **options)
    bias, dlse = bias.float().requires_grad_(), torch.linspace(-1, 1, 840, device=DEVICE)
    dlse = dlse.view(3, 4, 70)
    both = attention_with_lse(q, k, v, bias, **options, backend=backend)
    (dbias,) = torch.autograd.grad(both, bias, (dout, dlse))
    values = v.float().abs().repeat_interleave(2, 1)
    largest = float((dout.float().abs() @ values.mT).max()) / (1 - options.get("dropout_p", 0)) + 1
    error = float((dbias.sum(-1) - dlse).abs().max())
    assert error <= 90 * torch.finfo(torch.float32).eps * largest


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made within the block."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("shape", [(1, 1, 100, 90), (1, 4, 100, 90), (3, 1, 1, 90)], ids=str)
def test_no_tensor_of_all_scores_is_made(shape):
    q, k, v, bias = of_bfloat16("cuda", 100, 90, shape)
    able("cuda", q, k, v, bias)
    kernels = import_module(ATTENTION.backends["cuda"].module)
    tensors, options = (q, k, v, None, bias, None, None), (-1, -1, 2.0, 0.3, 0.0, None, None, 0, 0)
    results = kernels.attention_forward(*tensors, *options)
    wanted = True, True, True, True, False
    with Largest() as largest:
        kernels.attention_backward(results[0], None, *tensors, *results, *options, *wanted)
    assert q.numel() <= largest.elements < 3 * 4 * 100 * 90

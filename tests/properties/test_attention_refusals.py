"""Every sentence with which attention refuses, once."""

import pytest
import torch
from attention_cases import zeros

from tilewise import attention, attention_with_lse, merge_attention
from tilewise.choice import refusal
from tilewise.op import OPS
from tilewise.ops.attention import ATTENTION

Q, K, V = zeros(1, 2, 3, 4), zeros(1, 1, 5, 4), zeros(1, 1, 5, 6)
HERE = Q.device
TENSORS = [
    (TypeError, "q must be floating point, got torch.int64", (Q.long(), K, V)),
    (TypeError, "v must be torch.float32 like q, got torch.float16", (Q, K, V.half())),
    (ValueError, "q, k and v must be [batch, heads, seq, dim], "
     "got [2, 3, 4], [1, 1, 5, 4] and [1, 1, 5, 6]", (Q[0], K, V)),
    (ValueError, "k must be [1, kv_heads, seq_k, 4] for this q, got [1, 1, 5, 6]", (Q, V, V)),
    (ValueError, "v must be [1, 1, 5, v_dim] for this k, got [1, 1, 4, 6]", (Q, K, V[:, :, 1:])),
    (ValueError, "heads of q must be a multiple of those of k, got 3 and 2",
     (zeros(1, 3, 3, 4), zeros(1, 2, 5, 4), zeros(1, 2, 5, 4))),
    (RuntimeError, f"k must be on {HERE}, got meta", (Q, K.to("meta"), V)),
    (TypeError, "bias must be torch.float32, got torch.float64",
     (Q, K, V, zeros(3, 5).double())),
    (ValueError, "bias must be broadcastable to [1, 2, 3, 5], got [5, 3]", (Q, K, V, zeros(5, 3))),
    (RuntimeError, f"bias must be on {HERE}, got meta", (Q, K, V, zeros(3, 5, device="meta"))),
    (TypeError, "sinks must be torch.float32, got torch.int64",
     (Q, K, V, None, zeros(2).long())),
    (ValueError, "sinks must be [2] for this q, got [1]", (Q, K, V, None, zeros(1))),
    (RuntimeError, f"sinks must be on {HERE}, got meta", (Q, K, V, None, zeros(2, device="meta"))),
]  # fmt: skip
NUMBERS = zeros(6).long()
OPTIONS = [
    (TypeError, "mask must be torch.bool, got torch.float32", {"mask": zeros(3, 5)}),
    (ValueError, "mask must be broadcastable to [1, 2, 3, 5], got [5, 3]",
     {"mask": zeros(5, 3).bool()}),
    (TypeError, "window must be (left, right), ints or None, got 3", {"window": 3}),
    (TypeError, "window must be (left, right), ints or None, got (1, 2.0)", {"window": (1, 2.0)}),
    (TypeError, "window must be (left, right), ints or None, got (1,)", {"window": (1,)}),
    (ValueError, "window must be at least 0 to each side, got (-1, None)", {"window": (-1, None)}),
    (TypeError, "alibi_slopes must be torch.float32, got torch.float64",
     {"alibi_slopes": zeros(2).double()}),
    (ValueError, "alibi_slopes must be [2] or [1, 2] for this q, got [3]",
     {"alibi_slopes": zeros(3)}),
    (ValueError, "alibi_slopes must be without gradient, got requires_grad=True",
     {"alibi_slopes": zeros(2).requires_grad_()}),
    (RuntimeError, f"alibi_slopes must be on {HERE}, got meta",
     {"alibi_slopes": zeros(2, device="meta")}),
    (ValueError, "softcap must be positive, got 0.0", {"softcap": 0.0}),
    (ValueError, "dropout_p must be from 0 to 1, got -0.1", {"dropout_p": -0.1}),
    (ValueError, "seed must be an int or [], got [6]", {"dropout_p": 0.1, "seed": NUMBERS}),
    (ValueError, "offset must be an int or [], got [6]", {"seed": 1, "offset": NUMBERS}),
    (ValueError, "must be given seed or generator, got both",
     {"dropout_p": 0.1, "seed": 1, "generator": torch.Generator()}),
    (TypeError, "seed must be an int or a tensor, got float", {"dropout_p": 0.1, "seed": 1.5}),
    (ValueError, "backend must be one of cuda, numba, triton, reference, got 'abacus'",
     {"backend": "abacus"}),
]  # fmt: skip
REFUSED = [
    *((error, sentence, tensors, {}) for error, sentence, tensors in TENSORS),
    *((error, sentence, (Q, K, V), options) for error, sentence, options in OPTIONS),
]


@pytest.mark.parametrize("op", [attention, attention_with_lse])
@pytest.mark.parametrize(
    "error, sentence, tensors, options", REFUSED, ids=[sentence for _, sentence, *_ in REFUSED]
)
def test_refuses(op, error, sentence, tensors, options):
    with pytest.raises(error) as raised:
        op(*tensors, **options)
    assert str(raised.value) == f"{op.__name__}: {sentence}"


OUT, LSE = zeros(1, 2, 3, 4), zeros(1, 2, 3)
PARTS = [
    (TypeError, "out_a must be floating point, got torch.int64", (OUT.long(), LSE, OUT, LSE)),
    (TypeError, "lse_a must be torch.float32 beside this out_a, got torch.float64",
     (OUT, LSE.double(), OUT, LSE)),
    (TypeError, "out_b must be torch.float16 beside this out_a, got torch.float32",
     (OUT.half(), LSE, OUT, LSE)),
    (ValueError, "out_b must be [1, 2, 3, 4] beside this out_a, got [1, 2, 3]",
     (OUT, LSE, LSE, LSE)),
    (ValueError, "lse_b must be [1, 2, 3] beside this out_a, got [1, 2]",
     (OUT, LSE, OUT, LSE[..., 0])),
    (RuntimeError, f"lse_b must be on {HERE}, got meta", (OUT, LSE, OUT, LSE.to("meta"))),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, parts", PARTS, ids=[said for _, said, _ in PARTS])
def test_merging_refuses(error, sentence, parts):
    with pytest.raises(error) as raised:
        merge_attention(*parts)
    assert str(raised.value) == f"merge_attention: {sentence}"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_wide_heads_are_refused(backend):
    q = zeros(1, 1, 2, 257, dtype=torch.bfloat16)
    if no := refusal(ATTENTION.backends[backend], *[q[..., :256]] * 3):
        pytest.skip(f"{backend}: {no[1]}")
    with pytest.raises(NotImplementedError, match="takes heads up to 256 wide, got 257"):
        attention(q, q, q, backend=backend)


GIVEN = {
    "bias": ((zeros(3, 5),), {}),
    "sinks": ((None, zeros(2)), {}),
    "window": ((), {"window": (1, None)}),
    "alibi_slopes": ((), {"alibi_slopes": zeros(2)}),
    "softcap": ((), {"softcap": 1.0}),
    "dropout": ((), {"dropout_p": 0.5}),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("backend", ATTENTION.backends)
@pytest.mark.parametrize("op", [attention, attention_with_lse])
def test_what_a_kernel_lacks_is_named_and_the_reference_runs_it(op, backend, name):
    more, options = GIVEN[name]
    able = OPS[op.__name__].backends[backend]
    if refusal(able, Q, K, V):
        pytest.skip(f"{backend}: cannot run here")
    if refusal(able, Q, K, V, *more, **options) is None:
        pytest.skip(f"{backend}: takes {name}")
    with pytest.raises(NotImplementedError, match=rf"'{backend}' takes no {name}; '.*' can run"):
        op(Q, K, V, *more, **options, backend=backend)
    op(Q, K, V, *more, **options)

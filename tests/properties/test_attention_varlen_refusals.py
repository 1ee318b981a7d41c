"""Every sentence with which attention of packed sequences refuses, once."""

import pytest
import torch
from attention_cases import zeros
from cases import DEVICE

from tilewise import attention_varlen, attention_varlen_with_lse
from tilewise.choice import refusal
from tilewise.op import OPS

Q, K, V = zeros(3, 2, 4), zeros(5, 1, 4), zeros(5, 1, 6)
ENDS_Q, ENDS_K = (torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in ([0, 1, 3], [0, 4, 5]))
GIVEN = {"q": Q, "k": K, "v": V, "cu_seqlens_q": ENDS_Q, "cu_seqlens_k": ENDS_K,
         "max_seqlen_q": 2, "max_seqlen_k": 4}  # fmt: skip


def ends(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


REFUSED = [
    (TypeError, "q must be floating point, got torch.int64", {"q": Q.long()}),
    (TypeError, "v must be torch.float32 like q, got torch.float16", {"v": V.half()}),
    (ValueError, "q, k and v must be [total, heads, dim], got [3, 8], [5, 1, 4] and [5, 1, 6]",
     {"q": Q.flatten(1)}),
    (ValueError, "k must be [total_k, kv_heads, 4] for this q, got [5, 1, 6]", {"k": V}),
    (ValueError, "v must be [5, 1, v_dim] for this k, got [4, 1, 6]", {"v": V[1:]}),
    (ValueError, "heads of q must be a multiple of those of k, got 3 and 2",
     {"q": zeros(3, 3, 4), "k": zeros(5, 2, 4), "v": zeros(5, 2, 4)}),
    (RuntimeError, f"k must be on {Q.device}, got meta", {"k": K.to("meta")}),
    (TypeError, "cu_seqlens_q must be torch.int32, got torch.int64",
     {"cu_seqlens_q": ENDS_Q.long()}),
    (ValueError, "cu_seqlens_k must be [batch + 1], got [1, 3]", {"cu_seqlens_k": ENDS_K[None]}),
    (RuntimeError, f"cu_seqlens_k must be on {Q.device}, got meta",
     {"cu_seqlens_k": ENDS_K.to("meta")}),
    (ValueError, "cu_seqlens_k must be [3] like cu_seqlens_q, got [2]",
     {"cu_seqlens_k": ENDS_K[1:]}),
    (TypeError, "max_seqlen_q must be an int, got Tensor", {"max_seqlen_q": ENDS_Q[0]}),
    (ValueError, "max_seqlen_k must be at least 0, got -1", {"max_seqlen_k": -1}),
    (TypeError, "bias must be torch.float32, got torch.bool", {"bias": zeros(1, 1, 2, 4).bool()}),
    (ValueError, "bias must be [1 or 2, 1 or 2, 2, 4], got [2, 4]", {"bias": zeros(2, 4)}),
    (ValueError, "bias must be [1 or 2, 1 or 2, 2, 4], got [1, 1, 1, 4]",
     {"bias": zeros(1, 1, 1, 4)}),
    (ValueError, "bias must be [1 or 2, 1 or 2, 2, 4], got [3, 1, 2, 4]",
     {"bias": zeros(3, 1, 2, 4)}),
    (RuntimeError, f"bias must be on {Q.device}, got meta",
     {"bias": zeros(1, 1, 2, 4, device="meta")}),
    (ValueError, "sinks must be [2] for this q, got [3]", {"sinks": zeros(3)}),
    (ValueError, "alibi_slopes must be [2] or [2, 2] for this q, got [3]",
     {"alibi_slopes": zeros(3)}),
    (ValueError, "window must be at least 0 to each side, got (-1, 2)", {"window": (-1, 2)}),
    (ValueError, "cu_seqlens_q must begin with 0, got 1",
     {"cu_seqlens_q": ends(1, 2, 3), "check_inputs": True}),
    (ValueError, "cu_seqlens_k must not decrease, got 4 and 3 at 1",
     {"cu_seqlens_k": ends(0, 4, 3), "check_inputs": True}),
    (ValueError, "cu_seqlens_k must end at most at 5, got 6",
     {"cu_seqlens_k": ends(0, 4, 6), "check_inputs": True}),
    (ValueError, "max_seqlen_q must be at least the longest sequence, got 1 and 2 at 1",
     {"max_seqlen_q": 1, "check_inputs": True}),
]  # fmt: skip


@pytest.mark.parametrize("op", [attention_varlen, attention_varlen_with_lse])
@pytest.mark.parametrize(
    "error, sentence, given", REFUSED, ids=[sentence for _, sentence, _ in REFUSED]
)
def test_refuses(op, error, sentence, given):
    op(**GIVEN, check_inputs=True)
    with pytest.raises(error) as raised:
        op(**(GIVEN | given))
    assert str(raised.value) == f"{op.__name__}: {sentence}"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("wide", ["q and k", "v"])
def test_wide_heads_are_refused(wide, backend):
    q, k, v = (zeros(3, 2, 4), zeros(5, 1, 4), zeros(5, 1, 257))
    if wide == "q and k":
        q, k, v = (zeros(3, 2, 257), zeros(5, 1, 257), zeros(5, 1, 4))
    given = GIVEN | {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
    rows = (t[..., :256] for t in (given["q"], given["k"], given["v"]))
    if no := refusal(OPS["attention_varlen"].backends[backend], *rows, ENDS_Q, ENDS_K):
        pytest.skip(f"{backend}: {no[1]}")
    with pytest.raises(NotImplementedError, match="takes heads up to 256 wide, got 257"):
        attention_varlen(**given, backend=backend)

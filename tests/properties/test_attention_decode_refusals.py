"""Every sentence with which decoding and appending refuse, once."""

import pytest
import torch
from attention_cases import zeros
from cache_cases import lengths_of
from cases import DEVICE

from tilewise import append_kv_, attention_decode, attention_decode_with_lse

HERE = zeros(1).device
Q, K, V = zeros(2, 4, 3, 8), zeros(2, 2, 9, 8), zeros(2, 2, 9, 5)
TABLE = torch.tensor([[0, 1, -1], [3, 2, 4]], dtype=torch.int32, device=DEVICE)
GIVEN = {"q": Q, "k_cache": K, "v_cache": V, "seq_lens": lengths_of(5, 9)}
PAGED = {"k_cache": zeros(5, 4, 2, 8), "v_cache": zeros(5, 4, 2, 5), "block_table": TABLE}
CHECKED = {"check_inputs": True}
REFUSED = [
    (TypeError, "q must be floating point, got torch.int64", {"q": Q.long()}),
    (ValueError, "q must be [batch, heads, seq, dim], got [4, 3, 8]", {"q": Q[0]}),
    (TypeError, "v_cache must be torch.float32 like q, got torch.float16", {"v_cache": V.half()}),
    (ValueError, "k_cache must be [batch, kv_heads, capacity, dim], got [2, 9, 8]",
     {"k_cache": K[0]}),
    (ValueError, "k_cache must be [pages, page_size, kv_heads, dim], got [2, 9, 8]",
     {"k_cache": K[0], "block_table": TABLE}),
    (RuntimeError, f"k_cache must be on {HERE}, got meta", {"k_cache": K.to("meta")}),
    (ValueError, "v_cache must be [2, 2, 9, v_dim] beside this k_cache, got [2, 2, 8, 5]",
     {"v_cache": V[:, :, 1:]}),
    (ValueError, "k_cache must be [2, kv_heads, capacity, dim] for this q, got [1, 2, 9, 8]",
     {"k_cache": K[:1], "v_cache": V[:1]}),
    (ValueError, "k_cache must have rows of 8 like q, got 7", {"k_cache": K[..., 1:]}),
    (ValueError, "q must have 1 to 16 tokens, got 17", {"q": zeros(2, 4, 17, 8)}),
    (ValueError, "q must have 1 to 16 tokens, got 0", {"q": Q[:, :, :0]}),
    (ValueError, "heads of q must be a multiple of those of the caches, got 3 and 2",
     {"q": Q[:, :3]}),
    (TypeError, "seq_lens must be torch.int32, got torch.int64",
     {"seq_lens": lengths_of(5, 9).long()}),
    (ValueError, "seq_lens must be [2], got [3]", {"seq_lens": lengths_of(1, 2, 3)}),
    (RuntimeError, f"seq_lens must be on {HERE}, got meta",
     {"seq_lens": lengths_of(5, 9).to("meta")}),
    (TypeError, "block_table must be torch.int32, got torch.int64",
     PAGED | {"block_table": TABLE.long()}),
    (ValueError, "block_table must be [2, max_pages], got [1, 3]",
     PAGED | {"block_table": TABLE[:1]}),
    (RuntimeError, f"block_table must be on {HERE}, got meta",
     PAGED | {"block_table": TABLE.to("meta")}),
    (ValueError, "sinks must be [4] for this q, got [3]", {"sinks": zeros(3)}),
    (ValueError, "alibi_slopes must be [4] or [2, 4] for this q, got [3]",
     {"alibi_slopes": zeros(3)}),
    (ValueError, "softcap must be positive, got -1.0", {"softcap": -1.0}),
    (TypeError, "window must be (left, right), ints or None, got 3", {"window": 3}),
    (ValueError, "q must be without gradient, got requires_grad=True",
     {"q": Q.clone().requires_grad_()}),
    (ValueError, "k_cache must be without gradient, got requires_grad=True",
     {"k_cache": K.clone().requires_grad_()}),
    (ValueError, "sinks must be without gradient, got requires_grad=True",
     {"sinks": zeros(4).requires_grad_()}),
    (ValueError, "seq_lens must be from 0 to 9, got 10 at 1",
     {"seq_lens": lengths_of(5, 10)} | CHECKED),
    (ValueError, "seq_lens must be from 0 to 9, got -1 at 0",
     {"seq_lens": lengths_of(-1, 10)} | CHECKED),
    (ValueError, "block_table must name pages from 0 to 4, got -1 for sequence 0",
     PAGED | {"seq_lens": lengths_of(9, 9)} | CHECKED),
    (ValueError, "backend must be one of cuda, numba, triton, reference, got 'abacus'",
     {"backend": "abacus"}),
]  # fmt: skip


@pytest.mark.parametrize("op", [attention_decode, attention_decode_with_lse])
@pytest.mark.parametrize(
    "error, sentence, given", REFUSED, ids=[sentence for _, sentence, _ in REFUSED]
)
def test_refuses(op, error, sentence, given):
    with pytest.raises(error) as raised:
        op(**(GIVEN | given))
    assert str(raised.value) == f"{op.__name__}: {sentence}"


@pytest.mark.parametrize("op", [attention_decode, attention_decode_with_lse])
@pytest.mark.parametrize("more", [{}, PAGED])
def test_what_is_right_is_not_refused(op, more):
    for _ in range(3):  # nor by plan
        op(**(GIVEN | more), check_inputs=True)
    with torch.no_grad():
        op(**(GIVEN | more | {"q": Q.clone().requires_grad_()}))


NEW = {"k_cache": K, "v_cache": V, "k": zeros(2, 2, 3, 8), "v": zeros(2, 2, 3, 5),
       "seq_lens_before": lengths_of(0, 6)}  # fmt: skip
TABLES = {"cos": zeros(9, 4), "sin": zeros(9, 4)}
NOT_APPENDED = [
    (TypeError, "k must be floating point, got torch.int64", {"k": zeros(2, 2, 3, 8).long()}),
    (TypeError, "k_cache must be torch.float32 like k, got torch.float16", {"k_cache": K.half()}),
    (TypeError, "v must be torch.float32 like k, got torch.float64",
     {"v": zeros(2, 2, 3, 5).double()}),
    (ValueError, "k must be [2, 2, 3, 8], got [2, 3, 3, 8]", {"k": zeros(2, 3, 3, 8)}),
    (ValueError, "v must be [2, 2, 3, 5], got [2, 2, 4, 5]", {"v": zeros(2, 2, 4, 5)}),
    (RuntimeError, f"v must be on {HERE}, got meta", {"v": zeros(2, 2, 3, 5, device="meta")}),
    (ValueError, "k_cache must have rows in one piece and no element twice, "
     "got [2, 2, 9, 8] with strides [288, 144, 16, 2]", {"k_cache": zeros(2, 2, 9, 16)[..., ::2]}),
    (ValueError, "v_cache must have rows in one piece and no element twice, "
     "got [2, 2, 9, 5] with strides [90, 0, 5, 1]", {"v_cache": V[:, :1].expand(-1, 2, -1, -1)}),
    (TypeError, "seq_lens_before must be torch.int32, got torch.int64",
     {"seq_lens_before": lengths_of(0, 6).long()}),
    (ValueError, "cos and sin must be given together, got one", {"cos": zeros(9, 4)}),
    (TypeError, "cos must be torch.float32 or torch.float32, got torch.float64",
     {"cos": zeros(9, 4).double(), "sin": zeros(9, 4).double()}),
    (ValueError, "rotary_dim must be at most dim = 8, got 10",
     {"cos": zeros(9, 5), "sin": zeros(9, 5)}),
    (RuntimeError, f"cos must be on {HERE}, got meta", TABLES | {"cos": TABLES["cos"].to("meta")}),
    (ValueError, "k must be without gradient, got requires_grad=True",
     {"k": zeros(2, 2, 3, 8).requires_grad_()}),
    (ValueError, "seq_lens_before must be from 0 to 6, got 7 at 1",
     {"seq_lens_before": lengths_of(0, 7)} | CHECKED),
    (ValueError, "block_table must name pages from 0 to 4, got -1 for sequence 0",
     PAGED | {"seq_lens_before": lengths_of(6, 0)} | CHECKED),
]  # fmt: skip


@pytest.mark.parametrize(
    "error, sentence, given", NOT_APPENDED, ids=[sentence for _, sentence, _ in NOT_APPENDED]
)
def test_appending_refuses(error, sentence, given):
    with pytest.raises(error) as raised:
        append_kv_(**(NEW | given))
    assert str(raised.value) == f"append_kv_: {sentence}"
    append_kv_(**NEW, **TABLES, check_inputs=True)

"""Options of attention in all pairs: the reference by the definition, each kernel by the rule."""

import math

import pytest
import torch
from cases import DEVICE, label
from pairs import all_pairs, pairs_of

from tilewise.check import check, failures
from tilewise.op import OPS
from tilewise.rng import keep_mask

FACTORS = {
    "op": ("attention", "attention_with_lse"),
    "seqs": ((6, 19), (19, 6), (9, 9)),
    "kv_heads": (1, 2, 4),
    "v_dim": (None, 12),
    "mask": (None, "bk", "hqk", "bq"),
    "bias": (None, "hqk", "bk", "q"),
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
    options = {k: v for k, v in chosen.items() if v not in (None, False, 0.0, "like q")}
    (seq_q, seq_k), name = options.pop("seqs"), options.pop("op")
    sizes = {"batch": 2, "heads": 4, "seq_q": seq_q, "seq_k": seq_k, "dim": 8}
    CASES.append((OPS[name], sizes | options))


def test_every_pair_meets():
    numbers = [
        {name: values.index(case[name]) for name, values in FACTORS.items()}
        for case in all_pairs(FACTORS)
    ]
    met = set().union(*map(pairs_of, numbers))
    counts = [len(values) for values in FACTORS.values()]
    every = (sum(counts) ** 2 - sum(n * n for n in counts)) // 2
    assert len(met) == every
    assert len(numbers) < 25


def score(q, k, b, h, i, j, *, mask, bias, causal, window, slopes, softcap, scale):
    """Of one query and one key, as a float; -inf if hidden."""
    own = i + k.shape[2] - q.shape[2]
    left, right = window or (None, None)
    hidden = causal and j > own
    hidden = hidden or (left is not None and j < own - left)
    hidden = hidden or (right is not None and j > own + right)
    if hidden or not mask[b, h, i, j]:
        return -math.inf
    s = scale * float(q[b, h, i] @ k[b, h // (q.shape[1] // k.shape[1]), j])
    if softcap is not None:
        s = softcap * math.tanh(s / softcap)
    return s + float(bias[b, h, i, j]) - float(slopes[b, h]) * abs(own - j)


def by_definition(q, k, v, bias, sinks, **options):
    """out and lse, a score at a time."""
    (batch, heads, seq_q, dim), seq_k = q.shape, k.shape[2]
    full = (batch, heads, seq_q, seq_k)
    slopes = options.pop("alibi_slopes", None)
    drawn = [options.pop(name, 0) for name in ("dropout_p", "seed", "offset")]
    rules = {"causal": False, "window": None, "softcap": None, "scale": dim**-0.5} | options
    rules["mask"] = torch.ones(full) if "mask" not in options else options["mask"].expand(full)
    rules["bias"] = torch.zeros(full) if bias is None else bias.expand(full)
    rules["slopes"] = torch.zeros(1).expand(batch, heads) if slopes is None else slopes
    rules["slopes"] = rules["slopes"].expand(batch, heads)
    out, lse = q.new_zeros(*full[:3], v.shape[-1]), q.new_empty(full[:3])
    for b, h, i in torch.cartesian_prod(*map(torch.arange, full[:3])).tolist():
        s = [score(q, k, b, h, i, j, **rules) for j in range(seq_k)]
        sink = -math.inf if sinks is None else float(sinks[h])
        total = math.fsum(math.exp(x) for x in (*s, sink))
        lse[b, h, i] = math.log(total) if total else -math.inf
        kept = keep_mask(*drawn, (b * heads + h) * seq_q + i, seq_k)
        for j in range(seq_k):
            if s[j] > -math.inf and kept[j]:
                p = math.exp(s[j]) / total / (1 - drawn[0])
                out[b, h, i] += p * v[b, h // (heads // v.shape[1]), j]
    return out, lse


@pytest.mark.parametrize("op, size", CASES, ids=[label(op, "", "", s) for op, s in CASES])
def test_the_reference_is_the_definition(op, size):
    torch.manual_seed(0)
    tensors, options = op.inputs(**size, device="cpu", dtype=torch.float64)
    out, lse = OPS["attention_with_lse"].reference(*tensors, **options)
    torch.testing.assert_close((out, lse), by_definition(*tensors, **options))
    assert torch.equal(OPS["attention"].reference(*tensors, **options), out)


KERNELS = [
    pytest.param(op, backend, dtype, size, id=label(op, backend, dtype, size))
    for op, size in CASES
    for backend in op.backends
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("op, backend, dtype, size", KERNELS)
def test_every_two_options(op, backend, dtype, size):
    results = check(op, backend, dtype, size, DEVICE)
    if results[0].skipped:
        pytest.skip(f"{backend}: {results[0].skipped}")
    assert all(r.ok for r in results), failures(results)

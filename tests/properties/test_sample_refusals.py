"""What sampling refuses, each sentence once."""

import math

import pytest
import torch
from cases import DEVICE

import tilewise

INFINITY, NAN = math.inf, math.nan

X = torch.zeros(2, 8, device=DEVICE)
COLUMN, META = X[:, 0], X[:, 0].to("meta")
GENERATOR = torch.Generator()
IDS = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "logits must be floating point, got torch.int64", {"logits": X.long()}),
        (ValueError, r"logits must be \[batch, vocab\], got \[8\]", {"logits": X[0]}),
        (ValueError, "temperature must be at least 0 and finite, got -1", {"temperature": -1}),
        (ValueError, "temperature must be .* finite, got inf", {"temperature": INFINITY}),
        (ValueError, "temperature must be .* finite, got nan", {"temperature": NAN}),
        (TypeError, "temperature must be a number or a tensor, got str", {"temperature": "1"}),
        (TypeError, "temperature must be floating point, got", {"temperature": COLUMN.long()}),
        (ValueError, r"temperature must be .* \[2\], got \[3\]", {"temperature": X[0, :3]}),
        (RuntimeError, f"temperature must be on {DEVICE}.*, got meta", {"temperature": META}),
        (ValueError, "top_p must be from 0 to 1, got 1.5", {"top_p": 1.5}),
        (ValueError, "top_p must be from 0 to 1, got -0.1", {"top_p": -0.1}),
        (TypeError, "top_p must be a number or a tensor, got bool", {"top_p": True}),
        (ValueError, "top_k must be at least 0, got -1", {"top_k": -1}),
        (TypeError, "top_k must be an int or a tensor, got float", {"top_k": 2.0}),
        (TypeError, "top_k must be torch.int64 or torch.int32, got", {"top_k": COLUMN}),
        (ValueError, r"top_k must be a number or \[2\], got \[8\]", {"top_k": X[0].long()}),
        (ValueError, "min_p must be from 0 to 1, got 1.1", {"min_p": 1.1}),
        (TypeError, "min_p must be floating point, got torch.int64", {"min_p": COLUMN.long()}),
        (
            ValueError,
            "repetition_penalty must be above 0 and finite, got 0",
            {"repetition_penalty": 0.0, "history": IDS},
        ),
        (
            ValueError,
            "presence_penalty must be finite, got inf",
            {"presence_penalty": INFINITY, "history": IDS},
        ),
        (
            ValueError,
            r"frequency_penalty must be a number or \[2\], got \[8\]",
            {"frequency_penalty": X[0], "history": IDS},
        ),
        (
            ValueError,
            "frequency_penalty must come with history, got none",
            {"frequency_penalty": 1.0},
        ),
        (TypeError, "history must be torch.int64, got torch.int32", {"history": IDS.int()}),
        (TypeError, "history must be torch.int64, got list", {"history": [[1], [2]]}),
        (ValueError, r"history must be \[2, length\], got \[3, 2\]", {"history": IDS.t()}),
        (RuntimeError, f"history must be on {DEVICE}.*, got meta", {"history": IDS.to("meta")}),
        (TypeError, "logit_bias must be floating point, got torch.int64", {"logit_bias": IDS}),
        (TypeError, "logit_bias must be floating point, got dict", {"logit_bias": {1: 2.0}}),
        (ValueError, r"logit_bias must be \[8\] or \[2, 8\], got \[2\]", {"logit_bias": COLUMN}),
        (RuntimeError, f"logit_bias must be on {DEVICE}.*, got meta", {"logit_bias": X.to("meta")}),
        (TypeError, "mask must be torch.int32, got torch.bool", {"mask": X > 0}),
        (ValueError, r"mask must be \[2, 1\], got \[2, 3\]", {"mask": IDS.int()}),
        (
            RuntimeError,
            f"mask must be on {DEVICE}.*, got meta",
            {"mask": IDS[:, :1].int().to("meta")},
        ),
        (TypeError, "seed must be an int or a tensor, got float", {"seed": 1.0}),
        (TypeError, "seed must be torch.int64, got torch.float32", {"seed": COLUMN}),
        (ValueError, "must be given seed or generator", {"seed": 1, "generator": GENERATOR}),
        (ValueError, r"seed must be \[\] or \[2\], got \[8\]", {"seed": X[0].long()}),
        (ValueError, "backend must be one of cuda, numba, triton, reference", {"backend": "cud"}),
    ],
)
def test_wrong_input_is_refused(error, message, options):
    with pytest.raises(error, match="sample: " + message):
        tilewise.sample(**{"logits": X} | options)


ROW = X[0]


@pytest.mark.parametrize(
    "message, options",
    [
        ("logits must be without NaN, got nan in row 1", {"logits": torch.stack([ROW, ROW / 0])}),
        ("logits must be above -inf for some token that is allowed, got -inf in row 1",
         {"mask": torch.tensor([[1], [0]], dtype=torch.int32, device=DEVICE)}),
        ("temperature must be at least 0 and finite, got -2.0 in row 1",
         {"temperature": torch.tensor([1.0, -2.0], device=DEVICE)}),
        ("top_p must be from 0 to 1, got nan in row 0",
         {"top_p": torch.tensor([NAN, 2.0], device=DEVICE)}),
        ("repetition_penalty must be above 0 and finite, got 0.0 in row 1",
         {"repetition_penalty": torch.tensor([1.0, 0.0], device=DEVICE), "history": IDS}),
        ("top_k must be at least 0, got -3 in row 1",
         {"top_k": torch.tensor([1, -3], device=DEVICE)}),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_where_asked(message, options):
    call = {"logits": X, "seed": 1} | options
    assert (tilewise.sample(**call) == -1).any()
    with pytest.raises(ValueError, match=f"^sample: {message}$"):
        tilewise.sample(**call, check_inputs=True)


def test_good_rows_are_not_refused():
    each = {"temperature": COLUMN, "top_p": COLUMN + 1, "repetition_penalty": COLUMN + 1}
    tokens = tilewise.sample(X, **each, history=IDS, seed=1, check_inputs=True)
    assert (tokens >= 0).all()
    assert tilewise.sample(X[:0], seed=1, check_inputs=True).shape == (0,)


@pytest.mark.parametrize(
    "function, error, message, options",
    [
        ("filter_logits", ValueError, "logits must be without gradient, got requires_grad=True",
         {"logits": X.clone().requires_grad_()}),
        ("filter_logits", ValueError, r"logits must be \[batch, vocab\], got \[8\]",
         {"logits": ROW}),
        ("filtered_probs", ValueError, "top_p must be from 0 to 1, got 2", {"top_p": 2}),
        ("filtered_probs", ValueError, "logits must be without NaN, got nan in row 0",
         {"logits": X / 0, "check_inputs": True}),
        ("sample_with_logprobs", ValueError, "top_logprobs must be from 0 to 8, got 9",
         {"top_logprobs": 9}),
        ("sample_with_logprobs", TypeError, "top_logprobs must be an int, got NoneType",
         {"top_logprobs": None}),
        ("sample_with_logprobs", ValueError, "must be given seed or generator, got both",
         {"seed": 1, "generator": GENERATOR}),
        ("sample_with_logprobs", ValueError, "logits must be without gradient, got requires_gr.*",
         {"logits": X.clone().requires_grad_()}),
        ("top_k", TypeError, "x must be floating point, got torch.int64", {"x": X.long(), "k": 1}),
        ("top_k", ValueError, r"x must be \[..., vocab\], got \[\]", {"x": X.sum(), "k": 1}),
        ("top_k", TypeError, "k must be an int, got float", {"x": X, "k": 1.0}),
        ("top_k", ValueError, "k must be from 0 to 8, got 9", {"x": X, "k": 9}),
    ],
)  # fmt: skip
def test_the_family_refuses(function, error, message, options):
    first = {} if function == "top_k" else {"logits": X}
    with pytest.raises(error, match=f"^{function}: {message}$"):
        getattr(tilewise, function)(**first | options)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "probs must be floating point, got torch.int64", {"probs": X.long()}),
        (ValueError, r"probs must be \[batch, vocab\], got \[1, 2, 8\]", {"probs": X[None]}),
        (TypeError, "num_samples must be an int, got float", {"num_samples": 2.0}),
        (ValueError, "num_samples must be from 1 to 8, without replacement, got 9",
         {"num_samples": 9}),
        (ValueError, "num_samples must be at least 1, got 0",
         {"num_samples": 0, "replacement": True}),
        (ValueError, "must be given seed or generator, got both",
         {"seed": 1, "generator": GENERATOR}),
        (ValueError, "probs must be at least 0 and finite, got -1.0 in row 0",
         {"probs": X - 1, "check_inputs": True}),
        (ValueError, "probs must be above 0 somewhere, got none in row 0", {"check_inputs": True}),
    ],
)  # fmt: skip
def test_multinomial_refuses(error, message, options):
    with pytest.raises(error, match=f"^multinomial: {message}$"):
        tilewise.multinomial(**{"probs": X, "num_samples": 2} | options)


def test_gumbel_argmax_refuses():
    with pytest.raises(TypeError, match=r"^gumbel_argmax: logits must be floating point, got t"):
        tilewise.gumbel_argmax(X.long())
    with pytest.raises(ValueError, match=r"^gumbel_argmax: logits must be \[..., v"):
        tilewise.gumbel_argmax(X.sum())


DRAFTED = {
    "draft_tokens": IDS,
    "draft_probs": torch.ones(2, 3, 8, device=DEVICE) / 8,
    "target_logits": torch.zeros(2, 4, 8, device=DEVICE),
}


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "draft_tokens must be torch.int64, got torch.int32",
         {"draft_tokens": IDS.int()}),
        (ValueError, r"draft_tokens must be \[batch, draft\], got \[3\]", {"draft_tokens": IDS[0]}),
        (TypeError, "draft_probs must be floating point, got torch.int64",
         {"draft_probs": DRAFTED["draft_probs"].long()}),
        (ValueError, r"draft_probs must be \[2, 3, 8\], got \[2, 3, 7\]",
         {"draft_probs": DRAFTED["draft_probs"][..., :7]}),
        (ValueError, r"target_logits must be \[2, 4, 8\], got \[2, 3, 8\]",
         {"target_logits": DRAFTED["target_logits"][:, :3]}),
        (ValueError, r"target_logits must be \[2, 4, vocab\], got \[2, 8\]",
         {"target_logits": X}),
        (RuntimeError, f"draft_probs must be on {DEVICE}.*, got meta",
         {"draft_probs": DRAFTED["draft_probs"].to("meta")}),
        (ValueError, "draft_probs must be without gradient, got requires_grad=True",
         {"draft_probs": DRAFTED["draft_probs"].clone().requires_grad_()}),
        (ValueError, "top_p must be from 0 to 1, got 1.5", {"top_p": 1.5}),
        (ValueError, r"temperature must be a number or \[2\], got \[8\]", {"temperature": ROW}),
        (ValueError, r"mask must be \[2, 1\], got \[2, 3\]", {"mask": IDS.int()}),
        (ValueError, r"mask must be \[8, 1\], got \[6, 1\]", {"mask": IDS.int()[..., None]}),
        (ValueError, "logits must be without NaN, got nan in row 0",
         {"target_logits": DRAFTED["target_logits"] / 0, "check_inputs": True}),
    ],
)  # fmt: skip
def test_verify_draft_refuses(error, message, options):
    with pytest.raises(error, match=f"^verify_draft: {message}$"):
        tilewise.verify_draft(**DRAFTED | options)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "hidden must be floating point, got torch.int64", {"hidden": X.long()}),
        (ValueError, r"hidden must be \[batch, dim\], got \[8\]", {"hidden": ROW}),
        (ValueError, r"weight must be \[vocab, 8\], got \[2, 7\]", {"weight": X[:, :7]}),
        (TypeError, "weight must be torch.float32, got torch.float16",
         {"weight": X.expand(2, 8).half()}),
        (ValueError, r"linear_bias must be \[2\], got \[8\]", {"linear_bias": ROW}),
        (RuntimeError, f"weight must be on {DEVICE}.*, got meta", {"weight": X.to("meta")}),
        (ValueError, "temperature must be at least 0 and finite, got -1", {"temperature": -1}),
        (ValueError, r"seed must be \[\] or \[2\], got \[8\]", {"seed": ROW.long()}),
        (ValueError, "hidden must be without NaN, got nan in row 0",
         {"hidden": X / 0, "check_inputs": True}),
        (ValueError, "temperature must be at least 0 and finite, got -1.0 in row 0",
         {"temperature": COLUMN - 1, "check_inputs": True}),
    ],
)  # fmt: skip
def test_linear_sample_refuses(error, message, options):
    with pytest.raises(error, match=f"^linear_sample: {message}$"):
        tilewise.linear_sample(**{"hidden": X, "weight": X} | options)

"""Rows of logits, and the losses and gradients that the tests of cross_entropy compare."""

import pytest
import torch
from cases import DEVICE

from tilewise.check import compare
from tilewise.choice import refusal
from tilewise.op import OPS

OP = OPS["cross_entropy"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def runnable(name):
    """The backend of this name; or skip aloud."""
    tensors, options = OP.inputs(rows=2, classes=3, device=DEVICE, dtype=torch.float32)
    if name in OP.backends:
        refused = refusal(OP.backends[name], *tensors, **options)
        if refused:
            pytest.skip(f"{name}: {refused[1]}")
    return name


def rows_of(rows, classes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(rows, classes, device=DEVICE).to(dtype)
    return logits, torch.randint(classes, (rows,), device=DEVICE)


def loss_and_gradient(function, logits, target, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) * 0.75)
    return loss.detach(), gradient


def assert_right(ours, yardstick, truth):
    """By the rule; `yardstick` may be several runs."""
    error, allowed = compare(ours, yardstick, truth)
    assert error <= allowed

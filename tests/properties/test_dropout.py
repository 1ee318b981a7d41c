"""Whose the seed and the offset are, each by itself: of all rows or one a row, of every op that
drops out."""

import pytest
import torch
from cases import BACKENDS, DEVICE, case_or_skip

from tilewise.check import outputs_and_grads
from tilewise.rng import WORDS, philox_words

ROWS = 6
PROBABILITY = {
    "dropout_add": "p", "bias_gelu": "dropout_p", "add_rms_norm": "dropout_p",
    "add_layer_norm": "dropout_p", "embed": "dropout_p",
}  # fmt: skip
SIZES = {"embed": {"batch": 2, "seq": 3, "vocab": 5, "cols": 130}}
MINE = [p for p in BACKENDS if p.values[0].name in PROBABILITY]
NUMBERS = {
    "number": lambda n: n,
    "tensor": lambda n: torch.tensor(n, device=DEVICE),
    "one a row": lambda n: torch.arange(n, n + ROWS, device=DEVICE),
}


@pytest.mark.parametrize("offset", NUMBERS.values(), ids=[f"offset {n}" for n in NUMBERS])
@pytest.mark.parametrize("seed", NUMBERS.values(), ids=[f"seed {n}" for n in NUMBERS])
@pytest.mark.parametrize("op, backend", MINE)
def test_seed_and_offset(op, backend, seed, offset):
    size = SIZES.get(op.name, {"rows": ROWS, "cols": 130})
    call, _, tensors = case_or_skip(op, backend, size=size)
    options = {PROBABILITY[op.name]: 0.4, "seed": seed(2**40), "offset": offset(2**34)}
    expected = outputs_and_grads(op, call, tensors, options | {"backend": "reference"})
    ours = outputs_and_grads(op, call, tensors, options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a == 0, b == 0) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("op, backend", MINE)
def test_a_word_that_is_the_threshold_is_kept(op, backend):
    size = SIZES.get(op.name, {"rows": ROWS, "cols": 130})
    call, _, tensors = case_or_skip(op, backend, size=size)
    word = philox_words(7, 0, 0, 1).item()
    for p, dropped in ((word / WORDS, False), ((word + 1) / WORDS, True)):
        options = {PROBABILITY[op.name]: p, "seed": 7}
        expected = outputs_and_grads(op, call, tensors, options | {"backend": "reference"})[0]
        ours = outputs_and_grads(op, call, tensors, options)[0]
        torch.testing.assert_close(ours, expected)
        if op.name == "embed":  # of which nothing else is 0 or added
            assert (ours.flatten()[0] == 0) == dropped

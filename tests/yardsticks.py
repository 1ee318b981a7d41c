"""The rule of `tilewise.check` for what is more than one op, with fair yardsticks."""

import copy

import torch

from tilewise.check import compare, nudged


def nudged_copy(model, dtype=None):
    """The same model with weights a rounding away, of their own dtype or of this one."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(nudged(weight.to(dtype or weight.dtype)))
    return other


def assert_right(rows):
    """Hold each of `rows`, by name (ours, the truth, runs of the yardstick), to the rule."""
    failed = []
    for name, (ours, truth, *runs) in rows.items():
        truth = truth.detach()
        error, allowed = compare(ours.detach(), [run.detach() for run in runs], truth)
        if error > allowed:
            failed.append(f"{name}: error {error:.2e} > {allowed:.2e}")
    assert not failed, "\n".join(failed)


def by_matrix(grads):
    """Gradients by the name of the weight, those of the keys' biases beside their matrices.

    A bias of the keys moves all scores of a query alike, so that its gradient is 0 but for rounding
    (without rotary positions): it is judged as one more column of its matrix.
    """
    grads = dict(grads)
    for name in [name for name in grads if name.endswith("key.bias")]:
        matrix, bias = name.replace("bias", "weight"), grads.pop(name)
        grads[matrix] = torch.cat([grads[matrix], bias[:, None]], 1)
    return grads

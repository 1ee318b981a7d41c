"""What the two families of norms share, below the ops: formula, refusals, gradients."""

from tilewise.norm.formula import MIXED, added, norm_inputs, normalised, plain_only
from tilewise.norm.launch import (
    add_and_normalise,
    normalise,
    register_add_norm,
    register_norm,
)

__all__ = [
    "MIXED",
    "add_and_normalise",
    "added",
    "norm_inputs",
    "normalise",
    "normalised",
    "plain_only",
    "register_add_norm",
    "register_norm",
]

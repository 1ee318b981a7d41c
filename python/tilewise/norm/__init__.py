"""What the two families of norms share, below the ops: formula, refusals, gradients."""

from tilewise.norm.formula import MIXED, added, norm_inputs, normalised
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
    "register_add_norm",
    "register_norm",
]

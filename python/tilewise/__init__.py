"""Tilewise: fused transformer kernels for PyTorch, with one public function per op."""

from tilewise import functional, nn
from tilewise.allocator import tune_allocator
from tilewise.choice import backend, explain
from tilewise.op import OPS
from tilewise.ops.attention import attention
from tilewise.ops.cross_entropy import cross_entropy, cross_entropy_, cross_entropy_with_lse
from tilewise.ops.gelu import gelu
from tilewise.ops.glu import glu
from tilewise.ops.layer_norm import add_layer_norm, layer_norm
from tilewise.ops.linear_cross_entropy import linear_cross_entropy
from tilewise.ops.rms_norm import add_rms_norm, rms_norm
from tilewise.ops.rotary import rotary, rotary_tables
from tilewise.ops.sample import sample
from tilewise.ops.softmax import log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backend",
    "cross_entropy",
    "cross_entropy_",
    "cross_entropy_with_lse",
    "explain",
    "functional",
    "gelu",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "sample",
    "softmax",
    "tune_allocator",
]

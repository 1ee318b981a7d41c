"""Tilewise: fused transformer kernels for PyTorch, with one public function per op."""

from tilewise.choice import backend, explain
from tilewise.op import OPS
from tilewise.ops.rms_norm import rms_norm

__version__ = "0.1.0"

__all__ = ["OPS", "backend", "explain", "rms_norm"]

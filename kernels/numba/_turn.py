"""Turning pairs of dims by their angles, in vectors."""

from tilewise.kernels.numba._stream import loop_of


def _turned(u, v, cos, sin, sign):
    sin = sin * sign
    return u * cos - v * sin, v * cos + u * sin


turn_pairs = loop_of(_turned)

"""Kernels verified without a GPU."""

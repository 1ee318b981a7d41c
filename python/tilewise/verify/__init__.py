"""Kernels verified without a GPU."""

from tilewise.verify.kernel_report import compile_report as compile_report

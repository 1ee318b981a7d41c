"""Kernels verified without a GPU."""

from tilewise.verify.findings import Finding, Report, SanitizerError
from tilewise.verify.kernel_report import compile_report
from tilewise.verify.sanitizer import sanitize

__all__ = ["Finding", "Report", "SanitizerError", "compile_report", "sanitize"]

"""The C library's allocator, asked to keep the memory of large tensors."""

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of <malloc.h>


def tune_allocator() -> bool:
    """Let glibc keep freed memory for the next tensor, rather than give it back to the system.

    By default every tensor over 32 MiB is mapped afresh, and each of its pages costs a fault when
    first written: filling 64 MiB took 26.6 ms so and 1.8 ms in memory used before (2-core AMD Zen
    5, 2026-11), more than any op on it. The setting holds for the whole process, torch's tensors
    included, and its memory then stays at its peak; so the library never does this unasked.

    Returns:
        Whether the allocator took the setting: it does where the C library is glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))

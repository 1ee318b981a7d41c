"""Compiled Numba kernels kept between processes: each under its own name, safe when two save."""

import pytest

pytest.importorskip("numba")

from tilewise.kernels.numba import _norm, _parallel


def test_two_kernels_of_one_name_have_two_files():
    """One index for both would hand one kernel's code to the other: the signatures are alike."""

    def _forward(task, x):
        pass

    _forward.__module__ = "tilewise.kernels.numba.softmax"
    _forward.__qualname__ = "_forward"
    ours, theirs = _parallel.Kernel(_forward), _norm._forward
    files = {k._launch._cache._impl.filename_base for k in (ours, theirs)}
    assert len(files) == 2


def test_saving_is_locked(monkeypatch):
    """Numba numbers a signature's file by what the index holds: two at once take one number."""
    held = []

    class Lock:
        def __init__(self, path):
            self.path = str(path)

        def __enter__(self):
            held.append(self.path)

        def __exit__(self, *error):
            held.append("released")

    monkeypatch.setattr(_parallel, "FileLock", Lock)
    monkeypatch.setattr(
        _parallel.FunctionCache, "save_overload", lambda self, *rest: held.append("saved")
    )
    _norm._forward._launch._cache.save_overload(None, None)
    assert held[1:] == ["saved", "released"]
    assert held[0].endswith(".lock")

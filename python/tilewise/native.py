"""The compiled module `tilewise._cuda`: where it is, and whether it can be built."""

from importlib import import_module
from importlib.util import find_spec

MODULE = "tilewise._cuda"


def is_built() -> bool:
    """Whether the module can be imported without building it first."""
    return find_spec(MODULE) is not None


def can_build() -> bool:
    """Whether a call with `backend="cuda"` may build it now."""
    return False


def load() -> None:
    """Import the module, so that `from tilewise import _cuda` works."""
    import_module(MODULE)


def mention_unbuilt() -> None:
    """Say once that Triton serves where CUDA kernels would, were they built."""


for function in (is_built, can_build):  # constants to Dynamo: see op.transforming
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]

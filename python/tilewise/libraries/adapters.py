"""What an adapter is, and what all of them say."""

from collections.abc import Callable, Mapping
from typing import Any

# By op and library: the module that holds the function, and the adapter, which is given it first.
Adapters = Mapping[str, Mapping[str, tuple[str, Callable[..., Any]]]]


def without(**options: Any) -> None:
    """Refuse what a library has no argument for."""
    for name, value in options.items():
        if value is not None:
            raise TypeError(f"has no {name}")

"""Functions of Triton that are replaced in this process, and what they were before."""

from collections.abc import Callable
from typing import Any

# By name: no two that are replaced share one.
STOCK: dict[str, Callable[..., Any]] = {}
MISSING: list[str] = []


def replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put `function` in the place of `owner.name`, which goes to `STOCK`, or note its absence."""
    stock = getattr(owner, name, None)
    if stock is None:
        MISSING.append(f"{getattr(owner, '__name__', owner)}.{name}")
        return
    STOCK[name] = stock
    setattr(owner, name, function)

"""Tables and progress bars on a terminal, plain text in a pipe."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

CONSOLE: Any = None
ERRORS: Any = None
try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from rich.text import Text
except ImportError:  # installed without its dependencies, as on a machine without a network
    pass
else:
    # Rich itself honours NO_COLOR, and writes plain text where standard output is no terminal.
    CONSOLE = Console(highlight=False)
    ERRORS = Console(stderr=True, highlight=False)

T = TypeVar("T")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns: a table on a terminal, tab-separated values in a pipe."""
    if CONSOLE is None or not CONSOLE.is_terminal:
        for row in (columns, *rows):
            sys.stdout.write("\t".join(str(cell) for cell in row) + "\n")
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    CONSOLE.print(table)


def with_progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Go through `items` under a progress bar on the terminal, or in silence without one."""
    if ERRORS is None or not ERRORS.is_terminal:
        yield from items
    else:
        yield from track(items, description, total=total, console=ERRORS, transient=True)

"""Tables on a terminal, plain text in a pipe."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# Rich itself honours NO_COLOR, and writes plain text where standard output is no terminal.
CONSOLE = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns: a table on a terminal, tab-separated values in a pipe."""
    if not CONSOLE.is_terminal:
        for row in (columns, *rows):
            sys.stdout.write("\t".join(str(cell) for cell in row) + "\n")
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    CONSOLE.print(table)

"""Rich tables that look alike in all commands, and the console that prints them."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH_OF_A_PIPE = 140


def console() -> "Console":
    """Console on stdout; into a pipe or a file it prints 140 columns, so that no cell is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> "Table":
    """A table whose first `text_columns` columns are text (left) and the others numbers (right)."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < text_columns else "right")
    for row in rows:
        result.add_row(*row)
    return result

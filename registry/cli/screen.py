"""What the commands print: tables that fit the terminal, warnings and errors."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..errors import printable


class _Screen(Console):
    """A console that shows control characters of data, as an id's or a path's, and sends the terminal none."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# A pipe has no width; rich would fold tables to 80 columns.
out = _Screen(width=None if "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty()) else 120)
err = _Screen(stderr=True)


def say(markup: str) -> None:
    """Print a line that may be long on standard output."""
    out.print(markup, highlight=False, soft_wrap=True)


def tell(markup: str) -> None:
    """Print a line that may be long on standard error."""
    err.print(markup, highlight=False, soft_wrap=True)


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}")


def complain(message: str) -> None:
    tell(f"[bold red]error:[/] {escape(message)}")


def print_table(title: str, rows: Sequence[dict[str, str]], unbroken: int = 0) -> None:
    if not rows:
        return
    table, width = table_of(rows, fold=False, unbroken=unbroken)
    if width > out.width:
        table, width = table_of(rows, fold=True, unbroken=unbroken)
    out.print(f"[italic]{escape(title)}[/]", highlight=False, soft_wrap=True)  # a table's own would be cut to its width
    table.width = width if width > out.width else None
    out.print(table, crop=False)


def print_in_pieces(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Print a table in as many pieces as the terminal's width asks for; each has the first column."""
    first, *others = rows[0]
    while others:
        fits = (n for n in range(len(others), 1, -1) if _width(rows, [first, *others[:n]]) <= out.width)
        columns = [first, *others[: next(fits, 1)]]
        print_table(title, [{column: row[column] for column in columns} for row in rows])
        others, title = others[len(columns) - 1 :], f"{title.removesuffix(', continued')}, continued"


def _width(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    return table_of([{column: row[column] for column in columns} for row in rows], fold=False)[1]


def table_of(rows: Sequence[dict[str, str]], *, fold: bool, unbroken: int = 0) -> tuple[Table, int]:
    """Return a table and the width it needs.

    Names, figures and columns of at most `unbroken` characters are never broken; headers are if `fold`.
    """
    table, width = Table(), 1
    for number, column in enumerate(rows[0]):
        cells = [row[column] for row in rows]
        figures = number > 0 and all(cell[:1] in "-0123456789" for cell in cells)
        whole = figures or number == 0 or max(map(cell_len, cells)) <= unbroken
        words = cells if whole else [word for cell in cells for word in cell.split()]
        widest = max(map(cell_len, [*words, *(column.split() if fold else [column])]))
        header = "\n".join(textwrap.wrap(column, widest))
        table.add_column(
            escape(header),
            justify="right" if figures else "left",
            no_wrap=whole,
            min_width=widest,
        )
        width += widest + 3
    for row in rows:
        table.add_row(
            *(f"[bold]{escape(value)}[/]" if hasattr(value, "is_best") else escape(value) for value in row.values())
        )
    return table, width

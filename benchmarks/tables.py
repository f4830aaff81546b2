"""A table twice: in colour for the terminal, in Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as Rich
from rich.text import Text


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def show(self) -> None:
        table = Rich(title=self.title, caption=Text("\n".join(self.notes)))
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        console = Console()
        if not console.is_terminal:  # a log has no width to keep to
            console = Console(width=160)
        console.print(table)

    def markdown(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            _line(self.columns),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *map(_line, self.rows),
            "",
            *(f"{note}  " for note in self.notes),
        ]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"

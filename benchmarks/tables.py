"""Tables in Markdown, with columns that are aligned for a terminal too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a table whose first column is aligned to the left and all others to the right."""
    cells = [[*map(str, line)] for line in (columns, *lines)]
    first, *others = (max(4, *map(len, column)) for column in zip(*cells, strict=True))

    def padded(line: Sequence[str]) -> str:
        rest = (cell.rjust(n) for cell, n in zip(line[1:], others, strict=True))
        return f"| {' | '.join([line[0].ljust(first), *rest])} |"

    rule = ["-" * first, *("-" * (n - 1) + ":" for n in others)]
    return "\n".join(map(padded, [cells[0], rule, *cells[1:]])) + "\n"


def section(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[object]], *notes: str
) -> str:
    """Return a table under its title, with notes below it."""
    below = "".join(f"\n{note}  " for note in notes)
    return f"**{title}**\n\n{markdown(columns, lines)}{below}\n"


def pair(numbers: Sequence[float] | None) -> str:
    """Return a figure of the forward and one of both directions."""
    return " / ".join(f"{round(x, 2):g}" for x in numbers) if numbers else "–"

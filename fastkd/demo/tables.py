"""Tables of students: what each method gains over no teacher, printed and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

WORDS = (
    "student learns from",
    "engine",
    "two towers",
    "loss and gradients",
)  # columns without numbers


def of(method: Any, fits: Sequence[Any]) -> list[Any]:
    """Return the fits of a method, one for each seed."""
    return [fit for fit in fits if fit.method == method]


def gain_and_wins(
    values: Sequence[float], baseline: Sequence[float], form: str = "+.1f"
) -> tuple[str, str]:
    """Return the gain over another method, seed by seed, and in how many seeds there is one."""
    gains = [a - b for a, b in zip(values, baseline, strict=True)]
    return spread(gains, form), f"{sum(gain > 0 for gain in gains)}/{len(gains)}"


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation, which one value does not have."""
    average = format(mean(values), form)
    return f"{average} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else average


Sections = Mapping[str, Sequence[Sequence[str]]]  # rows under their title


def printed(header: Sequence[str], sections: Sections) -> list[Table]:
    """Return a table for each title, with the same columns."""
    cells = [header, *(row for rows in sections.values() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    tables = []
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name, width in zip(header, widths, strict=True):
            table.add_column(
                name, justify="left" if name in WORDS else "right", min_width=width, no_wrap=True
            )
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(header: Sequence[str], sections: Sections) -> str:
    rule = ["---" if name in WORDS else "---:" for name in header]
    return "\n\n".join(
        "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in [header, rule, *rows])])
        for title, rows in sections.items()
    )

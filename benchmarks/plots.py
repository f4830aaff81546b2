"""Plots of a record: time and memory against each axis, of a GPU the share of its ceiling too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from cases import CASES
from report import ORDER, rows_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
BOTH_WAYS = "forward+backward"


def draw(record: dict[str, Any], stem: Path) -> list[Path]:
    """As <stem>-<what it shows>.png; what was not measured is not drawn."""
    rows = [row for row in rows_of(record) if row.get("milliseconds")]
    rows = [row for row in rows if row["direction"] == BOTH_WAYS]
    if not rows:
        return []
    title = f"{record['device']}, {BOTH_WAYS}: {record['label']}"
    plots = {"time": time, "memory": memory}
    if any(row.get("share_of_ceiling") for row in rows):
        plots["share"] = share
    files = []
    for what, plot in plots.items():
        figure = plot([row for row in rows if row["dtype"] == rows[0]["dtype"]])
        figure.suptitle(f"{title}, {rows[0]['dtype']}")
        figure.tight_layout()
        files.append(stem.with_name(f"{stem.name}-{what}.png"))
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files


def share(rows: list[Row]) -> Any:
    """Of the largest problem of each loss."""
    largest = max((row["shape"] for row in rows), key=math.prod)
    rows = [row for row in rows if row["shape"] == largest]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    ops = [op for op in ORDER if any(row["op"] == op for row in rows)]
    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(ops), 4))
    for i, name in enumerate(names):
        shares = {r["op"]: r.get("share_of_ceiling") for r in rows if r["implementation"] == name}
        places = [place + 0.8 * i / len(names) for place in range(len(ops))]
        axes.bar(places, [shares.get(op) or 0 for op in ops], 0.8 / len(names), label=name)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_xticks([place + 0.4 for place in range(len(ops))], ops, rotation=20, ha="right")
    axes.set_ylabel(f"least bytes or FLOPs / time, of the ceiling\n{'×'.join(map(str, largest))}")
    axes.legend(fontsize="small")
    return figure


def time(rows: list[Row]) -> Any:
    return against_axes(rows, lambda row: row["milliseconds"], "ms")


def memory(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["peak_extra_bytes"]]
    return against_axes(rows, lambda row: row["peak_extra_bytes"] / 2**20, "peak, MiB")


def against_axes(rows: list[Row], value: Callable[[Row], float], label: str) -> Any:
    """The loss that was measured at most shapes, along each axis where it was at most."""
    op = max(ORDER, key=lambda op: len({tuple(row["shape"]) for row in rows if row["op"] == op}))
    rows = [row for row in rows if row["op"] == op]
    names = next(case.family.axes for case in CASES if case.name == op)
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, axes in enumerate(panels[0]):
        origin = densest(axis, [row["shape"] for row in rows])
        for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
            mine = [row for row in rows if row["implementation"] == name]
            points = sorted(along(axis, origin, mine, value))
            if points:  # ours, and then eager's, above others where lines meet
                axes.loglog(*zip(*points, strict=True), "o-", label=name, zorder=10 - i / 100)
        fixed = (
            f"{n} = {x}" for i, (n, x) in enumerate(zip(names, origin, strict=True)) if i != axis
        )
        axes.set_xlabel(", ".join([names[axis], *fixed]))
        axes.set_ylabel(f"{op}, {label}")
        axes.legend(fontsize="small")
    return figure


def densest(axis: int, shapes: list[list[int]]) -> list[int]:
    """The largest shape of a line of most shapes along this axis."""
    lines: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for shape in shapes:
        lines.setdefault((*shape[:axis], *shape[axis + 1 :]), set()).add(tuple(shape))
    line = max(lines.values(), key=lambda line: (len(line), max(map(math.prod, line))))
    return list(max(line))


def along(
    axis: int, origin: list[int], rows: list[Row], value: Callable[[Row], float]
) -> Iterator[tuple[int, float]]:
    for row in rows:
        shape = row["shape"]
        if all(a == b for i, (a, b) in enumerate(zip(shape, origin, strict=True)) if i != axis):
            yield shape[axis], value(row)

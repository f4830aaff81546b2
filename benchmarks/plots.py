"""Plots of a record: time and memory against each axis of the loss that has most shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from workloads import BY_NAME

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
Value = Callable[[Row], float | None]  # of an implementation's entry
VALUES: dict[str, tuple[str, Value]] = {
    "time": ("ms", lambda entry: entry.get("milliseconds")),
    "memory": ("peak, MiB", lambda entry: (entry.get("peak_extra_bytes") or 0) / 2**20),
}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw <device>-<problem>-<value>.png for each problem, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    rows = [row for row in record["rows"] if row["direction"] == "forward+backward"]
    rows = [row for row in rows if row["loss"] in BY_NAME]
    for problem in dict.fromkeys(BY_NAME[row["loss"]].problem for row in rows):
        of_problem = [row for row in rows if BY_NAME[row["loss"]].problem == problem]
        for name, (label, value) in VALUES.items():
            first = of_problem[0]  # only rows of one dtype and number of threads can be compared
            alike = ("dtype", "threads")
            chosen = [r for r in of_problem if all(r.get(x) == first.get(x) for x in alike)]
            figure = against_axes(chosen, value, label)
            figure.suptitle(
                f"{record['device']}, forward+backward, {first['dtype']}: {record['label']}"
            )
            figure.tight_layout()
            device = "-".join(record["device"].lower().split())
            files.append(folder / f"{device}-{problem or 'formula'}-{name}.png".replace("/", "-"))
            figure.savefig(files[-1], dpi=120)
            plt.close(figure)
    return files


def against_axes(rows: list[Row], value: Value, label: str) -> Any:
    """Draw the loss that was measured at most shapes, along each axis where it was at most."""
    shapes = {
        row["loss"]: {tuple(r["shape"]) for r in rows if r["loss"] == row["loss"]} for row in rows
    }
    loss = max(shapes, key=lambda loss: len(shapes[loss]))
    rows = [row for row in rows if row["loss"] == loss]
    axes_names = BY_NAME[loss].family.axes
    names = dict.fromkeys(name for row in rows for name in row["implementations"])
    figure, panels = plt.subplots(1, len(axes_names), figsize=(5 * len(axes_names), 4))
    for axis, axes in enumerate(panels):
        origin = densest(axis, [row["shape"] for row in rows])
        for i, name in enumerate(names):
            points = sorted(along(axis, origin, rows, name, value))
            if points:  # ours, and then eager's, above others where lines meet
                axes.loglog(*zip(*points, strict=True), "o-", label=name, zorder=10 - i / 100)
        fixed = [f"{n} = {x}" for n, x in zip(axes_names, origin, strict=True)]
        axes.set_xlabel(f"{axes_names[axis]}, {fixed[1 - axis]}")
        axes.set_ylabel(f"{loss}, {label}")
        axes.legend(fontsize="small")
    return figure


def densest(axis: int, shapes: list[list[int]]) -> list[int]:
    """Return the largest shape of a line of most shapes along this axis."""
    lines: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for shape in shapes:
        lines.setdefault((*shape[:axis], *shape[axis + 1 :]), set()).add(tuple(shape))
    line = max(lines.values(), key=lambda line: (len(line), max(map(math.prod, line))))
    return list(max(line))


def along(
    axis: int, origin: list[int], rows: list[Row], name: str, value: Value
) -> Iterator[tuple[int, float]]:
    for row in rows:
        shape, found = row["shape"], value(row["implementations"].get(name, {}))
        if found and shape[:axis] == origin[:axis] and shape[axis + 1 :] == origin[axis + 1 :]:
            yield shape[axis], found

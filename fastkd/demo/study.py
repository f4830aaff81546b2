"""A study: a teacher, students of several methods and seeds, a table and a plot of their gains."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import fastkd
from fastkd.demo.tables import Sections, gain_and_wins, markdown, of, printed, spread
from fastkd.demo.training import train


class Method(NamedTuple):
    """A way to train a student: its name, and what makes its loss, anew for each student."""

    name: str
    new_loss: Callable[[], nn.Module]  # its parameters, those of regressors, are trained too


class Fit(NamedTuple):
    """One trained network."""

    method: Method
    seed: int
    results: tuple[float, ...]  # on the test data, one for each measure, per cent


def fit(
    method: Method,
    model: nn.Module,
    data: Any,
    teacher: Any,
    steps: int,
    seed: int,
    batch: int,
    learning_rate: float,
) -> None:
    """Train the model; `teacher` has what the teacher makes of the data, or is None.

    Model and loss take batches of the data, whose first tensor has its examples.
    """
    loss = method.new_loss().to(data[0].device)

    def of_batch(rows: Tensor) -> Tensor:
        taken = data.take(rows)
        return loss(model(taken), teacher and teacher.take(rows), taken)

    trained = nn.ModuleList([model, loss])
    train(trained, of_batch, len(data[0]), steps, seed, batch, learning_rate)


class Study(NamedTuple):
    """A comparison of methods, and how it is told."""

    name: str  # of its files
    title: str
    about: str
    legend: str
    measures: tuple[str, ...]
    n_gains: int  # of how many measures, the first ones, gains are told
    teacher: Method
    methods: tuple[Method, ...]  # the first has no teacher
    experiment: Callable[[int, int, str], Iterator[Fit]]  # of seeds, steps and a device


def run(study: Study, out: Path, seeds: int, steps: int, device: str) -> int:
    """Train, print the table, write it and a plot into a folder, and return the exit status 0."""
    torch.set_num_threads(1)  # because the models are too small to share
    console, began = Console(), time.perf_counter()
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("teacher", total=1 + seeds * len(study.methods))
        fits = []
        for fit in study.experiment(seeds, steps, device):
            progress.update(task, advance=1, description=fit.method.name)
            fits.append(fit)
    header = header_of(study)
    sections: Sections = {study.title: table(study, fits)}
    n_seeds, seconds = f"{seeds} seed{'s' * (seeds > 1)}", time.perf_counter() - began
    versions = (
        f"{n_seeds}, {steps} steps, {seconds:.0f} s on {device} "
        f"({platform.machine()}), fastkd {fastkd.__version__}, torch {torch.__version__}."
    )
    console.print(study.about)
    console.print(*printed(header, sections), sep="\n")
    console.print(study.legend, style="dim")
    text = [study.about, markdown(header, sections), study.legend, versions]
    (out / f"{study.name}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    plot(study, fits).savefig(out / f"{study.name}.png", dpi=150)
    console.print(f"{versions} Table and plot: {out}/{study.name}.md, {out}/{study.name}.png")
    return 0


def header_of(study: Study) -> list[str]:
    """Return the names of the columns: the measures and their gains, and the wins of the first."""
    columns = [[name, "gain"][: 1 + (i < study.n_gains)] for i, name in enumerate(study.measures)]
    columns[0].append("wins")
    return ["student learns from", *(x for of_measure in columns for x in of_measure)]


def table(study: Study, fits: Sequence[Fit]) -> list[list[str]]:
    """Return the rows of the teacher and of the students of each method."""
    rows = []
    for method in (study.teacher, *study.methods):
        row = [method.name]
        for i in range(len(study.measures)):
            values = [fit.results[i] for fit in of(method, fits)]
            baseline = [fit.results[i] for fit in of(study.methods[0], fits)]
            gain = wins = ""
            if method in study.methods[1:]:
                gain, wins = gain_and_wins(values, baseline)
            row += [spread(values, ".1f"), gain, wins][: (i < study.n_gains) + (i == 0) + 1]
        rows.append(row)
    return rows


def plot(study: Study, fits: Sequence[Fit]) -> Figure:
    """Draw each measure of each student, and the teacher's as a line."""
    figure = Figure(figsize=(5.5 * len(study.measures), 3.6), layout="constrained")
    names = [method.name for method in reversed(study.methods)]
    for i, measure in enumerate(study.measures):
        axes: Any = figure.add_subplot(1, len(study.measures), i + 1)
        for place, method in enumerate(reversed(study.methods)):
            values = [fit.results[i] for fit in of(method, fits)]
            colour = "tab:gray" if method is study.methods[0] else "tab:blue"
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5)
            axes.plot(mean(values), place, "|", color=colour, markersize=18, markeredgewidth=3)
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axes.axvline(
            of(study.teacher, fits)[0].results[i], color="black", linestyle="--", linewidth=1
        )
        axes.set_title(f"dashed: {study.teacher.name}", loc="left", fontsize="small")
        axes.set_xlabel(f"{measure}: each seed and the mean")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure

"""Run the demo, and print and write what it shows: tables, a check against PyTorch, a plot."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import fastkd
from fastkd.demo import two_towers
from fastkd.demo.digits import (
    EAGER_KD,
    KD,
    METHODS,
    N_LABELLED,
    NO_TEACHER,
    Classifier,
    Fit,
    Method,
    experiment,
    new_convolutional_student,
    new_student,
)
from fastkd.demo.tables import gain_and_wins, markdown, of, printed, spread
from fastkd.demo.training import N_STUDENT, N_TRAIN

HEADER = ("student learns from", "accuracy, %", "gain", "wins", "agrees, %", "engine")
Group = tuple[bool, Callable[[], Classifier]]  # whether students see all labels; the student
FEW, CONVOLUTIONS = (False, new_student), (False, new_convolutional_student)
TITLES: dict[Group, str] = {
    FEW: f"{N_STUDENT} images, {N_LABELLED} of them with a label",
    CONVOLUTIONS: "the same, with a convolutional student: the four classic methods",
    (True, new_student): f"all {N_TRAIN} images with their labels, where no gain is expected",
}
LEGEND = (
    "Accuracy on 650 test images, mean ± standard deviation over the seeds. Gain: points over no "
    "teacher, seed by seed. Wins: seeds with a gain. Agrees: with the teacher on the test images. "
    "Hard labels: the teacher's answers where there is no label."
)
TOWERS_HEADER = ("two towers", "upper → lower, %", "lower → upper, %", "gain", "wins")
TOWERS_TITLE = "the halves of an image find each other"
TOWERS_LEGEND = (
    f"Recall@1: how often the nearest of 650 halves of test images is the right one (by chance "
    f"0.15 %). The teacher learned from {N_TRAIN} images, its students see {N_STUDENT}. Alone: "
    f"clip_contrastive. Distilled: similarity_kl too. Gain: of the mean of both directions."
)
# Training amplifies rounding: over 40 seeds to at most 2e-7 in the first 10 steps, and to 7e-7 over
# 250 in the median seed (8e-5 in the worst). A gradient that is wrong by 0.01 % gives 1e-2 there.
FIRST_STEPS, FIRST_LIMIT, LIMIT = 10, 1e-5, 1e-3


def run(out: Path, seeds: int, steps: int, device: str) -> int:
    """Train, print, write `digits.md` and `digits.png` into a folder; 1 if the check fails."""
    torch.set_num_threads(1)  # because the models are too small to share
    console = Console()
    began = time.perf_counter()
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        n_fits = 2 + seeds * (len(METHODS) + len(two_towers.METHODS))
        task = progress.add_task("teacher", total=n_fits)

        def watched(fits: Iterable[Any]) -> Iterator[Any]:
            for fit in fits:
                progress.update(task, advance=1, description=fit.method.name)
                yield fit

        teacher, *fits = watched(experiment(seeds, steps, device))
        towers = [*watched(two_towers.experiment(seeds, steps, device))]

    about = (
        f"Digits of scikit-learn, {seeds} seeds, {steps} steps. The teacher, a convolutional "
        f"network that learned all {N_TRAIN} labels, reads {teacher.accuracy:.1f} % of the test "
        f"images; the students are small perceptrons and convolutional networks with a fourth of "
        f"its channels."
    )
    sections = {title: table(fits, group, device) for group, title in TITLES.items()}
    of_towers = {TOWERS_TITLE: towers_table(towers)}
    passed, verdict = check(fits)
    seconds = time.perf_counter() - began
    versions = (
        f"{seconds:.0f} s on {device} ({platform.machine()}), fastkd {fastkd.__version__}, "
        f"torch {torch.__version__}."
    )

    console.print(about)
    console.print(*printed(HEADER, sections), sep="\n")
    console.print(LEGEND, style="dim")
    console.print(*printed(TOWERS_HEADER, of_towers), sep="\n")
    console.print(TOWERS_LEGEND, style="dim")
    console.print(Text(verdict, style="green" if passed else "bold red"))
    text = [about, markdown(HEADER, sections), LEGEND]
    text += [markdown(TOWERS_HEADER, of_towers), TOWERS_LEGEND, verdict, versions]
    (out / "digits.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    plot(fits, teacher).savefig(out / "digits.png", dpi=150)
    console.print(f"{versions} Tables and plot: {out}/digits.md, {out}/digits.png")
    return 0 if passed else 1


def group_of(method: Method) -> Group:
    return method.all_labels, method.new_student


def table(fits: Sequence[Fit], group: Group, device: str) -> list[list[str]]:
    """Return the rows of the methods under one title."""
    rows = []
    all_labels, student = group
    alone = NO_TEACHER._replace(all_labels=all_labels, new_student=student)
    baseline = [fit.accuracy for fit in of(alone, fits)]
    for method in METHODS:
        if group_of(method) != group:
            continue
        accuracies = [fit.accuracy for fit in of(method, fits)]
        taught = method.loss is not NO_TEACHER.loss
        rows.append(
            [
                method.name,
                spread(accuracies, ".1f"),
                *(gain_and_wins(accuracies, baseline) if taught else ("", "")),
                f"{mean(fit.agreement for fit in of(method, fits)):.1f}",
                method.engine(device),
            ]
        )
    return rows


def towers_table(fits: Sequence[two_towers.Fit]) -> list[list[str]]:
    """Return the rows of the teacher and of the students of each method."""

    def recalls(method: two_towers.Method) -> list[float]:
        return [mean((fit.to_lower, fit.to_upper)) for fit in of(method, fits)]

    baseline = recalls(two_towers.ALONE)
    return [
        [
            method.name,
            spread([fit.to_lower for fit in of(method, fits)], ".1f"),
            spread([fit.to_upper for fit in of(method, fits)], ".1f"),
            *(
                gain_and_wins(recalls(method), baseline)
                if method is two_towers.DISTILLED
                else ("", "")
            ),
        ]
        for method in (two_towers.TEACHER, *two_towers.METHODS)
    ]


def check(fits: Sequence[Fit]) -> tuple[bool, str]:
    """Return whether fastkd.kd and the eager expression trained alike, and a sentence."""
    fused, eager = (torch.stack([fit.losses for fit in of(m, fits)]) for m in (KD, EAGER_KD))
    difference = (fused - eager).abs() / eager
    first, largest = difference[:, :FIRST_STEPS].max().item(), difference.amax(1).median().item()
    passed = first <= FIRST_LIMIT and largest <= LIMIT  # a NaN fails too
    return passed, (
        f"Check {'passed' if passed else 'FAILED'}: fastkd.kd and F.kl_div + F.cross_entropy, the "
        f"same training. Their losses differ by at most {first:.1e} in the first {FIRST_STEPS} "
        f"steps (limit {FIRST_LIMIT:g}), by {largest:.1e} in all steps of the median seed (limit "
        f"{LIMIT:g})."
    )


def plot(fits: Sequence[Fit], teacher: Fit) -> Figure:
    """Draw the accuracy of each fit, and beside it the loss curves of the check."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    accuracy, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    methods = [method for method in METHODS if not method.all_labels and method is not EAGER_KD]
    names = [
        f"{method.name}, convolutions" if group_of(method) == CONVOLUTIONS else method.name
        for method in methods
    ]
    for place, method in enumerate(reversed(methods)):
        accuracies = [fit.accuracy for fit in of(method, fits)]
        colour = "tab:gray" if method.uses is None else "tab:blue"
        accuracy.plot(accuracies, [place] * len(accuracies), "o", color=colour, alpha=0.5)
        accuracy.plot(mean(accuracies), place, "|", color=colour, markersize=18, markeredgewidth=3)
    accuracy.set_yticks(range(len(methods)), names[::-1])
    accuracy.axvline(teacher.accuracy, color="black", linestyle="--", linewidth=1)
    accuracy.annotate(
        "teacher", (teacher.accuracy, 1), xycoords=("data", "axes fraction"),
        xytext=(0, 3), textcoords="offset points", ha="center",
    )  # fmt: skip
    accuracy.set_title(TITLES[FEW], loc="left")
    accuracy.set_xlabel("test accuracy, %: each seed and the mean")
    accuracy.grid(axis="x", alpha=0.3)

    styles = {EAGER_KD: ("eager PyTorch", "tab:orange", 5), KD: ("fastkd.kd", "black", 1)}
    for method, (name, colour, width) in styles.items():
        curves.plot(of(method, fits)[0].losses, color=colour, linewidth=width, label=name)
    curves.set(yscale="log", xlabel="step", ylabel="loss, seed 0")
    curves.set_title("the same training", loc="left")
    curves.legend()
    for axes in (accuracy, curves):
        axes.spines[["top", "right"]].set_visible(False)
    return figure

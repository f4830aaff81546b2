"""Run the demo of language models, and print and write tables, a check against PyTorch, a plot."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor

import fastkd
from fastkd.demo import lm
from fastkd.demo.costs import compare
from fastkd.demo.lm import ALONE, DISTILLED, EAGER, OWN_TEXT, TEACHER, Batch, Fit, Method, Watch
from fastkd.demo.tables import Sections, gain_and_wins, markdown, of, printed, spread
from fastkd.linear import linear_kd

HEADER = ("student learns from", "nats", "perplexity", "gain", "wins")
TITLE = "the held-out text"
LEGEND = (
    "Nats for each held-out character and perplexity, mean ± standard deviation over the seeds. "
    "Gain: nats less than no teacher, seed by seed. Wins: seeds with a gain."
)
OWN_HEADER = ("student learns from", "reverse KL of its text", "nats of held-out text")
OWN_TITLE = "text that the student samples"
OWN_LEGEND = (
    f"Reverse KL: KL(q, p) in nats for each of {lm.N_SAMPLED} characters that the student adds to "
    f"{lm.PROMPT} held-out ones, where q is the student and p the teacher. Its own text: "
    f"{lm.OWN_STEPS} steps more, on the reverse KL of what it samples alone."
)
COSTS_HEADER = ("loss and gradients", "memory, MiB", "time, ms")
COSTS_LEGEND = (
    "Memory, counted: bytes of tensors alive at once at the peak, beyond the inputs; the gradients "
    "of hidden states and head are among them. Time, measured here: median of 25 calls, or of 3 "
    "for the large vocabulary; the losses take turns."
)
LARGE, SMALL_BUDGET = (2048, 32000), 1 << 25  # tokens and entries of the vocabulary; bytes
CHECK_STEPS, LIMIT = 50, 1e-4


def run(out: Path, seeds: int, steps: int, device: str) -> int:
    """Train, print, write `lm.md` and `lm.png` into a folder; 1 if the check fails."""
    torch.set_num_threads(1)  # because the models are too small to share
    console, began = Console(), time.perf_counter()
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        n_steps = lm.TEACHER_STEPS + seeds * (2 * steps + lm.OWN_STEPS) + 2 * CHECK_STEPS + 2
        task = progress.add_task("teacher", total=n_steps)

        def watch(what: str) -> None:
            progress.update(task, advance=1, description=what)

        data = lm.load(device)
        taught = lm.train_teacher(data, watch)
        teacher = lm.measured(TEACHER, 0, taught.model, data, taught)
        curves = {
            method: lm.fit(method, lm.new_student(data, 0), data, taught, CHECK_STEPS, 0, watch)
            for method in (EAGER, DISTILLED)
        }
        sections_of_costs = costs(len(data.characters), device, watch)
        fits = [teacher, *lm.experiment(seeds, steps, data, taught, watch)]

    about = about_text(data, taught.model)
    parts: list[tuple[Sequence[str], Sections, str]] = [
        (HEADER, {TITLE: table(fits)}, LEGEND),
        (OWN_HEADER, {OWN_TITLE: own_table(fits)}, OWN_LEGEND),
        (COSTS_HEADER, sections_of_costs, COSTS_LEGEND),
    ]
    passed, verdict = check(curves[DISTILLED], curves[EAGER])
    seconds = time.perf_counter() - began
    n_seeds = f"{seeds} seed{'s' * (seeds > 1)}"
    versions = (
        f"{n_seeds}, {steps} steps, {seconds:.0f} s on {device} ({platform.machine()}), fastkd "
        f"{fastkd.__version__}, torch {torch.__version__}, Python {platform.python_version()}."
    )
    console.print(about)
    text = [about]
    for header, sections, legend in parts:
        console.print(*printed(header, sections), sep="\n")
        console.print(legend, style="dim")
        text += [markdown(header, sections), legend]
    console.print(Text(verdict, style="green" if passed else "bold red"))
    text += [verdict, versions]
    (out / "lm.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    plot(fits, curves).savefig(out / "lm.png", dpi=150)
    console.print(f"{versions} Tables and plot: {out}/lm.md, {out}/lm.png")
    return 0 if passed else 1


def about_text(data: lm.Data, teacher: lm.LanguageModel) -> str:
    """Return what the networks are and what they learn from."""
    learnt, held_out = (
        f"{len(x) * lm.LENGTH // 1000} thousand" for x in (data.windows, data.held_out)
    )
    of_teacher, of_student = (
        f"{sum(x.numel() for x in model.parameters()) // 1000} thousand parameters"
        for model in (teacher, lm.new_student(data, 0))
    )
    return (
        f"Python's reference (`pydoc_data`) without repeated paragraphs, character by character: "
        f"{learnt} to learn from, {held_out} held out. The teacher has {lm.TEACHER_LAYERS} layers "
        f"of width {lm.TEACHER_WIDTH}, {of_teacher}; its students have {lm.STUDENT_LAYERS} of "
        f"width {lm.STUDENT_WIDTH}, {of_student}. KD: {lm.ALPHA} cross-entropy + {1 - lm.ALPHA} "
        f"forward KL."
    )


def table(fits: Sequence[Fit]) -> list[list[str]]:
    """Return how well the teacher and the students know the held-out text."""
    rows = []
    baseline = [fit.nats for fit in of(ALONE, fits)]
    for method in (TEACHER, ALONE, DISTILLED):
        nats = [fit.nats for fit in of(method, fits)]
        is_taught = method is DISTILLED
        gain = gain_and_wins(baseline, nats, "+.4f") if is_taught else ("", "")
        perplexity = spread([math.exp(x) for x in nats], ".2f")
        rows.append([method.name, spread(nats, ".4f"), perplexity, *gain])
    return rows


def own_table(fits: Sequence[Fit]) -> list[list[str]]:
    """Return what the teacher makes of the students' text, before and after they learn from it."""
    rows = []
    for method in (ALONE, DISTILLED, OWN_TEXT):
        found = of(method, fits)
        values = [fit.reverse_kl for fit in found], [fit.nats for fit in found]
        rows.append([method.name, *(spread(x, ".4f") for x in values)])
    return rows


def costs(n_characters: int, device: str, watch: Watch) -> dict[str, list[list[str]]]:
    """Return the rows of memory and time, for the demo's vocabulary and for a large one."""
    sections = {}
    losses: dict[str, Callable[[Batch], Tensor]]
    losses = {"eager PyTorch": lm.eager, "linear_kd": lm.distilled}
    for n_tokens, n_entries in ((lm.BATCH * lm.LENGTH, n_characters), LARGE):
        watch("memory and time")
        n_rounds = 25  # because what takes milliseconds is disturbed by much
        if (n_tokens, n_entries) == LARGE:
            n_rounds = 3
            losses[f"linear_kd, {SMALL_BUDGET >> 20} MiB of logits"] = within_budget
        batch = random_batch(n_tokens, n_entries, device)
        calls = [functools.partial(loss, batch) for loss in losses.values()]
        found = compare(calls, [batch.student, batch.student_head], n_rounds)
        sections[f"{n_tokens} tokens, {n_entries} entries of a vocabulary"] = [
            [name, f"{cost.peak_bytes / 2**20:.1f}", f"{cost.seconds * 1e3:.1f}"]
            for name, cost in zip(losses, found, strict=True)
        ]
    return sections


def within_budget(batch: Batch) -> Tensor:
    return linear_kd(*batch, alpha=lm.ALPHA, memory_budget=SMALL_BUDGET)


def random_batch(n_tokens: int, n_entries: int, device: str) -> Batch:
    """Return a batch of any vocabulary, whose student has hidden states and a head to train."""
    generator = torch.Generator().manual_seed(0)

    def network(width: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(n_tokens, width, generator=generator)
        head = torch.randn(n_entries, width, generator=generator) / width**0.5
        return hidden.to(device), head.to(device)

    student, teacher = network(lm.STUDENT_WIDTH), network(lm.TEACHER_WIDTH)
    labels = torch.randint(n_entries, (n_tokens,), generator=generator).to(device)
    for tensor in student:
        tensor.requires_grad_()
    return Batch(*student, *teacher, labels)


def check(fused: Tensor, eager: Tensor) -> tuple[bool, str]:
    """Return whether linear_kd and the eager expression trained alike, and a sentence."""
    difference = (fused - eager).abs().max().item()
    passed = difference <= LIMIT  # a NaN fails too
    return passed, (
        f"Check {'passed' if passed else 'FAILED'}: linear_kd and F.kl_div + F.nll_loss, the same "
        f"{len(fused)} steps of training. Their losses differ by at most {difference:.1e} (limit "
        f"{LIMIT:g})."
    )


def plot(fits: Sequence[Fit], curves: dict[Method, Tensor]) -> Figure:
    """Draw the nats of each student, and beside them the loss curves of the check."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 2))
    methods = (OWN_TEXT, DISTILLED, ALONE)
    for place, method in enumerate(methods):
        nats = [fit.nats for fit in of(method, fits)]
        colour = "tab:gray" if method is ALONE else "tab:blue"
        axes[0].plot(nats, [place] * len(nats), "o", color=colour, alpha=0.5)
        axes[0].plot(mean(nats), place, "|", color=colour, markersize=18, markeredgewidth=3)
    axes[0].set_yticks(range(len(methods)), [method.name for method in methods])
    axes[0].axvline(of(TEACHER, fits)[0].nats, color="black", linestyle="--", linewidth=1)
    axes[0].set_title("dashed: the teacher", loc="left", fontsize="small")
    axes[0].set_xlabel("nats for each held-out character: each seed and the mean")
    axes[0].grid(axis="x", alpha=0.3)
    styles = {EAGER: ("eager PyTorch", "tab:orange", 5), DISTILLED: ("linear_kd", "black", 1)}
    for method, (name, colour, width) in styles.items():
        axes[1].plot(curves[method], color=colour, linewidth=width, label=name)
    axes[1].set(xlabel="step", ylabel="loss, seed 0")
    axes[1].set_title("the same training", loc="left")
    axes[1].legend()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure

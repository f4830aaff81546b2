"""Find which blocks and warps are fastest on this GPU: the choices of the launchers, one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import checkout  # noqa: F401
import torch
from devices import Device, Step, median
from runner import figure, size_of, step_of
from workloads import BY_NAME, Shape

import fastkd

Choice = dict[str, int]
Row = dict[str, Any]
LOSSES = ("forward_kl", "jensen_shannon")  # one of each kind: products alone, and mixtures
SHAPES = {
    "row_statistics": [(4096, 128256)],
    "gradient": [(4096, 128256)],
    "whole_rows": [(4096, 8192), (4096, 1000), (256, 1000)],
    "ON_CHIP": [(4096, 4096), (4096, 8192), (4096, 16384), (4096, 32000)],
}


def choices(kernel: str, n_cols: int) -> list[Choice]:
    if kernel == "row_statistics":  # one or two vectors for each thread's sums
        return [
            {"THREADS": 32 * warps * each, "num_warps": warps}
            for warps, each in product((4, 8, 16, 32), (1, 2))
        ]
    if kernel == "gradient":
        return [
            {"VECTORS": 32 * warps * each, "num_warps": warps}
            for warps, each in product((2, 4, 8, 16), (1, 2, 4))
        ]
    if kernel == "whole_rows":  # 8 to 32 columns for each thread
        return [
            {"ROWS": rows, "num_warps": warps}
            for rows, warps in product((1, 2, 4), (1, 2, 4, 8, 16, 32))
            if 8 <= rows * (1 << (n_cols - 1).bit_length()) // (32 * warps) <= 32
        ]
    return [{"ON_CHIP": 0}, {"ON_CHIP": 1 << 16}]  # never, always


class Trial(NamedTuple):
    kernel: str
    loss: str
    dtype: str
    shape: Shape
    choice: Choice | None  # None: what the launcher chooses

    def step(self, device: str, shape: Shape) -> tuple[Step, int]:
        """Return the step to time, and the bytes of its inputs."""
        workload = BY_NAME[self.loss]
        inputs = workload.inputs(shape, getattr(torch, self.dtype), device)
        direction = "forward" if self.kernel == "row_statistics" else "forward+backward"
        return step_of(workload.fastkd, inputs, direction), size_of(inputs)


def trials(dry: bool) -> list[Trial]:
    """Return all trials, or in a dry run just enough to show that each choice can be made."""
    return [
        Trial(kernel, loss, dtype, shape, choice)
        for dtype in (["bfloat16"] if dry else ["bfloat16", "float32"])
        for kernel, shapes in SHAPES.items()
        for loss in (LOSSES[:1] if dry else LOSSES)
        for shape in (shapes[:1] if dry else shapes)
        # what the launcher chooses comes first, because the others are compared with it
        for choice in [None, *choices(kernel, shape[1])[: 1 if dry else None]]
    ]


class Chosen:
    """A kernel that is started as chosen, whatever its launcher asks for."""

    def __init__(self, kernel: Any, choice: Choice) -> None:
        self.kernel, self.choice = kernel, choice

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> Any:
            arguments |= self.choice
            return self.kernel[self._grid(grid, arguments)](**arguments)

        return launch

    def _grid(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> tuple[int, ...]:
        if "ROWS" in self.choice:
            return (-(-arguments["n_rows"] // arguments["ROWS"]),)
        if "VECTORS" in self.choice:
            n_rows = grid[0] // arguments["n_blocks"]
            columns = arguments["VECTORS"] * arguments["WIDTH"]
            arguments["n_blocks"] = -(-arguments["n_cols"] // columns)
            return (n_rows * arguments["n_blocks"],)
        return grid  # of rows that are not split


@contextlib.contextmanager
def chosen(trial: Trial) -> Iterator[None]:
    """Make the launchers choose as the trial says."""
    from fastkd.kernels.rows import gradients, launch, on_chip, sweeps

    if trial.choice is None:
        yield
    elif trial.kernel in vars(launch):
        with mock.patch.object(launch, trial.kernel, trial.choice[trial.kernel]):
            yield
    else:
        (module,) = (x for x in (sweeps, gradients, on_chip) if trial.kernel in vars(x))
        kernel = Chosen(getattr(module, trial.kernel), trial.choice)
        with mock.patch.object(module, trial.kernel, kernel):
            yield


def measure(device: Device, trial: Trial) -> float:
    """Return the milliseconds of a trial."""
    shape = (2, trial.shape[1] // 8) if device.label == "dry" else trial.shape
    with fastkd.backend("triton"), chosen(trial):
        return figure(median(device, *trial.step(device.name, tuple(shape))))


def key_of(row: Row) -> tuple:
    choice = tuple(sorted(row["choice"].items())) if row["choice"] else None
    return row["kernel"], row["loss"], row["dtype"], *row["shape"], choice


def table(rows: list[Row], device: str) -> str:
    """Return the fastest choices as the launchers could hold them, beside what they choose now."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["milliseconds"]:
            key = (row["kernel"], row["loss"], row["dtype"], tuple(row["shape"]))
            groups.setdefault(key, []).append(row)
    lines = [f"CHOICES = {{  # {device}: milliseconds, and of what is chosen now"]
    for key, members in groups.items():
        now = next((row["milliseconds"] for row in members if row["choice"] is None), None)
        best = min(members, key=lambda row: row["milliseconds"])
        lines.append(f"    {key}: {best['choice']},  # {best['milliseconds']}, {now}")
    return "\n".join([*lines, "}"])

"""Find which blocks and warps are fastest on this GPU: the choices of the launchers, one by one.

What would spill or leave the device half empty is not tried: the compile gate says so beforehand,
in processes beside this one, whose compiled kernels the GPU then finds in Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import checkout  # noqa: F401
import child
import torch
from devices import Device, Step, median
from gate import DEVICES, capture
from runner import figure, sentence, size_of, step_of
from sass import analyse
from workloads import BY_NAME, Shape

import fastkd

Choice = dict[str, int]
Row = dict[str, Any]
ANSWER = "answer: "
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
    from fastkd.kernels.rows import launch, sweeps

    if trial.choice is None:
        yield
    elif trial.kernel in vars(launch):
        with mock.patch.object(launch, trial.kernel, trial.choice[trial.kernel]):
            yield
    else:
        kernel = Chosen(getattr(sweeps, trial.kernel), trial.choice)
        with mock.patch.object(sweeps, trial.kernel, kernel):
            yield


def obstacle(trial: Trial, target: str) -> str | None:
    """Return what the gate has against it, compiled at the launch site for production sizes."""
    if trial.choice is None:
        return None
    try:
        with capture(target) as launches, fastkd.backend("triton"), chosen(trial):
            trial.step("meta", trial.shape)[0]()
        for launch in launches:
            report = analyse(launch)
            if trial.kernel in (launch.name, "ON_CHIP") and report.spills:
                return f"{launch.name} spills"
            if trial.kernel in (launch.name, "ON_CHIP") and report.warps_per_sm < 16:
                return f"{launch.name} leaves {report.warps_per_sm} warps on a multiprocessor"
    except Exception as error:  # too large for the device, for example
        return sentence(error)
    return None


def obstacles(dry: bool, target: str, folder: Path, seconds: float) -> list[str | None]:
    """Return the obstacle of each trial, as far as the time allows.

    A process beside this one finds them, where nothing is interpreted and no GPU is held.
    """
    if target not in DEVICES:
        return []
    log = folder / "gate.log"
    command = [sys.executable, "-W", "ignore", __file__, target, *(["--dry"] if dry else [])]
    child.run(command, log, seconds, {"TRITON_INTERPRET": "0"})
    lines = [line for line in log.read_text().splitlines() if line.startswith(ANSWER)]
    log.unlink()
    return [json.loads(line.removeprefix(ANSWER)) for line in lines]


def sweep(
    device: Device, rows: list[Row], save: Callable[[], None], folder: Path, deadline: float
) -> dict[str, Any]:
    """Append a row for each trial; those that the gate is against have its reason and no time."""
    is_dry = device.label == "dry"
    asked, seconds = trials(is_dry), 0.6 * (deadline - time.monotonic())
    answers = obstacles(is_dry, device.target(), folder, seconds)
    if len(answers) < len(asked):
        print(f"the gate has judged {len(answers)} of {len(asked)} choices", flush=True)
    for i, trial in enumerate(asked):
        if time.monotonic() > deadline:
            return {"tried": i, "left": len(asked) - i}
        row = {**trial._asdict(), "shape": list(trial.shape), "milliseconds": None}
        if trial.choice and i < len(answers) and answers[i]:
            row["note"] = answers[i]
        else:
            shape = (2, trial.shape[1] // 8) if is_dry else trial.shape
            try:
                with fastkd.backend("triton"), chosen(trial):
                    row["milliseconds"] = figure(median(device, *trial.step(device.name, shape)))
            except Exception as error:  # the next choice may do
                row["note"] = sentence(error)
        rows.append(row)
        save()
    return {"tried": len(asked)}


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


def main() -> None:
    """Print the answers for `obstacles`, one on a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    asked = trials(options.dry)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for answer in pool.map(obstacle, asked, [options.target] * len(asked)):
            print(f"{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()

"""Which blocks and warps are fastest on this GPU: the choices of the launchers, one by one.

What would spill or leave the device half empty is not tried: the compile gate says so beforehand,
in processes of its own, whose compiled kernels the GPU then finds in Triton's cache.
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
from cases import CASES
from gate import DEVICES, capture
from sass import analyse
from timing import Device, Step, median, step_of

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
    if kernel == "row_statistics":  # one or two vectors to a thread, whose sums are its own
        return [
            {"THREADS": 32 * warps * each, "num_warps": warps}
            for warps, each in product((4, 8, 16, 32), (1, 2))
        ]
    if kernel == "gradient":
        return [
            {"VECTORS": 32 * warps * each, "num_warps": warps}
            for warps, each in product((2, 4, 8, 16), (1, 2, 4))
        ]
    if kernel == "whole_rows":  # 8 to 32 columns to a thread
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
    shape: tuple[int, ...]
    choice: Choice | None  # None: what the launcher chooses

    @property
    def direction(self) -> str:
        return "forward" if self.kernel == "row_statistics" else "forward+backward"


def trials(dry: bool) -> list[Trial]:
    """In a dry run just enough to show that each kind of choice can be made."""
    return [
        Trial(kernel, loss, dtype, shape, choice)
        for dtype in (["bfloat16"] if dry else ["bfloat16", "float32"])
        for kernel, shapes in SHAPES.items()
        for loss in (LOSSES[:1] if dry else LOSSES)
        for shape in (shapes[:1] if dry else shapes)
        # the launcher's own first: the others are compared with it
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
    from fastkd.kernels import _divergence_sweeps as kernels
    from fastkd.kernels import divergence as launchers

    if trial.choice is None:
        yield
    elif trial.kernel in vars(launchers):
        with mock.patch.object(launchers, trial.kernel, trial.choice[trial.kernel]):
            yield
    else:
        kernel = Chosen(getattr(kernels, trial.kernel), trial.choice)
        with mock.patch.object(kernels, trial.kernel, kernel):
            yield


def run_of(trial: Trial, device: str, shape: tuple[int, ...]) -> tuple[Step, int]:
    """The step to time, and the bytes of its inputs."""
    case = next(case for case in CASES if case.name == trial.loss)
    dtype = getattr(torch, trial.dtype)
    if device == "meta":
        inputs = case.inputs(shape, dtype, device)
    else:
        student, teacher = 3 * torch.randn(2, *shape, device=device)
        inputs = [student.to(dtype).requires_grad_(), teacher.to(dtype)]
    return step_of(case.fastkd, inputs, trial.direction), sum(x.nbytes for x in inputs)


def obstacle(trial: Trial, target: str) -> str | None:
    """What the gate has against it, compiled at the launch site for production sizes."""
    if trial.choice is None:
        return None
    try:
        with capture(target) as launches, fastkd.backend("triton"), chosen(trial):
            run_of(trial, "meta", trial.shape)[0]()
        for launch in launches:
            report = analyse(launch)
            if trial.kernel in (launch.name, "ON_CHIP") and report.spills:
                return f"{launch.name} spills"
            if trial.kernel in (launch.name, "ON_CHIP") and report.warps_per_sm < 16:
                return f"{launch.name} leaves {report.warps_per_sm} warps on a multiprocessor"
    except Exception as error:  # too large for the device, for example
        return f"{type(error).__name__}: {error}"[:200]
    return None


def obstacles(dry: bool, target: str, folder: Path, seconds: float) -> list[str | None]:
    """Of each trial, as far as the time allows: where nothing is interpreted and no GPU is held."""
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
    """A row for each trial; those that the gate is against have its reason in place of a time."""
    asked = trials(device.label == "dry")
    seconds = 0.6 * (deadline - time.monotonic())
    answers = obstacles(device.label == "dry", device.target(), folder, seconds)
    if len(answers) < len(asked):
        print(f"the gate has judged {len(answers)} of {len(asked)} choices", flush=True)
    for i, trial in enumerate(asked):
        if time.monotonic() > deadline:
            return {"tried": i, "left": len(asked) - i}
        row = {**trial._asdict(), "shape": list(trial.shape), "milliseconds": None}
        if trial.choice and i < len(answers) and answers[i]:
            row["note"] = answers[i]
        else:
            try:
                row["milliseconds"] = round(milliseconds(trial, device), 5)
            except Exception as error:  # the next choice may do
                row["note"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
        save()
    return {"tried": len(asked)}


def milliseconds(trial: Trial, device: Device) -> float:
    shape = (2, trial.shape[1] // 8) if device.label == "dry" else trial.shape
    step, size = run_of(trial, device.name, shape)
    with fastkd.backend("triton"), chosen(trial):
        return median(device, step, size)


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The fastest choices as the launchers could hold them, beside what they choose now."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["milliseconds"]:
            key = (row["kernel"], row["loss"], row["dtype"], tuple(row["shape"]))
            groups.setdefault(key, []).append(row)
    lines = [f"CHOICES = {{  # {device}: milliseconds, and of what is chosen now"]
    for key, members in groups.items():
        now = next((row["milliseconds"] for row in members if row["choice"] is None), None)
        best = min(members, key=lambda row: row["milliseconds"])
        spoken = f"{best['milliseconds']:.4g}, {now:.4g}" if now else f"{best['milliseconds']:.4g}"
        lines.append(f"    {key}: {best['choice']},  # {spoken}")
    return "\n".join([*lines, "}"])


def main() -> None:
    """The answers for `obstacles`, one on a line."""
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

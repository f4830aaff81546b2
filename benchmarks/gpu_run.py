"""Find out in ten minutes all that one GPU can tell: python benchmarks/gpu_run.py [--dry]

tests, the device's ceilings, every loss beside eager PyTorch, torch.compile and its peers, a sweep
over the launchers' choices, compute-sanitizer. What is measured goes to the device's record.

Every step has its share of the time, and what one does not take goes to the next. The record is
written anew after every row, so that a run that is killed leaves what it has measured. `--only` and
`--skip` take steps, losses and implementations; `--dry` does all of it on a CPU with small shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
# how the time is shared out; correctness first: the times of a wrong kernel are worth nothing
STEPS = {"tests": 25, "ceilings": 4, "bench": 45, "sweep": 16, "sanitizer": 12}
SANITIZERS = ("memcheck", "racecheck", "initcheck")


class Run:
    """A run over the steps that were asked for, and the record that they write to."""

    def __init__(self, options: argparse.Namespace) -> None:
        import devices
        import peers
        import records
        from workloads import BY_NAME

        kind = devices.Interpreter if options.dry else devices.Gpu
        self.only, self.skip = options.only, options.skip
        known = {*STEPS, *BY_NAME, "fastkd", "eager", *kind.compile_modes, *peers.PEERS}
        if unknown := {*self.only, *self.skip} - known:
            raise SystemExit(f"got {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        self.device = kind()
        self.steps = self.chosen(list(STEPS))
        self.total = 60 * options.minutes
        description = self.device.description()
        self.name = description.pop("device")
        run = records.new_run(**description, ceilings={}, peers={}, steps={}, sweep=[])
        self.folder: Path = options.out
        self.record = records.Record(self.folder, self.device.label, self.name, run)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Apply --only and --skip; of a kind of which none is named all are meant."""
        named = [name for name in names if name in self.only] or names
        return [name for name in named if name not in self.skip]

    def step(self, body: Callable[[Run, float], dict[str, Any] | None]) -> None:
        name = body.__name__
        if name not in self.steps:
            return
        # a twentieth is kept for the page
        shares = [STEPS[other] for other in self.steps]
        so_far = sum(shares[: self.steps.index(name) + 1]) / sum(shares)
        deadline = BEGAN + 0.95 * so_far * self.total
        began = time.monotonic()
        try:
            result = body(self, deadline) or {}
        except Exception as error:  # the other steps go on
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        result["seconds"] = round(time.monotonic() - began, 1)
        self.record.run["steps"][name] = result
        self.record.save()
        print(f"[{time.monotonic() - BEGAN:5.0f} s] {name}: {result}", flush=True)


def tests(run: Run, deadline: float) -> dict[str, Any]:
    import child

    log = run.folder / "tests.log"
    # a name for each test as it ends, so that the log of a run that is killed says where it was
    command = [*pytest("gpu"), "-v", "--tb=short", "-rfE"]
    if run.device.label == "measured" and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # because most of the time goes into compiling
    seconds = deadline - time.monotonic()
    status = child.run(command, log, seconds, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return {"status": status, "last_line": lines[-1][:300]}


def pytest(marker: str) -> list[str]:
    from checkout import ROOT

    options = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    return [sys.executable, "-m", "pytest", *options, "-m", marker, str(ROOT / "tests" / "gpu")]


def ceilings(run: Run, deadline: float) -> None:
    import devices

    run.record.run["ceilings"] = devices.ceilings(run.device)


def bench(run: Run, deadline: float) -> dict[str, Any]:
    import peers
    import runner
    from workloads import BY_NAME

    importable, run.record.run["peers"] = peers.available()
    problems = in_order([BY_NAME[name] for name in run.chosen(list(BY_NAME))], run.device)
    for i, problem in enumerate(problems):
        if time.monotonic() > deadline:
            return {"problems": i, "left": len(problems) - i}
        try:
            run.device.forget()
            losses = runner.implementations(problem, run.device, importable)
            losses = {name: losses[name] for name in run.chosen(list(losses))}
            row = runner.measure(problem, losses, run.device, run.record.run["ceilings"])
        except Exception as error:
            entry = {"note": runner.sentence(error)}
            row = {**problem.row(run.device), "implementations": {"fastkd": entry}}
        run.record.add(row)
    return {"problems": len(problems)}


def in_order(workloads: Sequence[Any], device: Any) -> list[Any]:
    """Return the most telling problems first, so that a run that is short of time keeps those.

    These are in the narrowest dtype and both directions, and among them the largest of each loss.
    """
    import runner

    shapes = {x.name: sorted(device.shapes(x), key=math.prod, reverse=True) for x in workloads}
    return [
        runner.Problem(x, shapes[x.name][rank], dtype, direction)
        for dtype, direction in itertools.product(device.dtypes, runner.DIRECTIONS)
        for rank in range(max(map(len, shapes.values())))
        for x in workloads
        if rank < len(shapes[x.name])
    ]


def sweep(run: Run, deadline: float) -> dict[str, Any]:
    import sweep as choices

    rows = run.record.run["sweep"]
    result = choices.sweep(run.device, rows, run.record.save, deadline)
    print(choices.table(rows, run.name), flush=True)
    return result


def sanitizer(run: Run, deadline: float) -> dict[str, Any]:
    """Run small problems under compute-sanitizer; in a dry run they are only collected."""
    import child

    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if not program and run.device.label == "measured":
        return {"skipped": "there is no compute-sanitizer here"}

    def watched(tool: str) -> int:
        command = [*pytest("sanitize"), "-q"]
        if program:
            command = [program, "--tool", tool, "--error-exitcode", "9", *command]
        else:
            command.append("--collect-only")
        # otherwise an overrun stays inside the allocator's pool, unseen
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        seconds = deadline - time.monotonic()
        return child.run(command, run.folder / f"{tool}.log", seconds, environment)

    tools = SANITIZERS if program else ("unwatched",)
    with ThreadPoolExecutor(len(tools)) as pool:  # most of their time is one core's
        return dict(zip(tools, pool.map(watched, tools), strict=True))


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=names, default=[], help="bench,forward_kl,fastkd")
    parser.add_argument("--skip", type=names, default=[], help="tests,torch.compile")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="folder of record and logs (benchmarks/results)")
    parser.add_argument("--peers", type=Path, help="folder with the peers of peers.txt")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small shapes")
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    options.out = options.out or root / ("build/gpu_run" if options.dry else "benchmarks/results")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if options.peers:  # last: what is installed comes first
        sys.path.append(str(options.peers.resolve()))

    import checkout  # noqa: F401
    import torch

    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry tries the run out without one")
    run = Run(options)
    run.record.save()
    print(f"{run.name}: {run.record.file}", flush=True)
    for body in (tests, ceilings, bench, sweep, sanitizer):
        run.step(body)

    import report

    print(report.page(run.record.content))


if __name__ == "__main__":
    main()

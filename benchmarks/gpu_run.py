"""All that one GPU can tell in ten minutes: python benchmarks/gpu_run.py [--dry]

tests, the device's ceilings, every loss beside eager PyTorch, torch.compile and its peers, a sweep
over the launchers' choices, compute-sanitizer: one record in benchmarks/results, a page, plots.

Every step has its share of the time, and what one does not take goes to the next. The record is
written anew after every row: a run that is killed leaves what it has measured. `--only` and
`--skip` take steps, losses and implementations; `--dry` does all of it on a CPU with small shapes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
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
    def __init__(self, options: argparse.Namespace) -> None:
        import peers
        import provenance
        import timing
        from cases import CASES

        self.device = timing.Interpreter() if options.dry else timing.Gpu()
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.only, self.skip = options.only, options.skip
        known = {*STEPS, *(case.name for case in CASES), "fastkd", "eager"}
        known |= {*self.device.compile_modes, *peers.PEERS}
        if unknown := {*self.only, *self.skip} - known:
            raise SystemExit(f"got {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        self.steps = self.chosen(list(STEPS))
        self.total = 60 * options.minutes
        now = datetime.datetime.now(datetime.timezone.utc)
        commit = provenance.commit()
        self.record: dict[str, Any] = {
            "schema": 2,
            "label": self.device.label,
            "utc": now.isoformat(timespec="seconds"),
            **self.device.description(),
            **timing.versions(),
            "commit": commit.removesuffix("-dirty"),
            "dirty": commit.endswith("-dirty"),
            "ceilings": {},
            "peers": {},
            "steps": {},
            "rows": [],
            "sweep": [],
        }
        name = re.sub(r"[^a-z0-9]+", "-", self.record["device"].lower()).strip("-")
        self.file = self.folder / f"{now:%Y%m%dT%H%M%SZ}-{name}.json"

    def chosen(self, names: Sequence[str]) -> list[str]:
        """--only and --skip: the names of a kind of which none is named are all meant."""
        named = [name for name in names if name in self.only] or names
        return [name for name in named if name not in self.skip]

    def save(self) -> None:
        text = json.dumps(self.record, indent=1) + "\n"
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(text)
        os.replace(unfinished, self.file)

    def step(self, body: Callable[[Run, float], dict[str, Any] | None]) -> None:
        name = body.__name__
        if name not in self.steps:
            return
        # a twentieth is left for the page and the plots
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
        self.record["steps"][name] = result
        self.save()
        print(f"[{time.monotonic() - BEGAN:5.0f} s] {name}: {result}", flush=True)


def tests(run: Run, deadline: float) -> dict[str, Any]:
    import child

    log = run.folder / "tests.log"
    # a name for each test as it ends: the log of a run that is killed says where it was
    command = [*pytest("gpu"), "-v", "--tb=short", "-rfE"]
    if run.device.label == "measured" and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling
    seconds = deadline - time.monotonic()
    status = child.run(command, log, seconds, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    return {"status": status, "last_line": last_line(log)}


def pytest(marker: str) -> list[str]:
    from checkout import ROOT

    options = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    return [sys.executable, "-m", "pytest", *options, "-m", marker, str(ROOT / "tests" / "gpu")]


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]


def ceilings(run: Run, deadline: float) -> None:
    import timing

    run.record["ceilings"] = timing.ceilings(run.device)


def bench(run: Run, deadline: float) -> dict[str, Any]:
    import comparison
    import peers
    from cases import CASES

    importable, run.record["peers"] = peers.available()
    cases = [case for case in CASES if case.name in run.chosen([case.name for case in CASES])]
    problems = comparison.problems(cases, run.device)
    for i, problem in enumerate(problems):
        if time.monotonic() > deadline:
            return {"problems": i, "left": len(problems) - i}
        try:
            run.device.forget()
            losses = comparison.implementations(problem.case, run.device, importable)
            wanted = {name: losses[name] for name in run.chosen(list(losses))}
            rows = comparison.compare(problem, wanted, run.device, run.record["ceilings"])
        except Exception as error:
            rows = [problem.row | {"milliseconds": None, "note": comparison.sentence(error)}]
        for row in rows:
            run.record["rows"].append({"device": run.record["device"]} | row)
        run.save()
    return {"problems": len(problems)}


def sweep(run: Run, deadline: float) -> dict[str, Any]:
    import sweep as choices

    rows = run.record["sweep"]
    result = choices.sweep(run.device, rows, run.save, run.folder, deadline)
    print(choices.table(rows, run.record["device"]), flush=True)
    return result


def sanitizer(run: Run, deadline: float) -> dict[str, Any]:
    """In a dry run its tests, which the others contain, are only collected."""
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
        # without it an overrun stays inside the allocator's pool, unseen
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        seconds = deadline - time.monotonic()
        return child.run(command, logs[tool], seconds, environment)

    logs = {tool: run.folder / f"{tool}.log" for tool in (SANITIZERS if program else ["unwatched"])}
    with ThreadPoolExecutor(len(logs)) as pool:  # most of their time is one core's
        found = dict(zip(logs, pool.map(watched, logs), strict=True))
    with (run.folder / "sanitizer.log").open("w") as together:
        for tool, log in logs.items():
            together.write(
                f"== {tool}: {found[tool]}\n{log.read_text(errors='replace')[-50000:]}\n"
            )
            log.unlink()
    return found


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=names, default=[], help="bench,forward_kl,fastkd")
    parser.add_argument("--skip", type=names, default=[], help="tests,torch.compile")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="folder of the record (benchmarks/results)")
    parser.add_argument("--peers", type=Path, help="folder made by fetch_peers.py")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small shapes")
    options = parser.parse_args()
    here = Path(__file__).parent
    if options.out is None:  # what is dry never lies beside the records
        options.out = here.parent / "build" / "gpu_run" if options.dry else here / "results"
    if options.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if options.peers:  # last: what is installed comes first
        sys.path.append(str(options.peers.resolve()))

    import checkout  # noqa: F401
    import torch

    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry tries the run out without one")
    run = Run(options)
    run.save()
    print(f"{run.record['device']}: {run.file}", flush=True)
    for body in (tests, ceilings, bench, sweep, sanitizer):
        run.step(body)

    import report

    page = report.page_of_run(run.record)
    run.file.with_suffix(".md").write_text(page)
    print(page)
    try:
        import plots

        print("plots:", *plots.draw(run.record, run.file.with_suffix("")), sep="\n  ")
    except ImportError as error:
        print(f"no plots: {error}")


if __name__ == "__main__":
    main()

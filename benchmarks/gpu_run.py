"""Find out in ten minutes all that one GPU can tell: python benchmarks/gpu_run.py [--dry]

First each kernel once, then every loss beside eager PyTorch at its most telling shapes; then all
tests, torch.compile, peers, compute-sanitizer, the launchers' choices and the other shapes. What is
measured goes to the device's record, which is written anew after every row.

A second run goes on with what the first one left, in the record that came back or in that of
`--continue`. Every step has its share of the time, and what one does not take goes to the next.
Whatever loses the GPU takes a process with it, and not the run. `--only` and `--skip` take steps,
losses and implementations; `--dry` does all of it on a CPU with small shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import child

BEGAN = time.monotonic()
# in this order, each with its share of the time
STEPS = {
    "first_light": 12, "ceilings": 2, "headlines": 20, "tests": 20, "compiled": 14, "peers": 8,
    "sanitizer": 6, "sweep": 6, "shapes": 10, "autotuned": 2,
}  # fmt: skip


class Run:
    """A run over the steps that were asked for, and the record that they write to."""

    def __init__(self, options: argparse.Namespace) -> None:
        import devices
        import peers
        import records
        from workloads import BY_NAME

        kind = devices.Interpreter if options.dry else devices.Gpu
        self.only, self.skip = options.only, options.skip
        self.all_implementations = ["fastkd", "eager", *kind.compile_modes, *peers.PEERS]
        known = {*STEPS, *BY_NAME, *self.all_implementations}
        if unknown := {*self.only, *self.skip} - known:
            raise SystemExit(f"got {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        self.device = kind()
        self.steps = self.chosen(list(STEPS))
        self.workloads = [BY_NAME[name] for name in self.chosen(list(BY_NAME))]
        self.implementations = self.chosen(self.all_implementations)
        self.total = 60 * options.minutes
        description = self.device.description()
        self.name = description.pop("device")
        self.code = records.code()
        run = records.new_run(
            **description, code=self.code, ceilings={}, peers={}, steps={}, sweep=[]
        )
        self.folder: Path = options.out
        earlier = options.continue_from
        try:
            self.record = records.Record(self.folder, kind.label, self.name, run, earlier)
        except (ValueError, KeyError) as error:
            raise SystemExit(str(error)) from None
        self.earlier_folder = earlier.parent if earlier else self.folder
        self.losses_of_peers: dict[str, list[str]] = {}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "tasks.py")]
        command += ["--dry"] * options.dry
        command += ["--peers", str(options.peers.resolve())] if options.peers else []
        patience = 600.0 if options.dry else child.PATIENCE  # because the interpreter is slow
        self.worker = child.Worker(command, self.folder / "benchmark.log", patience)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Apply --only and --skip; of a kind of which none is named all are meant."""
        named = [name for name in names if name in self.only] or names
        return [name for name in named if name not in self.skip]

    def earlier(self, step: str) -> dict[str, Any]:
        """Return what the latest run with the same code left of a step."""
        for run in self.record.earlier_runs:
            if run.get("code") == self.code and step in run.get("steps", {}):
                return run["steps"][step]
        return {}

    def step(self, name: str, body: Callable[[Run, float], dict[str, Any] | None]) -> None:
        if name not in self.steps:
            return
        # a twentieth is kept for the page
        shares = [STEPS[other] for other in self.steps]
        so_far = sum(shares[: self.steps.index(name) + 1]) / sum(shares)
        began = time.monotonic()
        try:
            result = body(self, BEGAN + 0.95 * so_far * self.total) or {}
        except Exception as error:  # the other steps go on
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        result |= {"began": began - BEGAN, "seconds": time.monotonic() - began}
        result |= {key: round(result[key], 1) for key in ("began", "seconds")}
        self.record.run["steps"][name] = result
        self.record.save()
        print(f"[{time.monotonic() - BEGAN:5.0f} s] {name}: {result}", flush=True)

    def timeline(self) -> str:
        """Return which step ran when, and what it did and left, as a table."""
        from tables import section

        hidden = ("began", "seconds")
        lines = [
            [
                name,
                f"{step['began']:.0f}",
                f"{step['began'] + step['seconds']:.0f}",
                "; ".join(f"{key} {x}" for key, x in step.items() if key not in hidden) or "done",
            ]
            for name, step in self.record.run["steps"].items()
        ]
        return section("Timeline", ["step", "from, s", "to, s", "what"], lines)


def ceilings(run: Run, deadline: float) -> dict[str, Any]:
    rates = run.worker.ask({"task": "ceilings"}, deadline)
    if "note" in rates:
        return rates
    run.record.run["ceilings"] = rates
    return {}


def measuring(stage: str) -> Callable[[Run, float], dict[str, Any]]:
    """Return the step that measures the problems of a stage."""

    def body(run: Run, deadline: float) -> dict[str, Any]:
        import plan

        if stage == "peers":
            try:
                import_peers(run, deadline)
            except child.Late:
                return {"left": "all"}
        tasks = plan.stage(
            stage, run.workloads, run.device, run.losses_of_peers, run.implementations
        )
        began = run.worker.started
        n_rows = n_before = 0
        for i, (problem, adds) in enumerate(tasks):
            if all(name in entries_of(run, problem) for name in adds):
                n_before += 1
                continue
            try:
                if time.monotonic() > deadline:
                    raise child.Late
                add_row(run, problem, adds, deadline)
            except child.Late:
                return {"rows": n_rows, "done before": n_before, "left": len(tasks) - i}
            n_rows += 1
        more = {"processes": run.worker.started - began} if run.worker.started > began else {}
        return {"rows": n_rows, "done before": n_before, "left": 0, **more}

    return body


def entries_of(run: Run, problem: Any) -> dict[str, Any]:
    """Return what is known of the implementations at a problem, for the code as it is."""
    return (run.record.fresh(problem.row(run.device)) or {"implementations": {}})["implementations"]


def add_row(run: Run, problem: Any, adds: Sequence[str], deadline: float) -> None:
    """Measure all implementations of a row side by side, those that it has and those to be added.

    One that failed before is not tried again, nor is one that takes the process with it.
    """
    import runner

    row = problem.row(run.device)
    before = run.record.fresh(row) or {**row, "implementations": {}}
    known = before["implementations"]
    notes = {name: entry for name, entry in known.items() if "milliseconds" not in entry}
    names = [x for x in dict.fromkeys(["fastkd", "eager", *known, *adds]) if x not in notes]
    names = [x for x in names if x in run.implementations or x in known]
    question = {name: row[name] for name in ("loss", "shape", "dtype", "direction")}
    while names:
        try:
            answer = run.worker.ask({"task": "row", **question, "names": names}, deadline)
        except child.Lost as lost:
            at = lost.at or names[0]
            notes[at] = {"note": str(lost)}
            print(f"{question}, {at}: {lost}", flush=True)
            names.remove(at)
            # at once, so that no later run meets it again if the time is up now
            run.record.add({**before, "implementations": {**known, **notes}})
            continue
        if "note" in answer:  # of the inputs, which all of them need
            notes |= {name: {"note": answer["note"]} for name in names}
        else:
            row = answer
        break
    found = row.get("implementations", {})
    absent = {"note": "not run: too large, or missing on this machine"}
    notes |= {name: absent for name in names if name not in found and name not in notes}
    everything = {**known, **found, **notes}
    row["implementations"] = {
        name: everything[name]
        for name in dict.fromkeys(["fastkd", *run.all_implementations, *everything])
        if name in everything
    }
    if "bytes" in row and (reached := run.record.run["ceilings"]):
        row["least_milliseconds"] = runner.least_milliseconds(row, problem, reached)
    run.record.add(row)


def import_peers(run: Run, deadline: float) -> None:
    """Ask which peers there are; what one lacks stands in the record."""
    answer = run.worker.ask({"task": "peers"}, deadline)
    run.record.run["peers"], run.losses_of_peers = answer["versions"], answer["losses"]


def sweep(run: Run, deadline: float) -> dict[str, Any]:
    import records
    import sweep as choices
    from workloads import BY_NAME

    asked = choices.trials(run.device.label == "dry")
    rows = run.record.run["sweep"]
    sources = {name: records.sources(BY_NAME[name].case, "triton") for name in choices.LOSSES}
    of_runs = [row for earlier in run.record.earlier_runs for row in earlier.get("sweep", [])]
    rows += [row for row in of_runs if row.get("sources") == sources[row["loss"]]]
    known = [choices.key_of(row) for row in rows]
    n_rows = 0
    for i, trial in enumerate(asked):
        row = {**trial._asdict(), "shape": list(trial.shape), "milliseconds": None}
        row["sources"] = sources[trial.loss]
        if choices.key_of(row) in known:
            continue
        try:
            if time.monotonic() > deadline:
                raise child.Late
            answer = run.worker.ask({"task": "trial", **trial._asdict()}, deadline)
        except child.Late:
            return {"rows": n_rows, "done before": len(known), "left": len(asked) - i}
        except child.Lost as lost:
            answer = {"note": str(lost)}
        row |= answer if isinstance(answer, dict) else {"milliseconds": answer}
        rows.append(row)
        run.record.save()
        n_rows += 1
    print(choices.table(rows, run.name), flush=True)
    return {"rows": n_rows, "done before": len(known), "left": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=names, default=[], help="headlines,forward_kl,fastkd")
    parser.add_argument("--skip", type=names, default=[], help="tests,torch.compile")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="folder of record and logs (benchmarks/results)")
    parser.add_argument("--peers", type=Path, help="folder with the peers of peers.txt")
    parser.add_argument(
        "--continue", type=Path, dest="continue_from", metavar="RECORD",
        help="go on from this record (the one in --out)",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small shapes")
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    options.out = options.out or root / ("build/gpu_run" if options.dry else "benchmarks/results")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if options.continue_from and not options.continue_from.is_file():
        parser.error(f"there is no record {options.continue_from}: give the file that came back")

    import checkout  # noqa: F401
    import torch

    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry tries the run out without one")
    import report
    import suites

    run = Run(options)
    run.record.save()
    print(f"{run.name}: {run.record.file}", flush=True)
    bodies = {name: measuring(name) for name in STEPS}
    bodies |= {"ceilings": ceilings, "sweep": sweep, **suites.STEPS}
    for name in STEPS:
        run.step(name, bodies[name])
    run.worker.stop()
    print(run.timeline())
    print(report.page(run.record.content))


def names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()

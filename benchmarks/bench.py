"""Measure time and peak memory of the losses on this CPU: python benchmarks/bench.py (make bench)

Writes each row to the record of the device, and prints the table. With PYTHONPATH=FOLDER it finds
the peers of peers.txt that lie there. With --logits it measures the losses of logits with the
options of logit_rows.py, forward and backward, and says which of their goals are met. A GPU has
gpu_run.py, which measures the same way.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import checkout  # noqa: F401
import devices
import logit_rows
import peers
import records
import report
import runner
import torch
from workloads import BY_NAME


def names(text: str) -> list[str]:
    return text.split(",")


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, size.split("x"))) for size in names(text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", type=names, help="losses, for example forward_kl,kd")
    parser.add_argument("--sizes", type=shapes, help="for example 128x10,2048x32000")
    parser.add_argument("--threads", type=int, help="of PyTorch, which has its own default")
    parser.add_argument("--logits", action="store_true", help="losses of logits with options")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile")
    parser.add_argument("--out", type=Path, help="folder of the record (benchmarks/results)")
    options = parser.parse_args()
    workloads = logit_rows.WORKLOADS if options.logits else [*BY_NAME.values()]
    if unknown := {*(options.loss or [])} - {x.name for x in workloads}:
        parser.error(f"got {', '.join(sorted(unknown))}, which is no loss")
    device = devices.Cpu(options.threads, options.quick)
    importable, versions = peers.available()
    run = records.new_run(**device.description(), peers={x: versions[x] for x in importable})
    folder = options.out or records.RESULTS
    record = records.Record(folder, device.label, run.pop("device"), run)
    if os.getloadavg()[0] > 0.5:
        print("The machine is not idle: figures of several threads suffer most.", file=sys.stderr)
    shapes_of = logit_rows.shapes if options.logits else device.shapes
    rows = []
    for workload in workloads:
        if options.loss and workload.name not in options.loss:
            continue
        for shape in options.sizes or shapes_of(workload):
            for direction in runner.DIRECTIONS[: 1 if options.logits else None]:
                problem = runner.Problem(workload, shape, torch.float32, direction)
                device.forget()
                losses = runner.implementations(problem, device, importable)
                rows.append(runner.measure(problem, losses, device))
                print(report.in_short(rows[-1]), file=sys.stderr, flush=True)
                if options.out or not options.quick:  # few rounds are not worth a record
                    record.add(rows[-1])
    print(report.table(rows))
    if options.logits:
        print(logit_rows.bars(rows))
    # peers may be missing here, but fastkd and eager must run and agree
    broken = [
        f"{row['loss']}, {name}: {row['implementations'][name]['note']}"
        for row in rows
        for name in ("fastkd", "eager")
        if "note" in row["implementations"].get(name, {})
    ]
    print(*broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

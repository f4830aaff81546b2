"""Print the tables of the records: python benchmarks/report.py [measured heads counted ...]

Reads benchmarks/results and tests/budgets.json. A row is stale when the code that it is a figure of
has changed since; `--check` lists those and exits 1. `exactness` reads no record: its table is
computed when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkout
import head_tables
import peers
import records
from tables import markdown, pair, section
from workloads import BY_NAME, WORKLOADS

Row = dict[str, Any]
ORDER = list(BY_NAME)
CASES = [workload.case for workload in WORKLOADS]
MADE_BY = {"inductor": "inductor", "modelled": "floor"}
LEGEND = """\
*Measured*. Columns with the name of an implementation: how many times as long as fastkd it takes,
median of the rounds' ratios [quartiles], below 1 where it is faster. Memory: peak beyond the
inputs, in times one tensor of the inputs' shape and dtype. Stale: the code has changed since. Busy:
the machine had other work to do, which several threads suffer from most.
"""
OF_HOSTS = """\
Times are the GPU's alone. Host: how long a call takes until all of it is launched; a step whose
host's time is the longer one takes that long, unless other work lets the GPU fall behind.
"""


def table(rows: Sequence[Row]) -> str:
    """Return one line for each row, with one column for each implementation."""
    names = dict.fromkeys(name for row in rows for name in row["implementations"])
    others = [name for name in names if name != "fastkd"]
    with_share = any(row.get("least_milliseconds") for row in rows)
    with_threads = any(row.get("threads") for row in rows)
    with_hosts = any(map(has_host, rows))
    columns = ["loss", "shape", "dtype", "direction", *(["threads"] if with_threads else [])]
    columns += ["fastkd, ms", *(["of the ceiling"] if with_share else []), *others]
    columns += ["host, ms", "eager's host, ms"] if with_hosts else []
    columns += ["memory", "eager's memory", ""]
    lines = []
    for row in sorted(rows, key=place):
        found = row["implementations"]
        ours = found.get("fastkd", {})
        line = [name_of(row), size(row), row["dtype"], row["direction"]]
        line += [str(row.get("threads") or "–")] if with_threads else []
        line += [milliseconds(ours)]
        if with_share:
            share = row.get("least_milliseconds", 0) / ours.get("milliseconds", math.inf)
            line += [f"{share:.0%}" if share else "–"]
        line += [times(found.get(name, {})) for name in others]
        line += [host(row, name) for name in ("fastkd", "eager")] if with_hosts else []
        line += [memory(row, name) for name in ("fastkd", "eager")]
        lines.append([*line, status(row)])
    return markdown(columns, lines)


def status(row: Row) -> str:
    """Return why a row is to be doubted: other work shared the cores, or the code has changed."""
    return ", ".join(["stale"] * is_stale(row) + ["busy"] * (row.get("load", 0) > 1))


def is_stale(row: Row) -> bool:
    return records.is_stale(row, CASES)


def place(row: Row) -> tuple:
    known = ORDER.index(row["loss"]) if row["loss"] in ORDER else len(ORDER)
    size_and_way = row["dtype"], *row["shape"], row["direction"], row.get("threads") or 0
    return known, row.get("options", ""), size_and_way


def name_of(row: Row) -> str:
    return f"{row['loss']}, {row['options']}" if "options" in row else row["loss"]


def size(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def milliseconds(entry: Row) -> str:
    if "milliseconds" not in entry:
        return entry.get("note", "–")
    spread = f" [{', '.join(map(number, entry['quartiles']))}]" if "quartiles" in entry else ""
    return number(entry["milliseconds"]) + spread


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def times(entry: Row) -> str:
    if "ratio" not in entry:
        return entry.get("note") or (f"{number(entry['milliseconds'])} ms" if entry else "–")
    low, high = entry["ratio_quartiles"]
    return f"{entry['ratio']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")


def has_host(row: Row) -> bool:
    return any("host_milliseconds" in entry for entry in row["implementations"].values())


def host(row: Row, name: str) -> str:
    found = row["implementations"].get(name, {}).get("host_milliseconds")
    return "–" if found is None else number(found)


def memory(row: Row, name: str) -> str:
    found = row["implementations"].get(name, {}).get("peak_extra_bytes")
    numbers = math.prod(row["shape"]) * (2 if row["dtype"] in ("bfloat16", "float16") else 4)
    return "–" if found is None else f"{found / numbers:.2f}"


def in_short(row: Row) -> str:
    """Return a line that says how a run gets on."""
    found = row["implementations"]
    others = (f"{name} {times(entry)}" for name, entry in found.items() if name != "fastkd")
    what = f"{name_of(row)} {size(row)} {row['dtype']} {row['direction']}"
    return f"{what}: {milliseconds(found.get('fastkd', {}))} ms; {', '.join(others)}"


def page(record: dict[str, Any]) -> str:
    """Return all that is known of a device."""
    rows, latest = record["rows"], record["runs"][-1]
    facts = [
        f"{name} {latest[name]}" for name in ("torch", "triton", "commit", "utc") if name in latest
    ]
    if ceilings := latest.get("ceilings"):
        facts.append(
            "copy {copy_GBps:.0f} GB/s, matmul {matmul_bf16_TFLOPs:.0f} TFLOP/s".format(**ceilings)
        )
    if stale := sum(map(is_stale, rows)):
        facts.append(f"{stale} of {len(rows)} rows are stale: the code has changed since")
    versions = {name: version for run in record["runs"] for name, version in run["peers"].items()}
    missing = {name: why for name, why in versions.items() if why.startswith(peers.MISSING)}
    facts += [f"{name} {version}" for name, version in versions.items() if name not in missing]
    legend = LEGEND + (OF_HOSTS if any(map(has_host, rows)) else "")
    if record["label"] != "measured":  # so that nobody takes it for a result
        legend = "*A dry run: no figure here means anything.*\n"
    if missing:
        reasons = "".join(f"\n- {name} {why}" for name, why in missing.items())
        legend += f"\nNot compared, because they are missing on this machine:\n{reasons}\n"
    of_problem: dict[str, list[Row]] = {}
    for row in rows:
        problem = BY_NAME[row["loss"]].problem if row["loss"] in BY_NAME else "losses that are gone"
        of_problem.setdefault(problem or "formulas", []).append(row)
    tables = [f"#### {problem}\n\n{table(of_it)}" for problem, of_it in of_problem.items()]
    return "\n".join([f"### {record['device']}\n", f"{'; '.join(facts)}.\n", legend, *tables])


def counted() -> str:
    """Return what the kernels cost, as tests/budgets.json has it and the tests confirm it."""
    budgets = json.loads((checkout.ROOT / "tests" / "budgets.json").read_text())
    calls, kernels = [], []
    for loss in sorted(budgets["counts"], key=ORDER.index):
        for shape, found in budgets["counts"][loss].items():
            if "bfloat16" not in shape:
                continue
            call, traffic = found["call"], found["traffic"]
            what = [loss, shape.split()[0].replace("x", "×")]
            moved = pair(traffic["bytes"]) if BY_NAME[loss].family.independent else "–"
            calls.append([*what, pair(call["launches"]), pair(call["extra_memory"]), moved])
            for name, kernel in found["sm_90"].items():
                numbers = [", ".join(f"{x:g}" for x in kernel[y]) for y in ("instructions", "mufu")]
                resources = [kernel[x] for x in ("registers", "spills", "warps_per_sm", "tensor")]
                kernels.append([*what, name.split()[0], *resources, *numbers])
    columns = ["loss", "shape", "kernel", "registers", "spills", "warps per SM", "tensor"]
    of_calls = section(
        "bfloat16, forward / forward + backward: counted",
        ["loss", "shape", "launches", "extra memory", "bytes per entry"],
        calls,
        "extra memory: peak beyond the inputs, in times the input that is trained.",
        "bytes per entry: asked of memory for each (row, class) of both networks; the least is 4 / "
        "10 where a backward reads the logits again.",
    )
    of_kernels = section(
        "The kernels on sm_90: counted",
        [*columns, "instructions", "MUFU"],
        kernels,
        "instructions, MUFU: issued for each entry, one figure for each sweep over the row; of "
        "kernels that walk over points, for each pair and point. tensor: instructions on tensor "
        f"cores in the whole kernel. triton {budgets['triton']}.",
    )
    return f"{of_calls}\n{of_kernels}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["measured", "heads", "counted", *MADE_BY]
    parser.add_argument(
        "kinds", nargs="*", help=f"some of {', '.join(kinds)} (all of them), or exactness"
    )
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of records")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row is stale")
    options = parser.parse_args()
    measured, of_heads = (records.read(options.results / x) for x in ("", "heads"))
    if options.check:
        found = [*measured, *of_heads]
        stale = [(r["device"], row["loss"]) for r in found for row in r["rows"] if is_stale(row)]
        for device, loss in sorted({*stale}):
            print(f"stale: {stale.count((device, loss))} rows of {loss} on {device}")
        return 1 if stale else 0
    for kind in options.kinds or kinds:
        if kind == "measured":
            print(*map(page, measured), sep="\n")
            if not any("ceilings" in run for record in measured for run in record["runs"]):
                print("There is no figure of a GPU yet.\n")
        elif kind == "heads":
            print(*map(head_tables.page, of_heads), sep="\n")
        elif kind == "counted":
            print(counted())
        elif kind == "exactness":
            print(importlib.import_module("agreement").page())
        else:
            record = json.loads((options.results / f"{kind}.json").read_text())
            print(importlib.import_module(MADE_BY[kind]).table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

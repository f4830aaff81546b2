"""The README's tables of what was measured: python benchmarks/report.py [--check | --plots]

Reads the records in benchmarks/results. A row is stale when the code that it is a figure of has
changed since; `--check` lists those and exits 1. `--plots` draws each record beside it. Records of
dry runs are no measurements.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from cases import CASES
from provenance import hash_of_sources

RESULTS = Path(__file__).parent / "results"
FAMILIES = {case.name: case.family.name for case in CASES}
ORDER = [case.name for case in CASES]
Row = dict[str, Any]


def records(folder: Path) -> list[dict[str, Any]]:
    """The measured ones, the oldest first."""
    found = [json.loads(file.read_text()) for file in files(folder)]
    return sorted(found, key=lambda record: record.get("utc", ""))


def files(folder: Path) -> list[Path]:
    """Of what was measured."""
    found = {file: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return [file for file, record in found.items() if record.get("label") == "measured"]


def is_of_gpu(record: dict[str, Any]) -> bool:
    return "ceilings" in record


def rows_of(record: dict[str, Any]) -> list[Row]:
    """A CPU's rows as a GPU's, which have the names to keep; each with its staleness."""
    if not is_of_gpu(record):
        return [
            {
                **row,
                "op": row["loss"],
                "device": record["device"],
                "milliseconds": 1e3 * row["seconds"],
                "ratio_to_fastkd": row["ratio"],
                "stale": is_stale(row["loss"], record["sources"], "portable"),
            }
            for row in record["rows"]
        ]
    return [
        row | {"stale": is_stale(row["op"], row.get("sources"), "kernels")}
        for row in record["rows"]
    ]


def is_stale(op: str, sources: str | None, engine: str) -> bool:
    """A loss that is gone has no figure either."""
    return op not in FAMILIES or sources != hash_of_sources(FAMILIES[op], engine)


def problems(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """The rows of each problem by implementation, of the latest run that has it: never mixed."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], tuple(row["shape"]), row["dtype"], row["direction"])
        members = found.setdefault(key, {})
        if row.get("implementation", "") in members:  # a later run begins
            members.clear()
        members[row.get("implementation", "")] = row
    return found


def table(rows: Sequence[Row]) -> str:
    """One line for each problem, one column for each implementation."""
    others = [x for x in dict.fromkeys(r.get("implementation", "") for r in rows) if x != "fastkd"]
    with_share = any(row.get("share_of_ceiling") for row in rows)
    columns = ["loss", "shape", "dtype", "direction", "fastkd, ms"]
    columns += [*(["of the ceiling"] if with_share else []), *others]
    columns += ["memory", "eager's memory", ""]
    lines = []
    for key, members in sorted(problems(rows).items(), key=lambda item: place(item[0])):
        op, shape, dtype, direction = key
        ours = members.get("fastkd", {})
        share = ours.get("share_of_ceiling")
        logits = math.prod(shape) * (2 if dtype in ("bfloat16", "float16") else 4)
        line = [op, "×".join(map(str, shape)), dtype, direction, milliseconds(ours)]
        line += [f"{share:.0%}" if share else "–"] if with_share else []
        line += [times(members.get(name)) for name in others]
        line += [peak(members.get(name, {}), logits) for name in ("fastkd", "eager")]
        line.append("stale" if any(row["stale"] for row in members.values()) else "")
        lines.append(line)
    return markdown(columns, lines)


def place(key: tuple) -> tuple:
    op, shape, dtype, direction = key
    return (ORDER.index(op) if op in ORDER else len(ORDER), dtype, -math.prod(shape), direction)


def milliseconds(row: Row) -> str:
    if row.get("milliseconds") is None:
        return row.get("note", "–")
    spread = f" [{row['p20']:.3g}, {row['p80']:.3g}]" if "p20" in row else ""
    return f"{row['milliseconds']:.3g}{spread}"


def times(row: Row | None) -> str:
    if row is None:
        return "–"
    if not row.get("ratio_to_fastkd"):
        return row.get("note") or milliseconds(row) + " ms"
    return f"{row['ratio_to_fastkd']:.2f}" + (" (!)" if row.get("note") else "")


def peak(row: Row, logits: int) -> str:
    bytes_ = row.get("peak_extra_bytes")
    return "–" if bytes_ is None else f"{bytes_ / logits:.2f}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *lines]) + "\n"


LEGEND = """\
*Measured*. Columns with the name of an implementation: how many times as long as fastkd it takes,
below 1 where it is faster; (!): it has a note below. Memory: peak beyond the inputs, in times one
tensor of the inputs' shape and dtype.
"""


def page(device: str, of_device: Sequence[dict[str, Any]]) -> str:
    """All that is known of a device: the latest figure of each problem."""
    rows = [row for record in of_device for row in rows_of(record)]
    shown = [row for members in problems(rows).values() for row in members.values()]
    latest = of_device[-1]
    facts = [f"torch {latest['torch']}", f"commit {latest['commit']}"]
    if is_of_gpu(latest):
        facts += [f"triton {latest['triton']}", latest["utc"], *ceilings(latest)]
    else:
        facts += [f"{latest['threads']} thread(s)"]
    stale = sum(row["stale"] for row in shown)
    if stale:
        facts.append(f"{stale} of {len(shown)} rows are stale: the code has changed since")
    notes = dict.fromkeys(
        f"{row['op']}, {row.get('implementation', 'all')}: {row['note']}"
        for row in shown
        if row.get("note")
    )
    peers = (f"{name}: {found}" for name, found in latest.get("peers", {}).items())
    parts = [f"### {device}\n", f"{'; '.join(facts)}.\n", LEGEND, table(shown)]
    return "\n".join([*parts, *(f"* {note}" for note in [*peers, *notes]), ""])


def ceilings(record: dict[str, Any]) -> list[str]:
    found = record["ceilings"]
    if not found:
        return ["its ceilings were not measured"]
    return [f"copy {found['copy_GBps']:.0f} GB/s, matmul {found['matmul_bf16_TFLOPs']:.0f} TFLOP/s"]


def page_of_run(record: dict[str, Any]) -> str:
    text = page(record["device"], [record])
    if record["label"] == "dry":  # nobody shall take it for a result
        text = text.replace("*Measured*.", "*A dry run: no figure here means anything.*")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row is stale")
    parser.add_argument("--plots", action="store_true", help="draw each record, as PNGs beside it")
    options = parser.parse_args()
    if options.plots:
        import plots  # which imports this module

        for file in files(options.results):
            print(*plots.draw(json.loads(file.read_text()), file.with_suffix("")), sep="\n")
        return 0
    found = records(options.results)
    if options.check:
        stale = [row for record in found for row in rows_of(record) if row["stale"]]
        for device, op in sorted({(row["device"], row["op"]) for row in stale}):
            number = sum((row["device"], row["op"]) == (device, op) for row in stale)
            print(f"stale: {number} rows of {op} on {device}")
        return 1 if stale else 0
    devices: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        devices.setdefault(record["device"], []).append(record)
    for device, of_device in devices.items():
        print(page(device, of_device))
    if not any(map(is_of_gpu, found)):
        print("There is no figure of a GPU yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of the record of heads.py: times and memory, errors, and what was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import checkout  # noqa: F401
import records
import runner
from peers import MISSING
from tables import markdown
from workloads import BY_NAME


def table(found: Iterable[dict[str, Any]]) -> str:
    """Return the rows of times and memory, with the times and bytes of others over fastkd's."""
    lines = []
    for row in found:
        if row["direction"] == "errors":
            continue
        ours = row["implementations"].get("fastkd", {})
        for name, entry in row["implementations"].items():
            what = [row["options"], "×".join(map(str, row["shape"])), row["dtype"]]
            what += [row["direction"]]
            if "note" in entry and "milliseconds" not in entry:
                lines.append([*what, name, entry["note"], *["–"] * 9])
                continue
            lines.append([
                *what, name, _number(entry.get("milliseconds"), 1e3), _ratio(entry),
                _number(entry.get("cpu_milliseconds"), 1e3),
                _times(entry, ours, "cpu_milliseconds"),
                _number(entry.get("peak_extra_bytes"), 2**20),
                _times(entry, ours, "peak_extra_bytes"),
                _number(entry.get("peak_allocated_bytes"), 2**20),
                entry.get("products", "–"), _number(entry.get("flops"), 1e9),
                _status(row),
            ])  # fmt: skip
    columns = ["loss", "tokens×V×H", "dtype", "direction", "of", "seconds", "/ fastkd's"]
    columns += ["CPU seconds", "/ fastkd's"]
    columns += ["peak, MiB", "/ fastkd's", "allocated, MiB", "products", "GFLOP", ""]
    return markdown(columns, lines)


def table_of_errors(found: Iterable[dict[str, Any]]) -> str:
    lines = []
    for row in (x for x in found if x["direction"] == "errors"):
        what = [row["options"], "×".join(map(str, row["shape"])), row["dtype"]]
        lines.append([*what, "rounded once", *_errors(row["floor"]), ""])
        for name, entry in row["implementations"].items():
            if "errors" in entry:
                lines.append([*what, name, *_errors(entry["errors"]), entry.get("result", "")])
    return markdown(["loss", "tokens×V×H", "dtype", "of", "loss", "dh", "dW", ""], lines)


def _errors(entry: Mapping[str, Any]) -> list[str]:
    found = [entry.get(name, "–") for name in ("loss", "hidden", "head")]
    return [x if isinstance(x, str) else f"{x:.1e}" for x in found]


def _number(x: float | None, unit: float) -> str:
    return "–" if x is None else f"{x / unit:.3g}" if x < 1000 * unit else f"{x / unit:.0f}"


def _ratio(entry: Mapping[str, Any]) -> str:
    return f"{entry['ratio']:.2f}" if "ratio" in entry else "–"


def _times(entry: Mapping[str, Any], ours: Mapping[str, Any], field: str) -> str:
    return f"{entry[field] / ours[field]:.2f}" if field in entry and ours.get(field) else "–"


def _status(row: Mapping[str, Any]) -> str:
    stale = records.is_stale(row, [BY_NAME["linear_kd"].case])
    return ", ".join(["stale"] * stale + ["busy"] * (row.get("load", 0) > 1.5))


_UNITS = {"milliseconds": "time", "cpu_milliseconds": "CPU time", "peak_extra_bytes": "memory"}


def bars(found: Iterable[dict[str, Any]]) -> str:
    """Return the table of the goals, what was found, and whether they are met."""
    found = list(found)
    by_place = {(x["options"], *x["shape"][1:], x["dtype"], x["direction"]): x for x in found}
    lines = []

    def add(what: str, goal: str, x: float | None, is_met: bool) -> None:
        figure = "–" if x is None else f"{x:.2f}"
        lines.append([what, goal, figure, "–" if x is None else "met" if is_met else "missed"])

    def ratio(row: Mapping[str, Any], name: str, field: str) -> float | None:
        entries = row.get("implementations", {})
        theirs, ours = (entries.get(x, {}).get(field) for x in (name, "fastkd"))
        return theirs / ours if theirs is not None and ours else None

    least_of = [("forward KL", 32000, 1.4, 3), ("JSD", 32000, 2.2, 5), ("JSD", 128256, 3, 14)]
    for loss, n_cols, faster, leaner in least_of:
        row = by_place.get((loss, n_cols, 512, "float32", runner.DIRECTIONS[0]), {})
        what = f"eager / fastkd, {loss} {n_cols}×512 float32"
        for field, unit in _UNITS.items():
            x, least = ratio(row, "eager", field), leaner if unit == "memory" else faster
            add(f"{what}, {unit}", f"≥ {least}", x, x is not None and x >= least)
    for name in ("unsloth_zoo", "trl", "liger-kernel", "liger-kernel compiled"):
        is_unsloth = name == "unsloth_zoo"
        for field, unit in _UNITS.items():
            of_name = [
                (ratio(row, name, field), row["options"], *row["shape"][1:], row["dtype"])
                for row in found
                if not (is_unsloth and unit != "memory" and row["dtype"] != "float32")
            ]
            of_name = [x for x in of_name if x[0] is not None]
            if not of_name:
                continue
            least = 1.3 if is_unsloth and unit != "memory" else 1
            worst = min(of_name)
            where = " ".join(map(str, worst[1:]))
            what = f"{name} / fastkd, {unit}, the least of {len(of_name)} rows ({where})"
            add(what, f"≥ {least}", worst[0], worst[0] >= least)
        pairs = [
            (row["implementations"][name]["errors"][x], ours["errors"][x], row["options"], x)
            for row in found
            if (ours := row["implementations"].get("fastkd", {})).get("errors")
            for x in row["implementations"].get(name, {}).get("errors", {})
            if name != "unsloth_zoo"
        ]
        ratios = [
            (math.inf if "NaN" in (a, b) else _above_noise(a) / _above_noise(b), loss, x)
            for a, b, loss, x in pairs
        ]
        if ratios:
            worst = min(ratios)
            what = f"{name}'s error / fastkd's, the least of {len(ratios)} ({worst[1]}, {worst[2]})"
            add(what, "≥ 1", worst[0], worst[0] >= 1)
    return markdown(["what", "goal", "found", ""], lines)


def _above_noise(error: float) -> float:
    """Return an error, or what rounding to float32 costs at most where it is smaller by chance."""
    return max(error, 2.0**-24)


LEGEND = """\
*Measured*, forward and backward of one step: the median of interleaved rounds, and the median of
the rounds' ratios; the CPU time of all threads, which tells more of a busy machine. Peak: the most
resident memory beyond the inputs, of a process of its own, the new gradients included. Counted:
what PyTorch's allocator hands out at once, and the products of matrices, where oneDNN makes many
blocks of one. Busy: the machine had other work to do.
"""
OF_ERRORS = """\
Errors against float64, by norm. Rounded once: the result in float64, rounded to the dtype of what
is trained. A near teacher is the student with noise of 0.01; of a padded vocabulary the last 16th
has −∞ in both biases.
"""


def page(record: dict[str, Any]) -> str:
    """Return all that is known of a device."""
    latest, found = record["runs"][-1], record["rows"]
    versions = {name: x for run in record["runs"] for name, x in run["peers"].items()}
    missing = [f"- {name} {x}" for name, x in versions.items() if x.startswith(MISSING)]
    facts = [f"{x} {latest[x]}" for x in ("torch", "commit", "utc")]
    facts += [f"{name} {x}" for name, x in versions.items() if not x.startswith(MISSING)]
    facts += [f"{x} threads" for x in dict.fromkeys(row["threads"] for row in found)]
    parts = [f"### Heads on {record['device']}\n", f"{'; '.join(facts)}.\n", LEGEND, table(found)]
    parts += ["Missing on this machine:\n", *missing, ""] if missing else []
    parts += [OF_ERRORS, table_of_errors(found), "Goals:\n", bars(found)]
    return "\n".join(parts)

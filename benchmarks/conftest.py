"""Options of the benchmarks, and after them the table and the record of what was measured."""

import inspect
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from operator import itemgetter
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests")]

import published  # noqa: E402
from cases import CASES, T  # noqa: E402
from peers import PEERS  # noqa: E402
from provenance import commit, device, hash_of_sources  # noqa: E402
from tables import Table  # noqa: E402

OURS_AND_PYTORCH = ("fastkd", "eager", "torch.compile")
ENGINE = "kernels" if torch.cuda.is_available() else "portable"


def pytest_addoption(parser):
    group = parser.getgroup("fastkd")
    group.addoption("--family", help="the losses of one, for example relational")
    group.addoption("--only", help="losses, for example forward_kl,kd")
    group.addoption("--sizes", help="rows and columns, for example 128x10,2048x32000")
    group.addoption(
        "--quick", action="store_true", help="few rounds, small sizes, no torch.compile"
    )
    group.addoption("--results", type=Path, help="folder of the record (benchmarks/results)")


def pytest_terminal_summary(config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b.extra_info for b in session.benchmarks if b.extra_info] if session else []
    for family in dict.fromkeys(info["family"] for info in measured):
        write(family, [info for info in measured if info["family"] == family], config.getoption)


def write(family: str, measured: list[dict], option: Callable) -> None:
    """The record of a family, which has a file of its own, and its table."""
    record = {
        "schema": 1,
        "label": "measured",
        "device": device(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # other work makes all of it slower
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "sources": hash_of_sources(family, ENGINE),
        "temperature": T,
        "peers": versions({name for info in measured for name in info["rounds"]}),
        "rows": [row for info in measured for row in rows(info)],
    }
    table(record).show()
    if option("quick") and not option("results"):
        return  # not worth a record
    results = option("results") or HERE / "results"
    results.mkdir(exist_ok=True)
    file = results / f"{'-'.join(record['device'].lower().split())}-{family}.json"
    add_earlier(file, record)
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(record).markdown() + eager_sources(family))
    print(f"written: {file} and, for a page, {file.with_suffix('.md').name}")


def place(row: dict) -> tuple:
    return [case.name for case in CASES].index(row["loss"]), row["shape"], row["dtype"]


def versions(implementations: set[str]) -> dict[str, str]:
    """Of the peers."""
    return {name: metadata.version(name.split()[0]) for name in sorted(implementations & {*PEERS})}


def add_earlier(file: Path, record: dict) -> None:
    """The rows of other benchmarks on the same code: a long run may come in parts."""
    old = json.loads(file.read_text()) if file.exists() else {}
    problem = itemgetter("loss", "shape", "dtype", "direction")
    new = [problem(row) for row in record["rows"]]
    if all(old.get(key) == record[key] for key in ("schema", "sources", "torch", "temperature")):
        record["rows"] += [row for row in old["rows"] if problem(row) not in new]
        record["peers"] = old.get("peers", {}) | record["peers"]
    record["rows"].sort(key=place)


def rows(info: dict) -> list[dict]:
    """One for each implementation. Ratios: its time over fastkd's, round by round."""
    found = []
    for name, seconds in info["rounds"].items():
        ratios = [
            theirs / ours for theirs, ours in zip(seconds, info["rounds"]["fastkd"], strict=True)
        ]
        quartiles = 3 * ratios  # of one round
        if len(ratios) > 1:
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        found.append(
            {
                **{key: info[key] for key in ("loss", "shape", "dtype", "direction")},
                "implementation": name,
                "seconds": statistics.median(seconds),
                "ratio": quartiles[1],
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "peak_extra_bytes": info["peak_extra_bytes"].get(name),
            }
        )
    return found


def table(record: dict) -> Table:
    grouped: dict[tuple, dict] = {}
    for row in record["rows"]:
        key = row["loss"], *row["shape"], row["dtype"], row["direction"]
        grouped.setdefault(key, {})[row["implementation"]] = row
    names = [*dict.fromkeys(row["implementation"] for row in record["rows"])]
    others = ["eager", "torch.compile"] + [x for x in names if x not in OURS_AND_PYTORCH]
    lines = []
    for (loss, n_rows, n_cols, dtype, direction), of in grouped.items():
        inputs = n_rows * n_cols * getattr(torch, dtype).itemsize
        peaks = [
            of[x]["peak_extra_bytes"] / inputs if x in of else None for x in ("fastkd", "eager")
        ]
        lines.append(
            [
                loss,
                f"{n_rows}×{n_cols}",
                dtype,
                direction,
                milliseconds(of["fastkd"]["seconds"]),
                *(times(of.get(name)) for name in others),
                *("does not fit" if x is None else f"{x:.2f}" for x in peaks),
            ]
        )
    compiled = any(row["implementation"] == "torch.compile" for row in record["rows"])
    return Table(
        f"{record['device']}, {record['threads']} thread(s), torch {record['torch']}, "
        f"T = {record['temperature']:g}: measured",
        [
            *("loss", "shape", "dtype", "direction", "fastkd, ms", *others),
            *("memory", "eager's memory"),
        ],
        lines,
        [
            "eager, torch.compile, peers: how many times as long they take, median of the rounds' "
            "ratios [quartiles]; the expressions are below.",
            "memory: peak beyond the inputs, in times the student's; a backward makes as much.",
            f"commit {record['commit']}, sources {record['sources']}, load {record['load']}."
            + ("" if compiled else " torch.compile was not run: small sizes, --quick or no g++."),
            *(f"{name} {version}" for name, version in record["peers"].items()),
        ],
    )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def times(row: dict | None) -> str:
    if row is None:
        return "–"
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")


def eager_sources(family: str) -> str:
    losses = [case.eager for case in CASES if case.family.name == family]
    if any(loss.__module__ == published.__name__ for loss in losses):
        sources = inspect.getsource(published)
    else:
        sources = "\n\n".join(map(inspect.getsource, losses))
    return f"\nWhat eager and torch.compile run:\n\n```python\n{sources}```\n"

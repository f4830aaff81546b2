"""The record of a device: results/<device>.json, with the latest figures of each loss and shape.

    schema, label      3; "measured", or "dry" for a run whose times mean nothing
    device             its name
    runs               utc, commit, torch, python, peers; of a GPU ceilings, sweep and steps
      peers            the version of each, or what it lacks here
      steps            when each began, its seconds, and what it did and left
    rows               one on a line: loss, shape, dtype, direction, threads (of a CPU), options
      load             processes for each core, the benchmark itself included
      run              index into runs
      sources          hash of the code that the row is a figure of: when that changes it is stale
      bytes, flops, least_milliseconds       what must be done, and its time at the ceilings
      implementations  fastkd, eager, torch.compile, peers; each either with a note or with
        milliseconds, quartiles, calls       of one call, on the device alone
        host_milliseconds                    of a GPU: of one call until all of it is launched
        ratio, ratio_quartiles               its time over fastkd's, round by round
        peak_extra_bytes                     the most that is allocated at once beyond the inputs

A later run replaces a row as a whole: what was not timed side by side is never shown side by side.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import checkout
import torch

import fastkd

ROOT = checkout.ROOT
# how losses are called, checked and spread over ranks, which takes all of them as long
_OF_ALL_LOSSES = ("_backend", "_checks", "_loss", "_op", "_option_checks", "_ranks")
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


class Record:
    """The record of a device in a file, which is written anew after each row.

    It goes on from what is in that file, or in the one of an `earlier` run.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        device: str,
        run: Mapping[str, Any],
        earlier: Path | None = None,
    ) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.file = folder / f"{name}.json"
        self.run = dict(run)
        self.content: dict[str, Any] = {"schema": 3, "label": label, "device": device}
        self.content |= {"runs": [], "rows": []}
        source = earlier or self.file
        if source.exists():
            found = json.loads(source.read_text())
            if (found["label"], found["device"]) != (label, device):
                raise ValueError(
                    f"{source} has figures of {found['device']} ({found['label']}), this run makes "
                    f"some of {device} ({label}): continue the record of the same device"
                )
            self.content = found
        self.content["runs"].append(self.run)

    @property
    def earlier_runs(self) -> list[dict[str, Any]]:
        """Return what other runs wrote, the latest first."""
        return self.content["runs"][-2::-1]

    def fresh(self, row: Row) -> Row | None:
        """Return the row in the place of this one, unless the code has changed since."""
        place = key_of(row), row["sources"]
        found = (old for old in self.content["rows"] if (key_of(old), old["sources"]) == place)
        return next(found, None)

    def add(self, row: Row) -> None:
        rows = {key_of(old): old for old in self.content["rows"]}
        # its place in the order stays, whatever was measured first
        rows[key_of(row)] = {"run": len(self.content["runs"]) - 1, **row}
        self.content["rows"] = [*rows.values()]
        self.save()

    def save(self) -> None:
        """Write the record, without the runs that no row is left of but this one."""
        runs, rows = self.content["runs"], self.content["rows"]
        kept = sorted({row["run"] for row in rows} | {len(runs) - 1})
        rows = [{**row, "run": kept.index(row["run"])} for row in rows]
        write(self.file, {**self.content, "runs": [runs[i] for i in kept], "rows": rows})


def key_of(row: Row) -> tuple:
    place = row["loss"], *row["shape"], row["dtype"], row["direction"], row.get("threads")
    return (*place, row["options"]) if "options" in row else place


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a line for each row and run, so that a difference can be read."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")  # so that a run that is killed leaves a whole file
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(unfinished, file)


def read(folder: Path = RESULTS, label: str = "measured") -> list[dict[str, Any]]:
    """Return the records of a label; of dry runs there is none among the measured ones."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [record for record in found if record.get("label") == label]


def new_run(**besides: Any) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    run = {
        "utc": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(ImportError):
        import triton

        run["triton"] = triton.__version__
    return {**run, **besides}


def commit() -> str:
    """Return the commit, which FASTKD_COMMIT names where the files travel without their history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if found:
            return found
    return os.environ.get("FASTKD_COMMIT", "unknown")


def code() -> str:
    """Return the hash of all code that tests run, as it is written."""
    files = (file for x in ("fastkd", "kernels", "tests") for file in (ROOT / x).rglob("*.py"))
    texts = (file.read_bytes() for file in sorted(files) if "demo" not in file.parts)
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def is_stale(row: Row, cases: Iterable[Any]) -> bool:
    """Return whether the code has changed that the row is a figure of; a loss that is gone has."""
    engine = "portable" if row.get("threads") else "triton"
    return row["sources"] not in {sources(c, engine) for c in cases if c.name == row["loss"]}


def sources(case: Any, engine: str) -> str:
    """Return the hash of the code that computes a loss, from its statement to the engine.

    A comment, a docstring, another layout or the text of an error leaves it as it is. Of a loss
    without a problem the code is the module of its formula.
    """
    return _sources(case.name, case.problem, engine if case.has_kernels else "portable")


@functools.cache
def _sources(loss: str, problem: str | None, engine: str) -> str:
    files = [_file_of_formula(loss)] if problem is None else modules(loss, problem, engine)
    return hashlib.sha256("\n".join(map(structure_of, files)).encode()).hexdigest()[:16]


@functools.cache
def structure_of(file: Path) -> str:
    return structure(parsed(file))


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def modules(loss: str, problem: str, engine: str) -> list[Path]:
    """Return the files that an engine solves a problem with, and those that state the loss as one.

    They are the engine's module, what the decorator of the formula names, and what these import.
    """
    place = f"kernels.{problem}.launch" if engine == "triton" else f"portable.{problem}"
    found: set[Path] = set()
    waiting = [*_files_of(f"fastkd.{place}"), *_named_by_decorator(loss)]
    while waiting:
        file = waiting.pop()
        if file.stem not in _OF_ALL_LOSSES and file not in found:
            found.add(file)
            waiting += [x for _, x in _imports_of(file)]
    return sorted(found)


def _file_of_formula(loss: str) -> Path:
    return Path(str(inspect.getsourcefile(inspect.unwrap(getattr(fastkd, loss)))))


def _named_by_decorator(loss: str) -> list[Path]:
    """Return the files of what the decorator of a formula takes from other modules."""
    file = _file_of_formula(loss)
    imports = _imports_of(file)
    return [
        found
        for node in parsed(file).body
        if isinstance(node, ast.FunctionDef) and node.name == loss
        for decorator in node.decorator_list
        for used in ast.walk(decorator)
        for name, found in imports
        if isinstance(used, ast.Name) and used.id == name
    ]


@functools.cache
def _imports_of(file: Path) -> list[tuple[str, Path]]:
    """Return what a file imports of fastkd, by its name there, and the file that it is in."""
    return [
        (alias.asname or alias.name, found)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("fastkd.")
        for alias in node.names
        for found in _files_of(f"{node.module}.{alias.name}")
    ]


def _files_of(name: str) -> list[Path]:
    """Return the file of a module, or of that which something with this name is in, if any."""
    place = name.split(".")
    if place[1:2] == ["kernels"]:  # the folder beside fastkd's
        place = place[1:]
    files = (ROOT.joinpath(*x).with_suffix(".py") for x in (place, place[:-1]))
    return [file for file in files if file.is_file()][:1]


def structure(node: Any) -> str:
    """Return the code as text, without comments, docstrings, layout and errors."""
    if isinstance(node, list):
        return f"[{','.join(structure(x) for x in node if not _is_docstring(x))}]"
    if isinstance(node, ast.Raise):
        return "Raise"
    if isinstance(node, ast.AST):
        # a field without a value may be missing in another release of Python
        fields = ((name, x) for name, x in ast.iter_fields(node) if x is not None and x != [])
        return f"{type(node).__name__}({','.join(f'{name}={structure(x)}' for name, x in fields)})"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )

"""The steps of a GPU run that are tests: first light, all others, and those of the sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import child
from checkout import ROOT

SANITIZERS = ("memcheck", "racecheck", "initcheck")
_MOST_WORKERS = 14
NO_TESTS = 5  # pytest's status where all of them were deselected
# a test's name with its outcome, as pytest -v prints it with xdist and without
_WITH_XDIST = r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>[A-Z]+) (?P<name>\S.*?) *$"
_ALONE = r"^(?P<name2>tests/\S.*?) (?P<outcome2>[A-Z]+)(?: \(.*\))? +\[ *\d+%\]$"
_OUTCOME = re.compile(f"{_WITH_XDIST}|{_ALONE}", re.MULTILINE)


def pytest(marker: str) -> list[str]:
    options = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    return [sys.executable, "-m", "pytest", *options, "-m", marker, str(ROOT / "tests" / "gpu")]


def first_light(run: Any, deadline: float) -> dict[str, Any]:
    return suite(run, deadline, "first_light", "first_light")


def tests(run: Any, deadline: float) -> dict[str, Any]:
    return suite(run, deadline, "tests", "gpu and not first_light")


def suite(run: Any, deadline: float, name: str, marker: str) -> dict[str, Any]:
    """Run the tests with a marker, but for those that passed in an earlier run of the same code."""
    earlier = run.earlier(name)
    if earlier.get("status") == 0:
        return {**earlier, "done before": True}
    log = run.folder / f"{name}.log"
    # a name for each test as it ends, so that the log of a run that is killed says where it was
    command = [*pytest(marker), "-v", "--tb=short", "-rfE"]
    before = run.earlier_folder / log.name
    is_known = earlier and before.exists()
    passed = names_of(before.read_text(errors="replace"), "PASSED") if is_known else []
    command += [f"--deselect={test}" for test in passed]
    if run.device.label == "measured" and importlib.util.find_spec("xdist"):
        command += ["-n", str(n_workers(len(os.sched_getaffinity(0))))]
    start = log.stat().st_size if log.exists() else 0
    seconds = deadline - time.monotonic()
    status = child.run(command, log, seconds, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    text = log.read_bytes()[start:].decode(errors="replace")
    result: dict[str, Any] = {"status": 0 if status == NO_TESTS and passed else status}
    for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        if found := names_of(text, outcome):
            result[outcome.lower()] = len(found)
    if passed:
        result["done before"] = len(passed)
    return {**result, "last_line": (text.strip().splitlines() or [""])[-1].strip("= ")[:300]}


def names_of(text: str, outcome: str) -> list[str]:
    """Return the names of the tests that ended so, each once."""
    found = (match.groupdict() for match in _OUTCOME.finditer(text))
    names = (x["name"] or x["name2"] for x in found if (x["outcome"] or x["outcome2"]) == outcome)
    return [*dict.fromkeys(names)]


def n_workers(n_cores: int) -> int:
    """Return how many processes run tests, whose time is mostly compilation; two cores are left."""
    return max(1, min(_MOST_WORKERS, n_cores - 2))


def sanitizer(run: Any, deadline: float) -> dict[str, Any]:
    """Run small problems under compute-sanitizer; in a dry run they are only collected."""
    earlier = run.earlier("sanitizer")
    if earlier and all(earlier.get(tool) == 0 for tool in SANITIZERS):
        return {**earlier, "done before": True}
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
        found: dict[str, Any] = dict(zip(tools, pool.map(watched, tools), strict=True))
    refused = [tool for tool in tools if "not supported" in last_text(run.folder / f"{tool}.log")]
    return found | ({"note": f"{', '.join(refused)} refused this device"} if refused else {})


def last_text(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else ""


STEPS = {"first_light": first_light, "tests": tests, "sanitizer": sanitizer}

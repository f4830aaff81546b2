"""Measure losses of hidden states and heads on this CPU: python benchmarks/heads.py --peers FOLDER

Beside fastkd.linear_kd stand eager PyTorch and the libraries of head_losses.py, whose wheels FOLDER
has unpacked. The record is results/heads/<device>.json, written after every step, so that a run
that was cut off goes on from it. A row is made in parts:

    errors    of loss and gradients against float64, at a size where that is cheap
    memory    of each contender in a process of its own: the most that is resident at once beyond
              what is after a step of a small problem and the inputs, without `.grad`, so that new
              gradients count; what PyTorch's allocator hands out, in all threads; and the products
              of matrices and their FLOP. The latter two are PyTorch's profiler's
    time      forward and backward, all contenders in turn in one process, round after round; and
              the CPU time of all threads, which tells more where the machine has other work to do

What the memory and errors of others are does not depend on fastkd: they stay when its code changes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import devices
import head_losses
import head_tables
import records
import runner
import torch
from head_losses import Batch, Contender, Loss
from head_meter import allocated, available_bytes, products, profiler, resident
from head_rows import SMALL, TINY, Row, batch_of, forget_gradients, rows, step_of
from torch import Tensor

RESULTS = records.RESULTS / "heads"
PARTS = ("errors", "memory", "time")
# how many times all logits in float32 those have at once that have most, as they were measured
_LOGITS = {
    "eager": {"forward_kl": 8, "reverse_kl": 9, "jensen_shannon": 13},
    "liger-kernel": {"forward_kl": 12, "reverse_kl": 12, "jensen_shannon": 39},
}
# all that a row knows of a contender and that no other machine or load changes
_TIMES = ("milliseconds", "cpu_milliseconds", "quartiles", "calls", "ratio", "ratio_quartiles")
_COUNTED = ("errors", "result", "peak_extra_bytes", "peak_allocated_bytes", "products", "flops")


# ----------------------------------------------------------------------------------------- errors


def measure_errors(row: Row, contenders: Mapping[str, Contender], entry: dict[str, Any]) -> None:
    """Write each contender's errors, and what rounding the results in float64 once costs."""
    x = batch_of(row)
    wide = Batch(
        *(
            y.detach().double().requires_grad_(y.requires_grad)
            if y is not None and y.is_floating_point()
            else y
            for y in x
        )
    )
    # there the formula itself is 0 · ∞ outside fastkd, so that it is taken without the padding
    exact = results_of(head_losses.eager, row, _unpadded(wide) if row.teacher == "padded" else wide)
    entry["floor"] = {
        name: runner.figure(error_of(_rounded(y, name, x), y)) for name, y in exact.items()
    }
    for name, contender in contenders.items():
        try:
            found = results_of(contender, row, x)
        except Exception as error:  # its entry says so, the others go on
            entry["implementations"][name] = {"note": runner.sentence(error)}
            continue
        if row.teacher == "padded":
            result = {"result": _in_words(found, len(exact["head"]))}
            found = {y: z[: len(exact[y])] if y == "head" else z for y, z in found.items()}
        else:
            result = {}
        off = {y: error_of(found[y], exact[y]) for y in exact}
        off = {y: runner.figure(z) if math.isfinite(z) else "NaN" for y, z in off.items()}
        entry["implementations"].setdefault(name, {}).update(errors=off, **result)


def error_of(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def results_of(contender: Contender, row: Row, x: Batch) -> dict[str, Tensor]:
    value = step_of(contender, row, x)()
    found = {"loss": value, "hidden": x.student.grad, "head": x.student_weight.grad}
    return {name: y.detach() for name, y in found.items() if y is not None}


def _rounded(y: Tensor, name: str, x: Batch) -> Tensor:
    """Return a result as its dtype holds it; every loss is float32 at least."""
    return y.to(torch.float32 if name == "loss" else x.student.dtype)


def _unpadded(x: Batch) -> Batch:
    kept = x.student_bias.detach().isfinite()
    student = x.student_weight.detach()[kept].requires_grad_(x.student_weight.requires_grad)
    return Batch(x.student, student, x.teacher, x.teacher_weight[kept], x.labels)


def _in_words(found: Mapping[str, Tensor], n_cols: int) -> str:
    """Return what comes out of a vocabulary that is padded after its first entries."""
    words = [f"loss {found['loss'].item():.6g}"]
    for name in ("hidden", "head"):
        y = found[name]
        words.append(f"{name} {'finite' if y.isfinite().all() else 'not finite'}")
    if found["head"][n_cols:].count_nonzero():
        words.append("a gradient of what is padded")
    return ", ".join(words)


# ----------------------------------------------------------------------------------------- memory


def measure_memory(row: Row, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a contender needs at once and what it multiplies, from a process of its own."""
    if available_bytes() < needed_bytes(row, name):
        return {}
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps([row, name])]
    command += ["--peers", str(options.peers)] if options.peers else []
    child = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if child.returncode:
        why = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        return {"memory_note": why[:200]}
    return json.loads(child.stdout.strip().splitlines()[-1])


def serve(text: str) -> dict[str, Any]:
    """Return the figures of one contender, in the process that was started for it."""
    (loss, *others), name = json.loads(text)
    row = Row(Loss(*loss), *others)
    contender = head_losses.CONTENDERS[name]()
    with profiler():  # both load what they need on the first use
        step_of(contender, row, batch_of(row, TINY))()
    x = batch_of(row)
    step = step_of(contender, row, x)
    if "compiled" in name:
        step()
    forget_gradients(x)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    step()
    peak = resident("VmHWM")
    forget_gradients(x)
    with profiler() as profile:  # afterwards, because it takes memory itself
        step()
    n, flops = products(profile)
    return {
        "peak_extra_bytes": peak - before,
        "peak_allocated_bytes": allocated(profile),
        "products": n,
        "flops": flops,
    }


def needed_bytes(row: Row, name: str) -> int:
    """Return about how much memory a contender takes beyond the inputs."""
    logits = 4 * row.shape[0] * row.shape[1]
    return logits * _LOGITS.get(name.split()[0], {}).get(row.loss.divergence, 2)


# ------------------------------------------------------------------------------------------- time


def measure_time(
    row: Row, contenders: Mapping[str, Contender], rounds: int, entry: dict[str, Any]
) -> None:
    """Write how long a step of each contender takes, and its ratio to fastkd's."""
    x, found = batch_of(row), entry["implementations"]
    for name in found:  # what was not timed side by side is never shown side by side
        for field in (*_TIMES, "note") if name in contenders else _TIMES:
            found[name].pop(field, None)
    tolerance = 1e-3 if row.dtype == "float32" else 0.05
    ours: runner.Found | None = None
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, contender in contenders.items():
        if available_bytes() < needed_bytes(row, name):
            needed = needed_bytes(row, name) / 1e9
            found.setdefault(name, {})["note"] = f"needs about {needed:.0f} GB, which are not free"
            continue
        try:
            tiny = batch_of(row, TINY)  # shows whether it is the same loss
            result = runner.Found(step_of(contender, row, tiny)(), tiny.student.grad)
            ours = ours or result
            if off := runner.disagreement(result, ours, tolerance):
                raise ValueError(off)
            steps[name] = step_of(contender, row, x)
            if "compiled" in name:
                steps[name]()
        except Exception as error:
            found.setdefault(name, {})["note"] = runner.sentence(error)
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            forget_gradients(x)
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            cpu_times[name].append(1e3 * (time.process_time() - cpu_began))
            times[name].append(1e3 * (time.perf_counter() - began))
    for name, of_name in times.items():
        batches = [devices.Batch([y]) for y in of_name]
        found.setdefault(name, {}).update(runner.times(batches, times.get("fastkd", [])))
        found[name]["cpu_milliseconds"] = runner.figure(statistics.median(cpu_times[name]))
    entry["load"] = round(os.getloadavg()[0] / (os.cpu_count() or 1), 1)


# --------------------------------------------------------------------------------------------- run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with the wheels of others, unpacked")
    parser.add_argument("--rows", default="", help="their names, with commas between them")
    parser.add_argument("--sizes", default="", help="for example 2048x32000x512,512x4096x512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is done of each row")
    parser.add_argument("--only", default=",".join(head_losses.CONTENDERS), help="contenders")
    parser.add_argument("--threads", type=int, help="of PyTorch, which has its own default")
    parser.add_argument("--rounds", type=int, default=3, help="of the times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--print", action="store_true", help="print the record, measure nothing")
    parser.add_argument("--again", action="store_true", help="measure what is in the record too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers.resolve()))
    if options.child:
        print(json.dumps(serve(options.child)))
        return 0
    device = devices.Cpu(options.threads)
    contenders, versions = head_losses.available()
    run = records.new_run(**device.description(), peers=versions)
    record = records.Record(options.out, device.label, run.pop("device"), run)
    if not options.print:
        for row in chosen(options):
            measure(row, contenders, versions, device, record, options)
    print(head_losses.expressions())
    print(head_tables.page(record.content))
    return 0


def chosen(options: argparse.Namespace) -> list[Row]:
    sizes = [tuple(map(int, x.split("x"))) for x in options.sizes.split(",") if x]
    found = [x for x in rows() if x.dtype in options.dtypes.split(",")]
    if options.rows:
        found = [x for x in found if x.name in options.rows.split(",")]
    if not sizes:
        return found
    # any size may be asked for, of the losses of another
    return [
        *dict.fromkeys(
            x._replace(shape=size)
            for size in sizes
            for x in found
            if x.has_errors == (size == SMALL)
        )
    ]


def measure(
    row: Row,
    contenders: Mapping[str, Contender],
    versions: Mapping[str, str],
    device: devices.Cpu,
    record: records.Record,
    options: argparse.Namespace,
) -> None:
    """Do what the record lacks of a row."""
    only, parts = options.only.split(","), options.parts.split(",")
    entry = goes_on(record, row.in_record(device))
    found = entry["implementations"]
    able = {}
    for name in only:
        if name not in contenders:
            found[name] = {"note": versions[name]}
        elif why := head_losses.lacks(name, row.loss):
            found[name] = {"note": why}
        else:
            able[name] = contenders[name]
    began = time.perf_counter()
    if row.has_errors:
        todo = [x for x in able if options.again or "errors" not in found.get(x, {})]
        if todo and "errors" in parts:
            measure_errors(row, {x: able[x] for x in todo}, entry)
            record.add(entry)
    else:
        for name in able if "memory" in parts else ():
            if options.again or "peak_extra_bytes" not in found.get(name, {}):
                found.setdefault(name, {}).update(measure_memory(row, name, options))
                record.add(entry)
        calls = [y.get("calls", 0) for x in able if "note" not in (y := found.get(x, {}))]
        if "time" in parts and (
            options.again or min(calls, default=options.rounds) < options.rounds
        ):
            measure_time(row, able, options.rounds, entry)
            record.add(entry)
    took = time.perf_counter() - began
    print(f"{row.name} {row.shape} {row.dtype}: {took:.0f} s", file=sys.stderr, flush=True)


def goes_on(record: records.Record, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row as the record has it; of other code all but fastkd's figures and all times."""
    place = records.key_of(row)
    old = next((x for x in record.content["rows"] if records.key_of(x) == place), None)
    if old is None:
        return row
    entry = {**old, **row, "implementations": old["implementations"]}
    entry.pop("run")
    if old["sources"] != row["sources"]:
        entry["implementations"] = {
            name: {x: y for x, y in found.items() if x in _COUNTED} if name != "fastkd" else {}
            for name, found in old["implementations"].items()
        }
    return entry


if __name__ == "__main__":
    sys.exit(main())

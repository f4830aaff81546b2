"""Count what torch.compile makes of the losses, without a GPU: python benchmarks/inductor.py

Inductor lowers the eager expression of each loss for an H100 (inductor_code.py). What it generates
runs in Triton's interpreter on a few rows, where its value, its gradient and its bytes are taken,
and is compiled for the real size, where its launches, memory and registers are. Beside it stand the
eager expression and fastkd. Needs torch 2.13 and g++: a development tool, nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from math import prod
from typing import Any

import checkout
import child
import records
import torch
from counts import resources
from gate import capture
from meter import Meter, PeakMemory
from tables import pair, section
from workloads import BY_NAME, FUSED, WORKLOADS, Workload

FILE = records.RESULTS / "inductor.json"
BUDGETS = checkout.ROOT / "tests" / "budgets.json"
SHAPE, MULTIPROCESSORS = (4096, 128256), 132
# as many rows for a multiprocessor, and columns that are not padded either: the same kernels
SMALL, FEW_MULTIPROCESSORS = (32, 4032), 1
# of rows of logits, but those whose buffers are padded as they are not for the few rows that run
PADDED = ("decoupled_kd", "nkd")
LOGITS = [x for x in WORKLOADS if len(x.family.compiled_sizes) == 6 and x.name not in PADDED]
SPACING = 2**-7  # of bfloat16
TORCH = "2.13"  # whose private API inductor_code.py uses: it is imported where that is sure


def generate(workload: Workload) -> tuple[list[str], list[str]]:
    """Generate the code of forward and backward for the small shape and for the real one."""
    from inductor_code import graphs, lower, pretend_h100

    found = []
    for shape, multiprocessors in ((SMALL, FEW_MULTIPROCESSORS), (SHAPE, MULTIPROCESSORS)):
        with pretend_h100(multiprocessors):
            inputs = workload.inputs(shape, torch.bfloat16, "meta")
            found.append([lower(graph) for graph in graphs(workload.eager, inputs)])
    small, real = found
    if [*map(sweeps, small)] != [*map(sweeps, real)]:
        raise RuntimeError(f"at {SMALL} other kernels are generated than at {SHAPE}")
    return small, real


def sweeps(code: str) -> list[str]:
    """Return the kernels that are launched, but for those that only sum up one number a row."""
    launched = re.findall(r"^\s+(\w+)\.run\(.*?(\d+)(?:, (\d+))?, stream=", code, re.M)
    return [name for name, size, reduced in launched if (size, bool(reduced)) != ("1", True)]


def bytes_per_entry(meter: Meter, entries: int) -> list[float]:
    """Return what is asked for, and each byte once, of arguments as large as the logits.

    The numbers of a row stay in L1.
    """
    arguments = [a for launch in meter.launches for a in launch.arguments.values()]
    large = [a for a in arguments if a.unique_loaded + a.unique_stored >= entries]
    return [
        sum(a.loaded + a.stored for a in large) / entries,
        sum(a.unique_loaded + a.unique_stored for a in large) / entries,
    ]


def run_small(generated: dict[str, list[str]]) -> dict[str, Any]:
    """Watch in the interpreter what the generated code of each loss moves."""
    from interpreter import correct

    correct()
    return {name: run_generated(BY_NAME[name], *codes) for name, codes in generated.items()}


def run_generated(workload: Workload, forward: str, backward: str) -> dict[str, Any]:
    from inductor_code import load, runnable

    inputs = workload.inputs(SMALL, torch.bfloat16)
    with runnable("cpu"), torch.no_grad():
        with Meter() as first:
            value, *kept = load(forward)([x.detach() for x in inputs])
        with Meter() as second:
            gradient = load(backward)([*kept, torch.ones_like(value)])[0]
    moved = [bytes_per_entry(meter, prod(SMALL)) for meter in (first, second)]
    (forward_bytes, forward_unique), (backward_bytes, backward_unique) = moved
    return {
        "bytes_per_entry": [forward_bytes, forward_bytes + backward_bytes],
        "unique_bytes_per_entry": [forward_unique, forward_unique + backward_unique],
        "relative_error": errors(workload, inputs, [value, gradient]),
    }


def errors(
    workload: Workload, inputs: list[torch.Tensor], found: list[torch.Tensor]
) -> list[float]:
    """Return those of value and gradient, and raise above twice eager's and a step of bfloat16."""

    def value_and_gradient(*inputs):
        value = workload.eager(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs[0])]

    exact = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    truth = value_and_gradient(exact[0].requires_grad_(), *exact[1:])
    relative = []
    for x, eager, true in zip(found, value_and_gradient(*inputs), truth, strict=True):
        error, allowed = (float((y.double() - true).norm() / true.norm()) for y in (x, eager))
        if not error <= 2 * allowed + SPACING:
            raise RuntimeError(f"wrong by {error:.1%}, eager by {allowed:.1%}")
        relative.append(error)
    return relative


def torch_compiled(workload: Workload, forward: str, backward: str) -> dict[str, Any]:
    """Compile the generated code for the real size: its launches, memory and kernels."""
    from inductor_code import load, runnable

    inputs = workload.inputs(SHAPE, torch.bfloat16, "meta")
    student = inputs[0]
    with capture("sm_90") as launches, runnable("meta"), torch.no_grad(), PeakMemory() as memory:
        value, *kept = load(forward)([x.detach() for x in inputs])
        n_forward, forward_bytes = len(launches), memory.peak_bytes
        arguments = [*kept, torch.ones_like(value)]
        del kept
        load(backward)(arguments)
    kernels = []
    for launch in launches:
        report = resources(launch, 2 * student.element_size())
        one = {what: report[what] for what in ("registers", "spills", "warps_per_sm")}
        kernels.append({"kernel": launch.name, **one})
    return {
        "launches": [n_forward, len(launches)],
        "peak_extra_memory": [x / student.nbytes for x in (forward_bytes, memory.peak_bytes)],
        "kernels": kernels,
    }


def eager(loss: Any, workload: Workload) -> dict[str, Any]:
    """Count operations of ATen that are no views, each of which is one launch at least."""
    inputs = workload.inputs(SHAPE, torch.bfloat16, "meta")
    with PeakMemory() as memory:
        value = loss(*inputs)
        forward = memory.operations, memory.peak_bytes, memory.moved_bytes
        torch.autograd.grad(value, inputs[0])
    both = memory.operations, memory.peak_bytes, memory.moved_bytes
    launches, peaks, moved = zip(forward, both, strict=True)
    return {
        "launches": list(launches),
        "peak_extra_memory": [x / inputs[0].nbytes for x in peaks],
        "bytes_per_entry": [x / prod(SHAPE) for x in moved],
    }


def fastkd(workload: Workload) -> dict[str, Any]:
    """Return what tests/budgets.json has of the kernels, or count the operations that stand in."""
    if workload not in FUSED:
        return eager(workload.fastkd, workload)
    found = json.loads(BUDGETS.read_text())["counts"][workload.name]["4096x128256 bfloat16"]
    return {
        "launches": found["call"]["launches"],
        "peak_extra_memory": found["call"]["extra_memory"],
        "bytes_per_entry": found["traffic"]["bytes"],
    }


def count() -> dict[str, Any]:
    from inductor_code import register_guard

    register_guard()
    generated = {workload.name: generate(workload) for workload in LOGITS}
    small = {name: codes for name, (codes, _) in generated.items()}
    moved = child.interpreted(__file__, "--small", small)
    rows = []
    for workload in LOGITS:
        name = workload.name
        row = {
            "eager": eager(workload.eager, workload),
            "torch.compile": {**torch_compiled(workload, *generated[name][1]), **moved[name]},
            "fastkd": fastkd(workload),
        }
        rows.append({"loss": name, **row})
    return {
        "schema": 2,
        "label": "counted",
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "dtype": "bfloat16",
        "shape": list(SHAPE),
        "temperature": LOGITS[0].options["temperature"],
        "losses": rows,
    }


def table(record: dict[str, Any]) -> str:
    names = ("eager", "torch.compile", "fastkd")
    figures = {"bytes": "bytes_per_entry", "launches": "launches", "memory": "peak_extra_memory"}
    columns = {f"{name}: {what}": (name, key) for what, key in figures.items() for name in names}
    columns["torch.compile: bytes once"] = ("torch.compile", "unique_bytes_per_entry")
    rows = []
    for row in record["losses"]:
        kernels = row["torch.compile"]["kernels"]
        warps = " ".join(str(kernel["warps_per_sm"]) for kernel in kernels)
        spills = sum(kernel["spills"] for kernel in kernels)
        cells = [pair(row[name].get(what)) for name, what in columns.values()]
        rows.append([row["loss"], *cells, f"{warps}; {spills}"])
    n_rows, n_cols = record["shape"]
    return section(
        f"{n_rows}×{n_cols} bfloat16 logits, forward / forward + backward: counted",
        ["loss", *columns, "torch.compile: warps per SM; spills"],
        rows,
        "bytes: asked of memory for each (row, class) of both networks, by tensors as large as the "
        "logits; once: each for a launch. eager: what operations take and give.",
        "launches: of eager its ATen operations that are no views. memory: peak beyond the inputs, "
        "in times one logits tensor; a backward makes one.",
        "torch.compile: what Inductor generates for an H100, in the first of the configurations "
        "that it would time.",
        f"torch {record['torch']}, triton {record['triton']}, T = {record['temperature']:g}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().small:
        print(json.dumps(run_small(json.load(sys.stdin))))
        return
    if not torch.__version__.startswith(f"{TORCH}."):
        sys.exit(f"torch is {torch.__version__}, and this works with the private API of {TORCH}.")
    record = count()
    records.write(FILE, record)
    print(table(record))


if __name__ == "__main__":
    main()

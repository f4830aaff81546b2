"""Measure a loss beside eager PyTorch, torch.compile of it and importable peers.

A round runs a batch of each implementation, A B C, A B C, ..., so that whatever else the machine
does meets all of them; a ratio is the median of the rounds' ratios. What is not fastkd's loss in
value and gradient is not timed: its entry says by how much it differs.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import peers
import records
import torch
from child import is_device_error
from devices import Batch, Device, Step
from torch import Tensor
from workloads import Shape, Workload

import fastkd

DIRECTIONS = ("forward+backward", "forward")
Loss = Callable[..., Tensor]
Row = dict[str, Any]


class Problem(NamedTuple):
    """A loss at a shape, which is one row of a record."""

    workload: Workload
    shape: Shape
    dtype: torch.dtype
    direction: str

    def row(self, device: Device) -> Row:
        return {
            "loss": self.workload.name,
            **({"options": self.workload.of_options} if self.workload.of_options else {}),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "threads": device.threads,
            "sources": records.sources(self.workload.case, device.engine),
        }


def implementations(
    problem: Problem, device: Device, importable: Mapping[str, Mapping[str, Loss]]
) -> dict[str, Loss]:
    """Return by name those that fit, ours first: the others are compared with it."""
    workload = problem.workload
    losses = {"fastkd": workload.fastkd, "eager": workload.eager, **workload.others}
    for name in device.compile_modes:
        options = device.options(name)
        losses[name] = torch.compile(workload.eager, dynamic=False, **options)
    if not workload.of_options:
        losses |= {
            name: peer[workload.name] for name, peer in importable.items() if workload.name in peer
        }

    def takes(name: str) -> bool:
        numbers = peers.TEMPORARIES.get(name, workload.family.temporary)(problem.shape)
        return device.takes(name, numbers, problem.dtype.itemsize)

    return {name: loss for name, loss in losses.items() if takes(name)}


def step_of(loss: Loss, inputs: Sequence[Tensor], direction: str) -> Step:
    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> Tensor:
        for x in inputs:
            x.grad = None
        value = loss(*inputs)
        value.backward()
        return value.detach()

    return forward if direction == "forward" else both


class Found(NamedTuple):
    """The results of a step."""

    value: Tensor
    gradient: Tensor | None


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference by norm; of what is 0, the absolute one."""
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    return float(norm(found - expected) / (norm(expected) or 1))


def disagreement(found: Found, ours: Found, tolerance: float) -> str:
    """Return in which way it is not fastkd's loss, or an empty string."""
    if not difference(found.value, ours.value) < tolerance:
        return f"its loss is {found.value:.7g}, fastkd's {ours.value:.7g}"
    if found.gradient is not None and ours.gradient is not None:
        off = difference(found.gradient, ours.gradient)
        if not off < tolerance:
            norms = (f"{torch.linalg.vector_norm(x.gradient):.4g}" for x in (found, ours))
            return "its gradient, of norm {}, is off fastkd's, {}, by {:.2%}".format(*norms, off)
    return ""


class Ready(NamedTuple):
    """An implementation that has run and agrees."""

    step: Step
    seconds: float  # of a call
    host_seconds: float  # of a call, until all is launched


def measure(
    problem: Problem,
    losses: Mapping[str, Loss],
    device: Device,
    announce: Callable[[str], None] = lambda name: None,
) -> Row:
    """Return the row of a problem; an implementation that cannot run has a note, and no time.

    Each is announced before it runs. An error after which no other can run is raised.
    """
    inputs = problem.workload.inputs(problem.shape, problem.dtype, device.name)
    # another convention is off by half or more; eager PyTorch is by 2e-3 of teacher_free_kd, where
    # T² = 400 multiplies what rounding leaves, and in half precision by up to a tenth
    tolerance = 1e-2 if problem.dtype.itemsize > 2 else 0.4
    found: dict[str, Row] = {}
    ready: dict[str, Ready] = {}
    ours: Found | None = None
    with fastkd.backend("triton" if device.engine == "triton" else "auto"):
        for name, loss in losses.items():
            announce(name)
            step = step_of(loss, inputs, problem.direction)
            try:
                began = time.perf_counter()
                value, peak = device.first(name, step)
                device.synchronise()
                seconds = host = time.perf_counter() - began
                found[name] = {"peak_extra_bytes": peak, "first_call_seconds": figure(seconds)}
                result = Found(value, inputs[0].grad)
                is_other = name in problem.workload.others
                if ours and not is_other and (note := disagreement(result, ours, tolerance)):
                    raise ValueError(note)
                ours = result if name == "fastkd" else ours
                # what takes long is not done once more, unless most of that was its compilation
                if seconds < 5 or name in device.compile_modes:
                    began = time.perf_counter()
                    step()
                    host = time.perf_counter() - began
                    device.synchronise()
                    seconds = time.perf_counter() - began
                ready[name] = Ready(step, seconds, host)
            except Exception as error:  # its entry says so, the others go on
                if is_device_error(error):
                    raise
                found[name] = {"note": sentence(error)}
            for x in inputs:
                x.grad = None
        ours = result = None
        batches: dict[str, list[Batch]] = {name: [] for name in ready}
        rounds, calls = device.plan({name: x.seconds for name, x in ready.items()})
        for _ in range(rounds):
            for name, (step, _, host) in ready.items():
                announce(name)
                batches[name].append(device.time(step, calls[name], size_of(inputs), host))
    ours_by_round = [statistics.median(b.milliseconds) for b in batches.get("fastkd", [])]
    for name, of_name in batches.items():
        found[name] |= times(of_name, ours_by_round)
    return {
        **problem.row(device),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
        "bytes": least_bytes(problem, inputs),
        "flops": least_flops(problem),
        "implementations": found,
    }


def times(batches: Sequence[Batch], ours: Sequence[float]) -> Row:
    calls = [x for batch in batches for x in batch.milliseconds]
    medians = [statistics.median(batch.milliseconds) for batch in batches]
    ratios = [theirs / own for theirs, own in zip(medians, ours, strict=False)]
    row: Row = {
        "milliseconds": figure(statistics.median(calls)),
        "quartiles": quartiles(calls),
        "calls": len(calls),
    }
    if batches[0].host_milliseconds is not None:
        row["host_milliseconds"] = figure(statistics.median(b.host_milliseconds for b in batches))
    if ratios:
        row |= {"ratio": figure(statistics.median(ratios)), "ratio_quartiles": quartiles(ratios)}
    return row


def quartiles(numbers: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(
        numbers if len(numbers) > 1 else 2 * [*numbers], n=4, method="inclusive"
    )
    return [figure(low), figure(high)]


def figure(number: float) -> float:
    return float(f"{number:.4g}")


def sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    name = (
        ""
        if isinstance(error, ValueError) and lines[0].startswith("its ")
        else type(error).__name__
    )
    return f"{name}: {lines[0]}".removeprefix(": ")[:300]


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def least_bytes(problem: Problem, inputs: Sequence[Tensor]) -> int:
    """Return what must move: the inputs in, in each direction, and the gradients out."""
    read = size_of(inputs)
    if problem.direction == "forward":
        return read
    # a backward that is a step of its own reads the logits again
    again = read if problem.workload.family.independent else 0
    return read + again + sum(x.nbytes for x in inputs if x.requires_grad)


def least_flops(problem: Problem) -> int:
    """Return what must be computed where that, and not memory, takes the time."""
    workload, is_forward = problem.workload, problem.direction == "forward"
    if workload.problem not in ("pairs", "relations"):
        return 0
    n, n_features = problem.shape
    if workload.problem == "pairs":
        # products of matrices: the similarities of each network, and a gradient of either side
        n_networks = 2 if workload.name == "similarity_kl" else 1
        return 2 * n * n * n_features * (n_networks if is_forward else n_networks + 2)
    # a difference, its square and the sum for each pair and network; in the gradient once more
    pairs = n * n * n_features * (3 if is_forward else 6)
    # of a pair and a third example: a cosine in each network and its penalty; three with slopes
    triples = n**3 // 2 * (14 if is_forward else 50)
    return pairs + (0 if workload.name == "rkd_distance" else triples)


def least_milliseconds(row: Row, problem: Problem, ceilings: Mapping[str, float]) -> float:
    """Return what the row of a problem takes at the ceilings of its device."""
    is_product = problem.workload.problem == "pairs" and problem.dtype.itemsize == 2
    rate = ceilings[f"matmul_{'bf16' if is_product else 'fp32'}_TFLOPs"]
    return figure(max(row["bytes"] / ceilings["copy_GBps"] / 1e6, row["flops"] / rate / 1e9))

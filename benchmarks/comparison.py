"""Every loss against eager PyTorch, torch.compile and its peers, in interleaved rounds.

A round runs a batch of each implementation, A B C, A B C, ..., so that a change of the clock meets
all of them. The most telling problems come first: a run that is short of time keeps those.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from cases import Case
from provenance import hash_of_sources
from timing import DIRECTIONS, Batch, Device, Found, Step, difference, disagreement, step_of
from torch import Tensor

import fastkd

Row = dict[str, Any]


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def least_bytes(case: Case, inputs: Sequence[Tensor], direction: str) -> int:
    """What must move: the inputs in, in each direction, and the gradients out."""
    read = size_of(inputs)
    if direction == "forward":
        return read
    # a backward that is a step of its own reads the logits again
    again = read if case.family.name in ("divergence", "self_distillation") else 0
    return read + again + sum(x.nbytes for x in inputs if x.requires_grad)


def least_flops(case: Case, shape: Sequence[int], direction: str) -> int:
    """What must be computed where that, and not memory, takes the time."""
    if case.family.name not in ("contrastive", "similarity", "relational"):
        return 0
    n, n_features = shape
    if case.family.name != "relational":
        # products of matrices: the similarities of each network, and a gradient of either side
        product = 2 * n * n * n_features
        n_networks = 2 if case.family.name == "similarity" else 1
        return product * (n_networks if direction == "forward" else n_networks + 2)
    # a difference, its square and the sum for each pair and network; in the gradient once more
    pairs = n * n * n_features * (3 if direction == "forward" else 6)
    # of a pair and a third example: a cosine in each network and its penalty; three with slopes
    triples = n**3 // 2 * (14 if direction == "forward" else 50)
    return pairs + (0 if case.name == "rkd_distance" else triples)


class Problem(NamedTuple):
    case: Case
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str

    @property
    def row(self) -> Row:
        return {
            "op": self.case.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "sources": hash_of_sources(self.case.family.name, "kernels"),
        }


def problems(cases: Sequence[Case], device: Device) -> list[Problem]:
    """The largest in the narrowest dtype, then one loss against N and V, then all others."""
    by_size = {
        case.name: sorted(device.sizes(case.family), key=math.prod, reverse=True) for case in cases
    }
    narrow, both_ways = device.dtypes[0], DIRECTIONS[0]
    first = [Problem(case, by_size[case.name][0], narrow, both_ways) for case in cases]
    series = [
        Problem(case, shape, narrow, both_ways)
        for _, members in itertools.groupby(cases, lambda case: case.family.name)
        for case in [next(members)]
        for shape in shapes_of_series(by_size[case.name][0])
    ]
    rest = [
        Problem(case, by_size[case.name][rank], dtype, direction)
        for dtype, direction in itertools.product(device.dtypes, DIRECTIONS)
        for rank in range(max(map(len, by_size.values()), default=0))
        for case in cases
        if rank < len(by_size[case.name])
    ]
    # a case cannot be hashed, its row's text can
    return list({str(problem.row): problem for problem in [*first, *series, *rest]}.values())


def shapes_of_series(largest: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One axis of the largest shape after the other in steps of four, the others as they are."""
    return [
        (*largest[:axis], size // 4**step, *largest[axis + 1 :])
        for axis, size in enumerate(largest)
        for step in range(1, 5)
        if size // 4**step
    ]


def inputs_of(problem: Problem, device: Device) -> list[Tensor]:
    """The case's own; of a large problem as many rows as a CPU makes quickly, over and over."""
    case, (n_rows, *others), dtype, _ = problem
    distinct = min(n_rows, max(1, device.most_random // math.prod(others)))
    inputs = case.inputs((distinct, *others), dtype, device.name)
    if distinct == n_rows:
        return inputs
    repeats = -(-n_rows // distinct)
    repeated = (x.detach().repeat(repeats, *[1] * (x.ndim - 1))[:n_rows] for x in inputs)
    return [
        new.requires_grad_(old.requires_grad) for new, old in zip(repeated, inputs, strict=True)
    ]


def implementations(
    case: Case, device: Device, peers: dict[str, dict[str, Callable[..., Tensor]]]
) -> dict[str, Callable[..., Tensor]]:
    """By name, ours first: the others are compared with it."""
    return {
        "fastkd": case.fastkd,
        "eager": case.eager,
        **{
            name: torch.compile(case.eager, dynamic=False, **options)
            for name, options in device.compile_modes.items()
        },
        **{name: losses[case.name] for name, losses in peers.items() if case.name in losses},
    }


class Ready(NamedTuple):
    step: Step
    calls: int  # of a batch
    host_seconds: float
    row: Row


def prepared(
    step: Step, inputs: list[Tensor], ours: Found | None, device: Device
) -> tuple[Ready, Found]:
    """Compiled, warm, and looked at: its memory, and whether its value and gradient are ours."""
    began = time.perf_counter()
    value = step()
    device.synchronise()
    row: Row = {"first_call_seconds": round(time.perf_counter() - began, 3)}
    found = Found(value, inputs[0].grad)
    if ours is not None:
        if found.gradient is not None and ours.gradient is not None:
            row["gradient_difference"] = difference(found.gradient, ours.gradient)
        if note := disagreement(found, ours, 0.2):  # half precision alone is far below
            row["note"] = note
    ours = ours or found
    inputs[0].grad = found = None
    row["peak_extra_bytes"] = device.peak(step)
    device.synchronise()
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    device.synchronise()
    calls = int(device.seconds_of_batch / (time.perf_counter() - began))
    # more launches than that would not fit into the queue
    return Ready(step, max(device.calls, min(20, calls)), host, row), ours


def compare(
    problem: Problem,
    losses: dict[str, Callable[..., Tensor]],
    device: Device,
    ceilings: dict[str, float],
) -> list[Row]:
    """A row for each implementation; what cannot run has a note in place of its time."""
    inputs = inputs_of(problem, device)
    moved = least_bytes(problem.case, inputs, problem.direction)
    flops = least_flops(problem.case, problem.shape, problem.direction)
    # milliseconds at the ceilings of this device
    is_product = problem.case.family.name in ("contrastive", "similarity")
    rate = "bf16" if is_product and problem.dtype.itemsize == 2 else "fp32"
    copy_rate, flop_rate = ceilings.get("copy_GBps"), ceilings.get(f"matmul_{rate}_TFLOPs")
    least = max(moved / copy_rate / 1e6, flops / flop_rate / 1e9) if copy_rate and flop_rate else 0
    ours: Found | None = None
    ready: dict[str, Ready] = {}
    notes: dict[str, str] = {}
    with fastkd.backend("triton"):
        for name, loss in losses.items():
            inputs[0].grad = None
            try:
                step = step_of(loss, inputs, problem.direction)
                ready[name], found = prepared(step, inputs, ours, device)
                if name == "fastkd":
                    ours = found
            except Exception as error:  # its row says so, the others go on
                notes[name] = sentence(error)
        ours = inputs[0].grad = None
        batches: dict[str, list[Batch]] = {name: [] for name in ready}
        for _ in range(device.rounds):
            for name, (step, calls, host_seconds, _) in ready.items():
                batches[name].append(device.time(step, calls, size_of(inputs), host_seconds))
    ours_by_round = [statistics.median(b.milliseconds) for b in batches.get("fastkd", [])]
    head = {
        **problem.row,
        "bytes": moved,
        "flops": flops,
    }
    rows = []
    for name in losses:
        row = {**head, "implementation": name, "milliseconds": None}
        if name in notes:
            row["note"] = notes[name]
        else:
            row |= times(batches[name], ours_by_round) | ready[name].row
            row["GBps"] = round(moved / row["milliseconds"] / 1e6, 2)
            row["share_of_ceiling"] = round(least / row["milliseconds"], 4) if least else None
        rows.append(row)
    return rows


def times(batches: Sequence[Batch], ours: Sequence[float]) -> Row:
    calls = sorted(x for batch in batches for x in batch.milliseconds)
    low, *_, high = statistics.quantiles(calls, n=5, method="inclusive")
    medians = [statistics.median(batch.milliseconds) for batch in batches]
    ratios = [theirs / own for theirs, own in zip(medians, ours, strict=False)]
    return {
        "milliseconds": round(statistics.median(calls), 5),
        "p20": round(low, 5),
        "p80": round(high, 5),
        "n": len(calls),
        "host_milliseconds": round(statistics.median(b.host_milliseconds for b in batches), 5),
        "ratio_to_fastkd": round(statistics.median(ratios), 4) if ratios else None,
    }


def sentence(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]

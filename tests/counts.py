"""The cost of a loss on a GPU, counted without one at its launch sites.

    run = compiled(case, shape, dtype, "sm_90")     launches and memory
    resources(run.launches[0], run.element_bytes)   registers, instructions and so on of a launch
    small, device = scaled_down(case, shape)        under TRITON_INTERPRET=1
    with device:
        metered(case, small, dtype)                 bytes moved

Of independent examples, the first number of a shape, a few stand for all. Where they are related a
smaller problem is another one: its bytes are no measure of the whole, but of a change.
"""

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gate import DEVICES, Launch, capture
from meter import Meter, PeakMemory
from sass import analyse
from tile_work import work_of

import fastkd
from fastkd.kernels import device as of_device

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from workloads import FUSED as FUSED
from workloads import Workload as Case

RELATED = (40, 24)  # examples and features, of more than one tile


def the(name: str) -> Case:
    (found,) = (case for case in FUSED if case.name == name)
    return found


class Compiled(NamedTuple):
    launches: list[Launch]
    n_forward: int  # of them
    forward_bytes: int  # the most alive at once, beyond the inputs
    peak_bytes: int  # the same, backward included
    trained_bytes: int  # of the input that is trained
    element_bytes: int  # one element of it and of every other input of its shape


def compiled(case: Case, shape: tuple[int, ...], dtype: torch.dtype, target: str) -> Compiled:
    inputs = case.inputs(shape, dtype, "meta")
    trained = inputs[0]
    with capture(target) as launches, fastkd.backend("triton"), PeakMemory() as memory:
        loss = case.fastkd(*inputs)
        n_forward, forward_bytes = len(launches), memory.peak_bytes
        # not loss.backward(): the stand-in holds on to the gradient, which would make it a copy
        torch.autograd.grad(loss, trained)
    return Compiled(
        launches,
        n_forward,
        forward_bytes,
        memory.peak_bytes,
        trained.nbytes,
        sum(x.element_size() for x in inputs if x.shape == trained.shape),
    )


def launches_of(
    loss: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    target: str = "sm_90",
    backward: bool = True,
    teacher_dtype: torch.dtype | None = None,
) -> list[Launch]:
    """Return what a loss of two networks launches, by its name."""
    student = torch.empty(shape, dtype=dtype, device="meta", requires_grad=backward)
    teacher = torch.empty(shape, dtype=teacher_dtype or dtype, device="meta")
    labels = [torch.empty(shape[:-1], dtype=torch.int64, device="meta")] if loss == "kd" else []
    options: dict[str, Any] = {} if loss in ("rkd", "similarity_kl") else dict(temperature=2.0)
    with capture(target) as found, fastkd.backend("triton"):
        result = getattr(fastkd, loss)(student, teacher, *labels, **options)
        if backward:
            torch.autograd.grad(result, student)
    return found


def resources(launch: Launch, element_bytes: int) -> dict[str, Any]:
    """Return the counts of a launch, instructions for each element and one number for each sweep.

    Of kernels that walk over points they are for each pair and point.
    """
    if "amdgcn" in launch.asm:
        found = dict(re.findall(r"\.(\w+): +(\d+)\n", launch.asm["amdgcn"]))
        return {
            "registers": int(found["vgpr_count"]),
            "shared_bytes": launch.metadata.shared,
            # scalar ones are kept in vector registers: no memory is touched
            "spills": int(found["vgpr_spill_count"]),
        }
    report, work = analyse(launch), work_of(launch)
    # what loads nothing itself, as the hardware's copies do, is counted for the thread
    sweeps = [(sweep, sweep["load_bytes"] / element_bytes or 1) for sweep in report.sweeps]
    if work and work.trips:
        walk = main_walk(report.loops)
        sweeps = [(walk, work.per_trip / (32 * report.warps))]
    elif work:  # of pairs that are met once; loops are over the few numbers of a mean
        sweeps = [(report.outside, report.outside["load_bytes"] / element_bytes)]
    return {
        "registers": report.registers,
        "shared_bytes": report.shared_bytes,
        "spills": report.spills,
        "warps_per_sm": report.warps_per_sm,
        "instructions": [sweep["instructions"] / n for sweep, n in sweeps],
        "mufu": [sweep["mufu"] / n for sweep, n in sweeps],
        "tensor": report.total["tensor"],
    }


def main_walk(loops: list[Any]) -> Any:
    """Return the loop that loads and stores most and, among such loops over tiles, has least to do.

    One with a mask does more. One that only computes anew what was too small stores nothing.
    """
    return max(
        loops, key=lambda loop: (loop["load_bytes"], loop["store_bytes"], -loop["instructions"])
    )


def scaled_down(case: Case, shape: tuple[int, ...], n: int = 2) -> tuple[tuple[int, ...], Any]:
    """Return a few examples, and so much of an H100 that each gets its share of the whole."""
    if not case.family.independent:
        return tuple(map(min, shape, RELATED)), contextlib.nullcontext()
    multiprocessors = DEVICES["sm_90"].multiprocessors * n // shape[0]
    device = of_device.Device(max(1, multiprocessors), False)
    # what the launch sites ask for, wherever they have it from
    return (n, *shape[1:]), mock.patch.object(of_device, "Device", lambda *_: device)


def metered(
    case: Case,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    lay_out: Callable[[list[torch.Tensor]], list[torch.Tensor]] = list,
) -> tuple[Meter, Meter, list[torch.Tensor]]:
    """Run forward and backward, each watched, and return what they returned besides."""
    inputs = lay_out(case.inputs(shape, dtype))
    with fastkd.backend("triton"):
        with Meter() as forward:
            loss = case.fastkd(*inputs)
        with Meter() as backward:
            (gradient,) = torch.autograd.grad(loss, inputs[0])
    return forward, backward, [loss.detach(), gradient]

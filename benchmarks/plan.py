"""The order in which a GPU run measures: wherever it is cut off, the best evidence is there.

A stage is a list of problems and of the implementations that it adds to their rows. A problem is
measured anew with all that its row has and what a stage adds, side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from runner import DIRECTIONS, Problem
from workloads import LEADERS, Shape, Workload

OURS = ("fastkd", "eager")
STAGES = ("headlines", "compiled", "peers", "shapes", "autotuned")


def headlines(workloads: Sequence[Workload], device: Any) -> list[Problem]:
    """Return one good shape for each loss and way, in the narrowest dtype.

    Those of leaders come first, and forward alone comes last, because it tells least.
    """
    order = {name: i for i, name in enumerate(LEADERS)}
    leaders = sorted((x for x in workloads if x.name in order), key=lambda x: order[x.name])
    others = [x for x in workloads if x.name not in order]
    return [
        Problem(workload, shape, device.dtypes[0], direction)
        for direction in DIRECTIONS
        for group in (leaders, others)
        for workload, shape in by_turns(group, {x.name: device.headlines(x) for x in group})
    ]


def all_others(workloads: Sequence[Workload], device: Any) -> list[Problem]:
    """Return all problems that are no headlines; the largest of each loss are the first."""
    shapes = {x.name: sorted(device.shapes(x), key=math.prod, reverse=True) for x in workloads}
    first = [(x.workload.name, *x[1:]) for x in headlines(workloads, device)]
    problems = [
        Problem(workload, shape, dtype, direction)
        for dtype, direction in itertools.product(device.dtypes, DIRECTIONS)
        for workload, shape in by_turns(workloads, shapes)
    ]
    return [x for x in problems if (x.workload.name, *x[1:]) not in first]


def by_turns(
    workloads: Sequence[Workload], shapes: Mapping[str, Sequence[Shape]]
) -> list[tuple[Workload, Shape]]:
    """Return the first shape of each loss, then the second of each that has one, and so on."""
    longest = max(map(len, shapes.values()), default=0)
    return [
        (workload, shapes[workload.name][rank])
        for rank in range(longest)
        for workload in workloads
        if rank < len(shapes[workload.name])
    ]


def stage(
    name: str,
    workloads: Sequence[Workload],
    device: Any,
    peers: Mapping[str, Collection[str]],
    wanted: Collection[str],
) -> list[tuple[Problem, list[str]]]:
    """Return the problems of a stage, each with the implementations that it adds.

    Args:
        name: One of STAGES.
        workloads: The losses to be measured.
        device: Says its shapes, dtypes and kinds of torch.compile.
        peers: The losses of each peer that can be imported.
        wanted: The implementations that were asked for.
    """
    plain, *tuned = device.compile_modes
    adds: dict[str, Sequence[str]] = {
        "headlines": OURS,
        "compiled": [plain],
        "shapes": [*OURS, *peers],
        "peers": [*peers],
        "autotuned": tuned,
    }
    pick = all_others if name == "shapes" else headlines
    found = []
    for problem in pick(workloads, device):
        loss = problem.workload.name
        names = [x for x in adds[name] if x in wanted and loss in peers.get(x, [loss])]
        if names:
            found.append((problem, names))
    return found

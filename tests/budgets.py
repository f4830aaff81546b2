"""The counts that the kernels must keep to: python tests/budgets.py [--write] [LOSS ...]

Prints what differs from budgets.json, and exits with 1 if anything is worse than recorded there;
`--write` records the present counts. Instructions, special functions (mufu) and bytes are for each
element of the input that is trained, extra_memory is in times that input. Of two numbers the first
is of the forward, the second of forward and backward. A kernel that cannot keep the rules of
sass.complaints has its own under "rules", written by hand, with the reason; "spills" are those that
targets.py allows a kernel in some pair of dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from counts import FUSED, Case, Compiled, compiled, metered, resources, scaled_down

FILE = Path(__file__).with_suffix(".json")
LARGE = ("sm_80", "sm_90", "sm_100", "gfx942")
SMALL = ("sm_86", "sm_89", "sm_120")  # less shared memory, and fewer warps on a multiprocessor
TARGETS = (*LARGE, *SMALL)
VERSION = ".".join(triton.__version__.split(".")[:2])  # another one makes other instructions
SLACK = 0.05
LIMITS = ("registers", "shared_bytes", "spills", "warps_per_sm")
MORE_IS_BETTER = ("warps_per_sm", "tensor")

Tree = dict[str, Any]


def points(case: Case, target: str) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Yield every size in bfloat16, the longest and the shortest rows in float32 too.

    On small devices it is the first size, of the longest rows or the widest tiles.
    """
    sizes = case.family.compiled_sizes
    if target in SMALL:
        sizes = sizes[:1]
    yield from ((shape, torch.bfloat16) for shape in sizes)
    if target == "sm_90":
        yield from ((shape, torch.float32) for shape in (sizes[0], sizes[-1]))


def name_of(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def of_kernels(run: Compiled, target: str) -> Tree:
    """Return the kernels of a call by name, each specialisation once.

    On small devices it is what limits how many fit; instructions are almost those of others.
    """
    found = defaultdict(list)
    for launch in run.launches:
        counts = rounded(resources(launch, run.element_bytes))
        if target in SMALL:
            counts = {name: counts[name] for name in LIMITS}
        if counts not in found[launch.name]:
            found[launch.name].append(counts)
    return {f"{name} {i}": x for name in found for i, x in enumerate(found[name], 1)}


def of_call(run: Compiled) -> Tree:
    memory = [run.forward_bytes / run.trained_bytes, run.peak_bytes / run.trained_bytes]
    return rounded(dict(launches=[run.n_forward, len(run.launches)], extra_memory=memory))


def of_traffic(case: Case, shape: tuple[int, ...]) -> Tree:
    """Return the bytes asked for, and each counted once per launch, in the interpreter."""
    small, device = scaled_down(case, shape)
    with device:
        forward, backward, (_, gradient) = metered(case, small, torch.bfloat16)
    n = gradient.numel()
    return rounded(
        dict(
            launches=[len(forward.launches), len(forward.launches + backward.launches)],
            bytes=[forward.traffic / n, (forward.traffic + backward.traffic) / n],
            unique_bytes=[forward.floor / n, (forward.floor + backward.floor) / n],
        )
    )


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


class Change(NamedTuple):
    what: str
    recorded: float | None
    present: float | None

    @property
    def is_worse(self) -> bool:
        if self.recorded is None or self.present is None:  # nothing to be measured by
            return True
        if self.what.split()[-1] in MORE_IS_BETTER:
            return self.present < self.recorded * (1 - SLACK)
        return self.present > self.recorded * (1 + SLACK)

    @property
    def size(self) -> float:
        """Return the part by which it changed, infinite if that is no number."""
        if not self.recorded or self.present is None:
            return float("inf")
        return self.present / self.recorded - 1

    def __str__(self) -> str:
        numbers = f"{self.recorded} → {self.present}".replace("None", "nothing")
        by = "" if self.size == float("inf") else f" ({self.size:+.1%})"
        return f"{'WORSE ' if self.is_worse else ''}{self.what}: {numbers}{by}"


def changes(recorded: Tree, present: Tree) -> list[Change]:
    """Return the changes, the largest first."""
    before, now = flat(recorded), flat(present)
    found = [Change(what, before.get(what), now.get(what)) for what in {**before, **now}]
    found = [change for change in found if change.recorded != change.present]
    return sorted(found, key=lambda change: -abs(change.size))


def flat(tree: Any, path: str = "") -> dict[str, float]:
    """Return every number by the names that lead to it."""
    if isinstance(tree, dict):
        parts = [(f"{path} {name}".lstrip(), value) for name, value in tree.items()]
    elif isinstance(tree, list):
        parts = [(f"{path}[{i}]", value) for i, value in enumerate(tree)]
    else:
        return {path: tree}
    return {name: number for part in parts for name, number in flat(part[1], part[0]).items()}


def read() -> Tree:
    return json.loads(FILE.read_text())


def text(tree: Tree, indent: int = 0) -> str:
    """Return JSON, sorted, with what holds no further names on one line."""
    if not any(isinstance(value, dict) for value in tree.values()):
        return json.dumps(tree)
    lines = [
        " " * (indent + 1) + f"{json.dumps(name)}: "
        + (text(value, indent + 1) if isinstance(value, dict) else json.dumps(value))
        for name, value in sorted(tree.items())
    ]  # fmt: skip
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def count(*losses: str) -> Tree:
    """Count all that the file records of all losses or of these, by loss and by shape and dtype."""
    chosen = [case for case in FUSED if case.name in losses or not losses]
    # the interpreter decides at import: its part needs a process of its own
    interpreted = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--traffic", *losses],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
    )
    found: Tree = {case.name: defaultdict(dict) for case in chosen}
    for case in chosen:
        for target in TARGETS:
            for shape, dtype in points(case, target):
                run = compiled(case, shape, dtype, target)
                of_point = found[case.name][name_of(shape, dtype)]
                of_point[target] = of_kernels(run, target)
                if target == "sm_90":
                    of_point["call"] = of_call(run)
    output, _ = interpreted.communicate()
    for name, shapes in json.loads(output).items():
        for shape, traffic in shapes.items():
            found[name][shape]["traffic"] = traffic
    return found


def print_traffic(losses: list[str]) -> None:
    from interpreter import correct

    correct()
    found: Tree = {
        case.name: {
            name_of(shape, torch.bfloat16): of_traffic(case, shape)
            for shape in case.family.compiled_sizes
        }
        for case in FUSED
        if case.name in losses or not losses
    }
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the present counts")
    parser.add_argument("--traffic", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("losses", nargs="*", help="those that are counted; by default all")
    options = parser.parse_args()
    if options.traffic:
        print_traffic(options.losses)
        return 0
    record, present = read(), count(*options.losses)
    others = {
        name: x for name, x in record["counts"].items() if options.losses and name not in present
    }
    found = changes(record["counts"], {**others, **present})
    for change in found:
        print(change)
    n_worse = sum(change.is_worse for change in found)
    print(f"{len(found)} counts differ, {n_worse} for the worse", end="")
    print(f": recorded with Triton {record['triton']}, counted with {VERSION}")
    if options.write:
        FILE.write_text(text({**record, "triton": VERSION, "counts": {**others, **present}}) + "\n")
        return 0
    return 1 if n_worse else 0


if __name__ == "__main__":
    sys.exit(main())

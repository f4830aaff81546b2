"""Compile every loss in every pair of dtypes for every target, or some: --help says how to choose.

Prints which calls failed and why, which kernels spill registers, and a table: for each target the
losses, pairs of dtypes, calls, kernels and failures, and the seconds that they took. Exits with 1
if any call failed, or if a kernel spills more than budgets.json allows. A call is a loss with its
gradient, at one of the sizes where launch sites choose other code: each pair of dtypes meets
another size on each target, so that all together meet all. TF32 is allowed, as users allow it.

Equal dtypes come first, on all targets. A kernel that many calls launch is compiled once. With
`--record FILE` each call that passed leaves a line there, and the next run with this file goes on
with what is left. Lines of other sources or of another Triton do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import budgets
import torch
import triton
from counts import Case
from gate import DEVICES, Launch, capture
from sass import analyse, resources_of
from workloads import BOTH, WORKLOADS

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [*itertools.product(DTYPES, repeat=2)]  # of student and teacher
LOSSES = [workload for workload in WORKLOADS if workload.case.has_kernels] + BOTH
ALLOWED = {name: x["most"] for name, x in budgets.read()["spills"].items()}  # of a kernel
HAS_LINKER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # which gfx942 needs
TARGETS = [target for target in DEVICES if target != "gfx942" or HAS_LINKER]


class Call(NamedTuple):
    loss: Case
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]  # of student and teacher
    target: str

    @property
    def is_mixed(self) -> bool:
        return self.dtypes[0] != self.dtypes[1]

    def __str__(self) -> str:
        student, teacher = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        shape = "x".join(map(str, self.shape))
        return f"{self.loss.name} {shape} {student} {teacher} {self.target}"


def calls(loss: Case, target: str) -> Iterator[Call]:
    """Yield a call of the loss for each pair of dtypes, of mixed ones not on sm_86.

    The code for sm_86 is that for sm_89, but for how many programs fit.
    """
    sizes = loss.family.compiled_sizes or loss.family.sizes
    turn = [*DEVICES].index(target)
    is_one_network = len(_networks(loss.inputs(sizes[0], torch.float32, "meta"))) == 1
    for i, dtypes in enumerate(PAIRS):
        if dtypes[0] == dtypes[1] or not (is_one_network or target == "sm_86"):
            yield Call(loss, sizes[(i + turn) % len(sizes)], dtypes, target)


def _networks(inputs: list[torch.Tensor]) -> list[int]:
    """Return the places of the tensors that networks make, the student's in the first half."""
    return [i for i, x in enumerate(inputs) if x.is_floating_point() and x.ndim > 1]


CALLS = [call for loss in LOSSES for target in TARGETS for call in calls(loss, target)]


def compile_call(call: Call) -> list[Launch]:
    """Return what a call launches; raise if a kernel does not compile or does not fit."""
    inputs = call.loss.inputs(call.shape, call.dtypes[0], "meta")
    networks = _networks(inputs)
    for i in networks[len(networks) // 2 :]:
        inputs[i] = inputs[i].detach().to(call.dtypes[1]).requires_grad_(inputs[i].requires_grad)
    trained = [x for x in inputs if x.requires_grad]
    with capture(call.target) as launches, fastkd.backend("triton"), _tf32():
        torch.autograd.grad(call.loss.fastkd(*inputs), trained)
    return launches


def spills_of(launch: Launch) -> int:
    """Return the instructions, or on AMD the registers, that a kernel spills."""
    if "amdgcn" in launch.asm:
        return int(launch.asm["amdgcn"].split(".vgpr_spill_count:")[1].split()[0])
    return analyse(launch).spills if resources_of(launch.asm["cubin"])["STACK"] else 0


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Outcome(NamedTuple):
    """A call that was compiled, as a line of the record has it."""

    call: str
    kernels: dict[str, tuple[str, int]]  # name and spills, by Triton's hash
    failure: str
    seconds: float


def outcome_of(call: Call) -> Outcome:
    start, kernels, failure = time.perf_counter(), {}, ""
    try:
        launches = {x.kernel.hash: x for x in compile_call(call)}
        kernels = {name: (x.name, _spills(name, x)) for name, x in launches.items()}
    except Exception as error:
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"
    return Outcome(str(call), kernels, failure, round(time.perf_counter() - start, 2))


_counted: dict[str, int] = {}  # spills, by the hash of a kernel


def _spills(name: str, launch: Launch) -> int:
    if name not in _counted:
        _counted[name] = spills_of(launch)
    return _counted[name]


class Record:
    """The outcomes of calls that passed, in a file that a run which was cut off leaves."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.outcomes = file, {}
        if file is None:
            return
        lines = file.read_text().splitlines() if file.exists() else []
        if lines[:1] != [_of_this_code()]:
            lines = []
            file.write_text(_of_this_code() + "\n")
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # because the last line may be cut off
                outcome = Outcome(**json.loads(line))
                self.outcomes[outcome.call] = outcome

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.call] = outcome
        if self.file is not None and not outcome.failure:
            with self.file.open("a") as file:
                file.write(json.dumps(outcome._asdict()) + "\n")


def _of_this_code() -> str:
    """Return the first line of a record: Triton's version, and a hash of all that is compiled."""
    tests = Path(__file__).parent
    tree = tests.parent
    files = [x for name in ("fastkd", "kernels") for x in sorted((tree / name).glob("**/*.py"))]
    files += [tests / "gate.py", tests / "targets.py", *(tree / "benchmarks").glob("workload*.py")]
    code = b"".join(x.read_bytes() for x in files)
    return f"Triton {triton.__version__}, sources {hashlib.sha256(code).hexdigest()[:12]}"


def table(outcomes: list[tuple[Call, Outcome]]) -> str:
    """Return what was compiled, a line for each target."""
    rows = [["target", "losses", "pairs", "calls", "kernels", "spill", "failed", "seconds"]]
    for target in dict.fromkeys(call.target for call, _ in outcomes):
        of_target = [(call, found) for call, found in outcomes if call.target == target]
        kernels = {name: x for _, found in of_target for name, x in found.kernels.items()}
        counts = (
            len({call.loss.name for call, _ in of_target}),
            len({call.dtypes for call, _ in of_target}),
            len(of_target),
            len(kernels),
            sum(spills > ALLOWED.get(name, 0) for name, spills in kernels.values()),
            sum(bool(found.failure) for _, found in of_target),
            round(sum(found.seconds for _, found in of_target)),
        )
        rows.append([target, *map(str, counts)])
    return "\n".join(" ".join(f"{cell:>8}" for cell in row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, help="by default all")
    names = [loss.name for loss in LOSSES]
    parser.add_argument("--loss", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--dtypes", choices=("equal", "mixed"), help="of two networks; default: all"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="where to go on")
    arguments = parser.parse_args()
    warnings.simplefilter("error", UserWarning)  # as that of tiles which do not fit
    chosen = [
        call
        for is_mixed in (False, True)
        for target in arguments.targets
        for call in CALLS
        if (call.target, call.is_mixed) == (target, is_mixed)
        and call.loss.name in arguments.loss
        and arguments.dtypes in (None, "mixed" if is_mixed else "equal")
    ]
    record, outcomes, seen = Record(arguments.record), [], set()
    for call in chosen:
        if str(call) not in record.outcomes:
            record.add(outcome_of(call))
        found = record.outcomes[str(call)]
        outcomes.append((call, found))
        if found.failure:
            print(f"{call}: {found.failure}", flush=True)
        for name, (kernel, spills) in found.kernels.items():
            if spills and name not in seen:
                print(f"{call}: {kernel} spills {spills}", flush=True)
            seen.add(name)
    print(table(outcomes))
    kernels = [x for _, found in outcomes for x in found.kernels.values()]
    is_spilling = any(spills > ALLOWED.get(name, 0) for name, spills in kernels)
    return 1 if is_spilling or any(found.failure for _, found in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

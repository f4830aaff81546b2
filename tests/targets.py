"""Compile every loss in every pair of dtypes for every target, or some: --help says how to choose.

Prints for each target how many calls and kernels were compiled, which calls failed and why, and
which kernels spill registers; exits with 1 if any call failed. A call is a loss with its gradient,
at one of the sizes where launch sites choose other code: each pair of dtypes meets another size on
each target, so that all together meet all. TF32 is allowed, as users allow it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from counts import Case
from gate import DEVICES, Launch, capture
from sass import analyse, resources_of
from workloads import WORKLOADS

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [*itertools.product(DTYPES, repeat=2)]  # of student and teacher
LOSSES = [workload for workload in WORKLOADS if workload.case.has_kernels]
HAS_LINKER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)  # which gfx942 needs
TARGETS = [target for target in DEVICES if target != "gfx942" or HAS_LINKER]


class Call(NamedTuple):
    loss: Case
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]  # of student and teacher
    target: str

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, help="by default all")
    names = [loss.name for loss in LOSSES]
    parser.add_argument("--loss", nargs="+", choices=names, default=names, metavar="NAME")
    arguments = parser.parse_args()
    chosen = [call for call in CALLS if call.loss.name in arguments.loss]
    warnings.simplefilter("error", UserWarning)  # as that of tiles which do not fit
    n_failures = 0
    for target in arguments.targets:
        kernels, failures, n_calls = {}, [], 0
        for call in (call for call in chosen if call.target == target):
            n_calls += 1
            try:
                kernels |= {id(x.kernel): (x, call) for x in compile_call(call)}
            except Exception as error:
                failures.append(f"{call}: {type(error).__name__}: {str(error).splitlines()[-1]}")
        spilling = [(spills_of(x), x.name, call) for x, call in kernels.values()]
        spilling = [(n, name, call) for n, name, call in spilling if n]
        print(
            f"{target}: {n_calls} calls, {len(kernels)} kernels, {len(failures)} failures, "
            f"{len(spilling)} kernels spill",
            *failures,
            *(f"{call}: {name} spills {n}" for n, name, call in spilling),
            sep="\n  ",
            flush=True,
        )
        n_failures += len(failures)
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())

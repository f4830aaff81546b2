"""Lines and sectors that the kernels' loads and stores touch: python tests/traffic.py [LOSS ...]

Prints, for each kernel of forward and backward, the requests of a warp by width (bytes of a lane),
how many lines of 128 bytes and sectors of 32 each touches, and the part of its sectors' bytes that
it asks for. Few lines a request are what the load units want, full sectors what memory wants. The
figures are counted in compiled code of sm_90, for bfloat16 and sizes that the emulator runs in
seconds; they grow with the size, but those of a request do not.
"""

from __future__ import annotations

import argparse

import torch
from cases import LOSSES, Case
from ptx import Traffic
from ptx.triton_driver import emulated

import fastkd
from fastkd import _backend

SIZES = {"rows": ((4,), 8192), "pairs": ((256,), 64), "relations": ((128,), 64)}
SIZES["ensembles"] = SIZES["corrected"] = SIZES["peers"] = SIZES["rows"]
SIZES |= {"moments": ((8,), 256), "tokens": ((8,), 64)}


def traffic_of(case: Case, target: str = "sm_90") -> Traffic:
    """Return what forward and backward of a loss touch."""
    inputs = case.inputs(*SIZES[case.problem], torch.bfloat16)
    before = _backend._interpreted, _backend.interpreter_knows_bfloat16
    _backend._interpreted = _backend.interpreter_knows_bfloat16 = True  # tensors are on the CPU
    try:
        with emulated(target) as emulator, fastkd.backend("triton"):
            emulator.traffic = Traffic()
            torch.autograd.grad(case(*inputs).sum(), [x for x in inputs if x.requires_grad])
    finally:
        _backend._interpreted, _backend.interpreter_knows_bfloat16 = before
    return emulator.traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="*", help="all that have kernels, if none is named")
    parser.add_argument("--target", default="sm_90")
    arguments = parser.parse_args()
    for case in LOSSES:
        chosen = case.name in arguments.losses or not arguments.losses
        if chosen and case.has_kernels and case.problem in SIZES:
            examples, width = SIZES[case.problem]
            print(f"{case.id}, {examples[0]} x {width} bfloat16, {arguments.target}")
            print(traffic_of(case, arguments.target).table(), end="\n\n")


if __name__ == "__main__":
    main()

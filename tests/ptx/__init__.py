"""A processor for PTX in numpy: it runs what Triton, LLVM and NVPTX made of a kernel, on a CPU.

    with emulated("sm_90") as emulator:    # stands in for Triton's driver
        kernel[grid](*cpu_tensors)         # is compiled as for a GPU, and its PTX is executed
    emulator.problems                      # races, misaligned vectors, accesses outside, ...

All threads of many programs run together, in lockstep by the least program counter. Every
instruction declares the modifiers and operands that it takes: another one is refused when the PTX
is read, and never guessed. It needs numpy, and Triton for `emulated` alone.
"""

from .assembly import UnknownInstruction, parse
from .machine import Machine, Problem, launch
from .traffic import Traffic

__all__ = ["Machine", "Problem", "Traffic", "UnknownInstruction", "launch", "parse"]

"""The forms of instructions: which modifiers and operands each takes, and what executes it.

A form is a pattern such as `add[.rn][.ftz].f32`: what stands in [] may be absent, of (.a|.b) there
is one, and # is a number. What no pattern describes is refused when PTX is read. Beside it stand
the kinds of the operands, which may be absent if a ? follows:

    d       a register that is written          p       a predicate that is read
    s       a register or a number              i       a number
    {d} {s} several of them, in braces          [a]     an address
    d.. s.. one or several of them              label   a place in the code
    d|p     a register and a predicate that are written

A kind has the type of the form, its last one, or the one after a colon: s:u32.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

TYPES = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f32x2": np.uint64,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s8": np.int8, "u8": np.uint8,
    "b8": np.uint8, "pred": np.bool_,
}  # fmt: skip
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in TYPES.items()}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TWICE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Form:
    """The words of an instruction, `add`, `rn`, `f32`, and its type, the last one."""

    def __init__(self, text: str, words: tuple[str, ...]):
        self.text, self.words = text, words
        self.types = [word for word in words if word in TYPES]
        self.type = self.types[-1] if self.types else "b32"

    def has(self, word: str) -> bool:
        return word in self.words

    def number(self, letter: str) -> int:
        """Return the number after a letter: 4 of `.v4` or `.x4`; 1 where there is none."""
        found = [word[1:] for word in self.words if re.fullmatch(letter + r"\d+", word)]
        return int(found[0]) if found else 1


class Instruction(NamedTuple):
    """How the instructions of one pattern are read and executed."""

    pattern: re.Pattern
    kinds: tuple[str, ...]
    build: Callable[..., Callable]  # (form, *operands) -> (machine) -> None
    together: str  # who must arrive before it runs: "", "warp", "warp group" or "program"


INSTRUCTIONS: dict[str, list[Instruction]] = defaultdict(list)


def instruction(pattern: str, operands: str = "", together: str = "") -> Callable:
    """Register a function that reads a form with its operands and returns what executes it."""
    kinds = tuple(kind.strip() for kind in operands.split(",")) if operands else ()
    expression = pattern.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
    compiled = re.compile(expression.replace("#", r"\d+"))

    def register(build: Callable) -> Callable:
        choice = re.match(r"\(([\w|]+)\)", pattern)
        first = choice[1] if choice else re.match(r"\w+", pattern)[0]
        for opcode in first.split("|"):
            INSTRUCTIONS[opcode].append(Instruction(compiled, kinds, build, together))
        return build

    return register


@functools.cache
def known(opcode: str) -> tuple[Form, list[Instruction]]:
    """Return the form of an opcode, such as `add.rn.f32`, and the instructions that have it."""
    words = tuple(opcode.split("."))
    found = [each for each in INSTRUCTIONS.get(words[0], ()) if each.pattern.fullmatch(opcode)]
    return Form(opcode, words), found


def computes(pattern: str, operands: str) -> Callable:
    """Register a function of numpy arrays that returns what the first operand becomes.

    Where the form has `.ftz`, float32 numbers below the smallest normal one are 0, with their sign,
    before and after.
    """

    def register(function: Callable) -> Callable:
        @instruction(pattern, operands)
        def build(form: Form, destination: Any, *sources: Any) -> Callable:
            flushes = form.has("ftz")

            def execute(machine: Any) -> None:
                values = [source(machine) for source in sources]
                if flushes:
                    values = [flush(value) for value in values]
                result = function(form, *values)
                destination(machine, flush(result) if flushes else result)

            return execute

        return function

    return register


SMALLEST = np.finfo(np.float32).smallest_normal


def flush(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers with subnormal ones as 0 of their sign; other types as they are."""
    if values.dtype != np.float32:
        return values
    subnormal = np.abs(values) < SMALLEST
    return np.where(subnormal, np.copysign(np.float32(0), values), values)

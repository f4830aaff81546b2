"""Moves, loads, stores, copies in the background, and shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..forms import BITS, TYPES, Form, instruction
from .control import whole

MOVED = "(.pred|.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64|.f32|.f64)"
LOADED = "(.b8|.b16|.b32|.b64|.u8|.u16|.u32|.u64|.s8|.s16|.s32|.s64|.f32|.f64)"
# what tells the caches how long to keep a line changes no value
CACHED = (
    "[.ca|.cg|.cs|.lu|.cv][.L1::evict_last|.L1::evict_first|.L1::no_allocate|.L1::evict_normal]"
)
WRITTEN = "[.wb|.cg|.cs|.wt][.L1::evict_last|.L1::evict_first|.L1::no_allocate|.L1::evict_normal]"


@instruction("mov" + MOVED, "d, s")
def move(form: Form, destination: Any, source: Any) -> Any:
    return lambda machine: destination(machine, source(machine))


@instruction("mov(.b16|.b32|.b64)", "d, {s}:part")
def pack(form: Form, destination: Any, sources: list) -> Any:
    """Write the parts one beside the other, the first in the lowest bits."""
    dtype = TYPES[form.type]

    def execute(machine: Any) -> None:
        parts = [machine.spread(source(machine)) for source in sources]
        destination(machine, np.stack(parts, 1).view(dtype)[:, 0])

    return execute


@instruction("mov(.b16|.b32|.b64)", "{d}:part, s")
def unpack(form: Form, destinations: list, source: Any) -> Any:
    def execute(machine: Any) -> None:
        values = np.ascontiguousarray(machine.spread(source(machine)))
        part = BITS[values.dtype.itemsize // len(destinations)]
        parts = values.view(part).reshape(-1, len(destinations))
        for i, destination in enumerate(destinations):
            destination(machine, parts[:, i])

    return execute


@instruction("ld.param" + LOADED, "d, [a]")
def load_parameter(form: Form, destination: Any, address: Any) -> Any:
    if not address.parameter or address.offset:
        raise ValueError(f"got {address}, need a parameter as a whole")
    dtype = TYPES[form.type]

    def execute(machine: Any) -> None:
        value = machine.parameters[address.parameter]
        bits = np.atleast_1d(np.asarray(value)).view(np.uint8)[: np.dtype(dtype).itemsize]
        destination(machine, extended(bits.view(dtype)[0], destination))

    return execute


def extended(values: Any, destination: Any) -> Any:
    """Return signed numbers as wide as the register that takes them."""
    if values.dtype.kind == "i" and hasattr(destination, "size"):
        return values.astype(f"i{destination.size}")
    return values


@instruction("ld[.relaxed.gpu|.volatile].global" + CACHED + "[.v2|.v4]" + LOADED, "d.., [a]")
@instruction("ld.global.nc" + CACHED + "[.v2|.v4]" + LOADED, "d.., [a]")
def load(form: Form, destinations: list, address: Any) -> Any:
    n, dtype = elements(form, destinations), TYPES[form.type]
    width = np.dtype(dtype).itemsize

    def execute(machine: Any) -> None:
        addresses, marks = address(machine), machine.marks()
        words = machine.memory.access(addresses, width, n, marks)
        machine.count("load", machine.numbers(), addresses, width * n)
        for destination, word in zip(destinations, words, strict=True):
            destination(machine, extended(word.view(dtype), destination))

    return execute


@instruction("st[.relaxed.gpu|.volatile].global" + WRITTEN + "[.v2|.v4]" + LOADED, "[a], s..")
def store(form: Form, address: Any, sources: list) -> Any:
    n, width = elements(form, sources), np.dtype(TYPES[form.type]).itemsize

    def execute(machine: Any) -> None:
        addresses, marks = address(machine), machine.marks()
        data = [np.asarray(machine.spread(x(machine))).view(BITS[width]) for x in sources]
        machine.memory.access(addresses, width, n, marks, data)
        machine.count("store", machine.numbers(), addresses, width * n)

    return execute


@instruction("ld[.volatile].shared[::cta][.v2|.v4]" + LOADED, "d.., [a]")
def load_shared(form: Form, destinations: list, address: Any) -> Any:
    n, dtype = elements(form, destinations), TYPES[form.type]
    width = np.dtype(dtype).itemsize

    def execute(machine: Any) -> None:
        program = machine.of_lanes(machine.program)
        words = machine.shared.access(program, address(machine), width, n, machine.marks())
        for destination, word in zip(destinations, words, strict=True):
            destination(machine, extended(word.view(dtype), destination))

    return execute


@instruction("st[.volatile].shared[::cta][.v2|.v4]" + LOADED, "[a], s..")
def store_shared(form: Form, address: Any, sources: list) -> Any:
    n, width = elements(form, sources), np.dtype(TYPES[form.type]).itemsize

    def execute(machine: Any) -> None:
        data = [np.asarray(machine.spread(x(machine))).view(BITS[width]) for x in sources]
        machine.flight.store(machine.numbers(), address(machine), width, n, data)

    return execute


def elements(form: Form, operands: list) -> int:
    """Return how many elements a vector has; there is an operand for each."""
    n = form.number("v")
    if len(operands) != n:
        raise ValueError(f"got {len(operands)} operands, need {n} for {form.text}")
    return n


# ------------------------------------------------------------------------- copies in the background


@instruction("cp.async(.ca|.cg).shared[::cta].global", "[a], [a], i, s:u32?")
def copy(form: Form, target: Any, source: Any, n_bytes: int, *present: Any) -> Any:
    """Begin to copy; where a fourth operand says 0 bytes, begin to write zeros."""

    def execute(machine: Any) -> None:
        lanes, targets, sources = machine.numbers(), target(machine), source(machine)
        zeros = np.zeros(machine.n, bool)
        if present:
            given = machine.spread(present[0](machine))
            if ((given != 0) & (given != n_bytes)).any():
                raise ValueError(f"got a copy of a part of {n_bytes} bytes, need all or none")
            zeros = given == 0
        nobody_knows = [np.full(machine.n, 0xFFFFFFFF, np.uint32)] * (n_bytes // 4)
        machine.flight.store(lanes, targets, 4, n_bytes // 4, nobody_knows)
        machine.flight.begin_copy(lanes, targets, sources, n_bytes, zeros)

    return execute


@instruction("cp.async.commit_group")
def commit_copies(form: Form) -> Any:
    def execute(machine: Any) -> None:
        machine.flight.n_copies[machine.numbers()] += 1

    return execute


@instruction("cp.async.wait_group", "i")
def wait_for_copies(form: Form, most: int) -> Any:
    return lambda machine: machine.flight.wait_for_copies(most)


@instruction("cp.async.wait_all")
def wait_for_all_copies(form: Form) -> Any:
    def execute(machine: Any) -> None:
        commit_copies(form)(machine)
        machine.flight.wait_for_copies(0)

    return execute


# ---------------------------------------------------------------------- exchanges of a warp's lanes


@instruction("shfl.sync(.bfly|.up|.down|.idx).b32", "d, s, s:u32, i, i", together="warp")
def shuffle(form: Form, destination: Any, source: Any, by: Any, clamp: int, mask: int) -> Any:
    """Exchange a register among the lanes of a warp, or of segments of it, as `clamp` says."""
    if mask % (1 << 32) != 0xFFFFFFFF:
        raise ValueError(f"got the lanes {mask:#x}, need a whole warp")
    mode = form.words[2]
    segment, bound = clamp >> 8 & 31, clamp & 31

    def execute(machine: Any) -> None:
        whole(machine, 32)
        values = machine.everywhere(source(machine))
        lane = machine.of_lanes(machine.thread) % 32
        amount = np.asarray(by(machine)).astype(np.int64) & 31
        last = (lane & segment) | (bound & ~segment)
        first = lane & segment
        if mode == "up":
            other, inside = lane - amount, lane - amount >= last
        elif mode == "down":
            other, inside = lane + amount, lane + amount <= last
        elif mode == "bfly":
            other, inside = lane ^ amount, (lane ^ amount) <= last
        else:
            other = first | (amount & ~segment)
            inside = other <= last
        chosen = np.where(inside, other, lane)
        destination(machine, values[machine.numbers() - lane + chosen])

    return execute


@instruction("redux.sync(.max|.min)[.abs][.NaN].f32", "d, s, s:u32", together="warp")
@instruction("redux.sync(.add|.max|.min)(.s32|.u32)", "d, s, s:u32", together="warp")
@instruction("redux.sync(.and|.or|.xor).b32", "d, s, s:u32", together="warp")
def reduce(form: Form, destination: Any, source: Any, mask: Any) -> Any:
    """Write to every lane what the numbers of its warp make together."""
    number = form.type == "f32"
    functions = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "max": np.fmax if number and not form.has("NaN") else np.maximum,
        "min": np.fmin if number and not form.has("NaN") else np.minimum,
    }  # fmt: skip
    function = functions[form.words[2]]

    def execute(machine: Any) -> None:
        whole(machine, 32)
        if (np.asarray(mask(machine)) != np.uint32(0xFFFFFFFF)).any():
            raise ValueError("got a part of a warp, need all of it")
        values = machine.spread(source(machine)).reshape(-1, 32)
        if form.has("abs"):
            values = np.abs(values)
        destination(machine, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), 32))

    return execute


@instruction("griddepcontrol(.wait|.launch_dependents)")
def dependent_launch(form: Form) -> Any:
    """Do nothing, because launches follow one another here."""
    return lambda machine: None

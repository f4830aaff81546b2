"""Matrices of a warp: loads and stores of 8 x 8 halves, and products."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..forms import Form, instruction
from .control import whole
from .conversions import from_bfloat16

U16, U32, F16, F32, F64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4  # of a lane in a matrix of 8 rows with 4 pairs each


def halves(registers: np.ndarray) -> np.ndarray:
    """Return the two halves of registers [..., n] as [..., n, 2], the lower one first."""
    return np.ascontiguousarray(registers)[..., None].view(U16)


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return what the tensor cores take the bits for, in float64; of TF32 13 bits are not read."""
    if kind == "tf32":
        return (bits.view(U32) & U32(0xFFFFE000)).view(F32).astype(F64)
    return (from_bfloat16(bits) if kind == "bf16" else bits.view(F16)).astype(F64)


def rows_of_warps(machine: Any, address: Any, n: int) -> np.ndarray:
    """Return where the n x 8 rows of each warp lie among the bytes, [warps, n, 8].

    Lanes 8 i to 8 i + 7 hold the addresses of matrix i; each row has 16 bytes.
    """
    whole(machine, 32)
    addresses = address(machine)
    warps = addresses.reshape(-1, 32)[:, : 8 * n]
    if (warps % 16).any():
        machine.report("misaligned row of a matrix in shared memory")
    program = machine.of_lanes(machine.program).reshape(-1, 32)[:, : 8 * n]
    places = machine.shared.places(program.ravel(), warps.ravel(), 16)
    return places.reshape(-1, n, 8)


@instruction(
    "ldmatrix.sync.aligned.m8n8(.x1|.x2|.x4)[.trans].shared[::cta].b16", "{d}:b32, [a]", "warp"
)
def load_matrices(form: Form, destinations: list, address: Any) -> Any:
    n = form.number("x")

    def execute(machine: Any) -> None:
        rows = rows_of_warps(machine, address, n)
        watch_rows(machine, rows, write=False)
        matrices = machine.shared.bytes.view(U16)[rows[..., None] // 2 + np.arange(8)]
        if form.has("trans"):
            matrices = matrices.swapaxes(2, 3)
        for i, destination in enumerate(destinations):
            pairs = matrices[:, i].reshape(-1, 8, 4, 2)[:, ROW, PAIR]  # [warps, 32, 2]
            destination(machine, np.ascontiguousarray(pairs).view(U32).ravel())

    return execute


@instruction(
    "stmatrix.sync.aligned.m8n8(.x1|.x2|.x4)[.trans].shared[::cta].b16", "[a], {s}:b32", "warp"
)
def store_matrices(form: Form, address: Any, sources: list) -> Any:
    n = form.number("x")

    def execute(machine: Any) -> None:
        rows = rows_of_warps(machine, address, n)
        matrices = np.zeros((len(rows), n, 8, 8), U16)
        for i, source in enumerate(sources):
            pairs = halves(machine.spread(source(machine)).reshape(-1, 32))
            matrices[:, i, ROW, 2 * PAIR], matrices[:, i, ROW, 2 * PAIR + 1] = (
                pairs[..., 0],
                pairs[..., 1],
            )
        if form.has("trans"):
            matrices = matrices.swapaxes(2, 3)
        watch_rows(machine, rows, write=True)
        machine.shared.bytes.view(U16)[rows[..., None] // 2 + np.arange(8)] = matrices

    return execute


def watch_rows(machine: Any, rows: np.ndarray, write: bool) -> None:
    """Note that each warp touches its rows [warps, n, 8]."""
    marks = np.repeat(machine.marks().reshape(-1, 32)[:, 0], rows[0].size)
    units = machine.shared.units(rows.ravel(), 16)
    if write:
        machine.flight.note_write(units)
        machine.shared.watch.write(units, marks)
    else:
        machine.shared.watch.read(units, marks)


# ----------------------------------------------------------------------------------------- products
# where the registers of a lane lie in a matrix: (row, column) for each register, or pair of halves

ACCUMULATORS = [(ROW, 2 * PAIR), (ROW, 2 * PAIR + 1), (ROW + 8, 2 * PAIR), (ROW + 8, 2 * PAIR + 1)]


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "{d}:f32, {s}:b32, {s}:b32, {s}:f32",
    "warp",
)
@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "{d}:f32, {s}:b32, {s}:b32, {s}:f32",
    "warp",
)
@instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32(.bf16.bf16|.f16.f16|.tf32.tf32).f32",
    "{d}:f32, {s}:b32, {s}:b32, {s}:f32",
    "warp",
)
@instruction(
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32",
    "{d}:f32, {s}:b32, {s}:b32, {s}:f32",
    "warp",
)
def multiply(form: Form, destinations: list, left: list, right: list, addends: list) -> Any:
    """Compute A B + C of a warp, summed in float64 and rounded once."""
    depth, kind = (
        int(form.words[3].split("k")[1]),
        form.types[1] if "tf32" not in form.words else "tf32",
    )
    per = 1 if kind == "tf32" else 2  # numbers in a register
    if len(left) * 32 * per != 16 * depth or len(right) * 32 * per != 8 * depth:
        raise ValueError(f"got {len(left)} and {len(right)} registers for {form.text}")

    def execute(machine: Any) -> None:
        whole(machine, 32)

        def registers(sources: list) -> list:
            return [machine.spread(x(machine)).reshape(-1, 32) for x in sources]

        n_warps = machine.n // 32
        a, b = np.zeros((n_warps, 16, depth)), np.zeros((n_warps, depth, 8))
        for i, bits in enumerate(registers(left)):
            row, first = ROW + 8 * (i % 2), 4 * per * (i // 2) + per * PAIR
            for j, part in enumerate(parts(bits, per)):
                a[:, row, first + j] = numbers(part, kind)
        for i, bits in enumerate(registers(right)):
            for j, part in enumerate(parts(bits, per)):
                b[:, 4 * per * i + per * PAIR + j, ROW] = numbers(part, kind)
        c = np.zeros((n_warps, 16, 8))
        for place, values in zip(ACCUMULATORS, registers(addends), strict=True):
            c[:, place[0], place[1]] = values
        result = (a @ b + c).astype(F32)
        for place, destination in zip(ACCUMULATORS, destinations, strict=True):
            destination(machine, result[:, place[0], place[1]].ravel())

    return execute


def parts(registers: np.ndarray, n: int) -> list:
    """Return the numbers of registers: n arrays of their shape."""
    if n == 1:
        return [registers]
    both = halves(registers)
    return [np.ascontiguousarray(both[..., i]) for i in range(2)]

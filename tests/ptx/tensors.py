"""The tensor memory of programs, and the barriers that products arrive at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine

ROWS, COLUMNS = 128, 512


class Begun(NamedTuple):
    """A product in flight: which columns it writes, and which units of shared memory it reads."""

    columns: range
    half: int  # 0 or 1 of the 32 rows of a warp, or 2 for both
    units: np.ndarray


class TensorMemory:
    """Words of 32 bits in 128 rows and 512 columns for each program."""

    def __init__(self, machine: Machine, n_programs: int):
        self.machine = machine
        self.words = np.full((n_programs, ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.used = np.zeros(n_programs, np.int64)
        self.phases: dict[tuple[int, int], int] = {}  # of barriers, by program and address
        self.begun: dict[int, list[Begun]] = {}  # by program, those not committed
        self.flying: dict[tuple[int, int], list[Begun]] = {}  # by barrier

    def allocate(self, programs: np.ndarray, n_columns: int) -> np.ndarray:
        first = self.used[programs].copy()
        self.used[programs] += n_columns
        if (self.used > COLUMNS).any():
            self.machine.report("more tensor memory is asked for than there is")
        return first

    def free(self, programs: np.ndarray, n_columns: int) -> None:
        self.used[programs] -= n_columns

    def check(self, programs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """Report columns [lanes, n] that are not reserved, and those of a product in flight."""
        if (columns >= self.used[programs][:, None]).any():
            self.machine.report("columns of tensor memory that are not reserved")
        flying = [(key[0], begun) for key, each in self.flying.items() for begun in each]
        flying += [(program, begun) for program, each in self.begun.items() for begun in each]
        for program, begun in flying:
            same_rows = (begun.half == 2) | (rows % 32 // 16 == begun.half)
            mine = columns[(programs == program) & same_rows]
            if ((mine >= begun.columns.start) & (mine < begun.columns.stop)).any():
                self.machine.report("tensor memory is touched that a product in flight writes")

    def begin(
        self, programs: np.ndarray, addresses: np.ndarray, m: int, n: int, units: list
    ) -> None:
        """Note products [m, n] of programs, to these addresses, that read these units."""
        for program, address, read in zip(
            programs.tolist(), addresses.tolist(), units, strict=True
        ):
            first, half = address & 0xFFFF, 2 if m == ROWS else (address >> 16) % 32 // 16
            begun = Begun(range(first, first + n), half, read)
            self.begun.setdefault(program, []).append(begun)
            self.machine.flight.read_by_products[read] += 1

    def commit(self, programs: np.ndarray, addresses: np.ndarray) -> None:
        for key in zip(programs.tolist(), addresses.tolist(), strict=True):
            self.flying.setdefault(key, []).extend(self.begun.pop(key[0], []))
            if key not in self.phases:
                self.machine.report("a barrier is arrived at before it is begun")
            self.phases[key] = self.phases.get(key, 0) + 1

    def begin_barriers(self, programs: np.ndarray, addresses: np.ndarray) -> None:
        for key in zip(programs.tolist(), addresses.tolist(), strict=True):
            self.phases[key] = 0

    def ended(self, programs: np.ndarray, addresses: np.ndarray, parity: np.ndarray) -> np.ndarray:
        """Return whether each barrier's phase of a parity has ended; who waited may go on."""
        keys = [*zip(programs.tolist(), addresses.tolist(), strict=True)]
        done = np.array([self.phases[key] % 2 for key in keys]) != parity
        for key in {key for key, each in zip(keys, done, strict=True) if each}:
            for begun in self.flying.pop(key, []):
                self.machine.flight.read_by_products[begun.units] -= 1
        return done

    def finish(self) -> None:
        if self.begun or any(self.flying.values()):
            self.machine.report("a product is never waited for")
        if self.used.any():
            self.machine.report("tensor memory is not given back")

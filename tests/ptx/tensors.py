"""The tensor memory of programs, and the barriers that products arrive at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine

ROWS, COLUMNS = 128, 512

Barrier = tuple[int, int]  # program and address


class Begun(NamedTuple):
    """A product in flight: which columns it writes, and which units of shared memory it reads."""

    columns: range
    half: int  # 0 or 1 of the 32 rows of a warp, or 2 for both
    units: np.ndarray


class TensorMemory:
    """Words of 32 bits in 128 rows and 512 columns for each program.

    The products that a thread commits arrive at their barrier when somebody waits there for the
    first time, and never before: that try fails. They stay in flight until a later one succeeds.
    """

    def __init__(self, machine: Machine, n_programs: int):
        self.machine = machine
        self.words = np.full((n_programs, ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.reserved = np.zeros((n_programs, COLUMNS), bool)
        self.phases: dict[Barrier, int] = {}
        self.begun: dict[int, list[Begun]] = {}  # by program, those not committed
        self.committed: dict[Barrier, list[list[Begun]]] = {}
        self.arrived: dict[Barrier, list[Begun]] = {}  # which nobody knows yet
        self.moved = False  # since those who wait in vain were last woken
        warps = n_programs, -(-machine.threads // 32)
        self.loading, self.storing = np.zeros(warps, bool), np.zeros(warps, bool)
        self.touched = np.full(warps, -1, np.int64)  # the latest epoch of a load or store

    # ------------------------------------------------------------------------------------- columns

    def allocate(self, programs: np.ndarray, n_columns: int) -> np.ndarray:
        """Reserve columns for each of these programs, and return the first ones."""
        firsts = np.zeros(len(programs), np.int64)
        for i, program in enumerate(programs):
            taken = self.reserved[program].reshape(-1, n_columns).any(1)
            if taken.all():
                self.machine.report("more tensor memory is asked for than there is")
            firsts[i] = taken.argmin() * n_columns
            self.reserved[program, firsts[i] : firsts[i] + n_columns] = True
        return firsts

    def free(self, programs: np.ndarray, firsts: np.ndarray, n_columns: int) -> None:
        for program, first in zip(programs, firsts, strict=True):
            columns = self.reserved[program, first : first + n_columns]
            if len(columns) < n_columns or not columns.all():
                self.machine.report("tensor memory is given back that is not reserved")
            columns[:] = False

    def check(self, programs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """Report columns [lanes, n] that are not reserved, and those of a product in flight."""
        self._check_reserved(programs, columns)
        flying = [(program, each) for program, some in self.begun.items() for each in some]
        for (program, _), groups in self.committed.items():
            flying += [(program, each) for group in groups for each in group]
        flying += [(key[0], each) for key, some in self.arrived.items() for each in some]
        for program, begun in flying:
            same_rows = (begun.half == 2) | (rows % 32 // 16 == begun.half)
            mine = columns[(programs == program) & same_rows]
            if ((mine >= begun.columns.start) & (mine < begun.columns.stop)).any():
                self.machine.report("tensor memory is touched that a product in flight writes")

    def _check_reserved(self, programs: np.ndarray, columns: np.ndarray) -> None:
        inside = np.minimum(columns, COLUMNS - 1)
        if ((columns >= COLUMNS) | ~self.reserved[programs[:, None], inside]).any():
            self.machine.report("columns of tensor memory that are not reserved")

    def load(self, registers: frozenset[int]) -> None:
        """Note that the active lanes' warps load into registers."""
        warps = self._warps()
        if self.storing[warps].any():
            self.machine.report("tensor memory is loaded before tcgen05.wait::st")
        self.loading[warps] = True
        self.machine.flight.registers |= registers
        self.touched[warps] = self.machine.epoch[warps[0]]

    def store(self) -> None:
        warps = self._warps()
        self.storing[warps] = True
        self.touched[warps] = self.machine.epoch[warps[0]]

    def wait_for_loads(self) -> None:
        self.loading[self._warps()] = False
        if not self.loading.any():
            self.machine.flight.registers = frozenset()

    def wait_for_stores(self) -> None:
        self.storing[self._warps()] = False

    def is_loading(self) -> bool:
        """Return whether a warp of the active lanes has not waited for its loads."""
        return bool(self.loading[self._warps()].any())

    def _warps(self) -> tuple[np.ndarray, np.ndarray]:
        lanes = self.machine.numbers()
        return self.machine.program[lanes], self.machine.warp[lanes]

    # ------------------------------------------------------------------------------------ products

    def begin(
        self, programs: np.ndarray, addresses: np.ndarray, m: int, n: int, units: list
    ) -> None:
        """Note products [m, n] of programs, to these addresses, that read these units."""
        machine = self.machine
        self._check_reserved(
            programs, (addresses.astype(np.int64) & 0xFFFF)[:, None] + np.arange(n)
        )
        if self.storing[programs].any():
            machine.report("a product begins before tcgen05.wait::st")
        others = np.arange(self.touched.shape[1]) != machine.warp[machine.numbers()][:, None]
        if (others & (self.touched[programs] == machine.epoch[programs][:, None])).any():
            machine.report("a product begins where another warp touches, without a barrier")
        for program, address, read in zip(
            programs.tolist(), addresses.tolist(), units, strict=True
        ):
            first, half = address & 0xFFFF, 2 if m == ROWS else (address >> 16) % 32 // 16
            begun = Begun(range(first, first + n), half, read)
            self.begun.setdefault(program, []).append(begun)
            machine.flight.read_by_products[read] += 1

    def commit(self, programs: np.ndarray, addresses: np.ndarray) -> None:
        """Let products arrive at barriers."""
        for key in self._barriers(programs, addresses):
            self.committed.setdefault(key, []).append(self.begun.pop(key[0], []))
            self.moved = True

    # ------------------------------------------------------------------------------------ barriers

    def begin_barriers(self, programs: np.ndarray, addresses: np.ndarray) -> None:
        for key in zip(programs.tolist(), addresses.tolist(), strict=True):
            self.phases[key] = 0

    def end_barriers(self, programs: np.ndarray, addresses: np.ndarray) -> None:
        for key in self._barriers(programs, addresses):
            if self.committed.get(key):
                self.machine.report("a barrier ends before the products that arrive at it")
            del self.phases[key]

    def _barriers(self, programs: np.ndarray, addresses: np.ndarray) -> list[Barrier]:
        """Return the barriers of lanes, and report those that have not begun."""
        keys = [*zip(programs.tolist(), addresses.tolist(), strict=True)]
        for key in keys:
            if key not in self.phases:
                self.machine.report("a barrier is used that has not begun")
                self.phases[key] = 0
        return keys

    def ended(self, programs: np.ndarray, addresses: np.ndarray, parity: np.ndarray) -> np.ndarray:
        """Return whether each barrier's phase of a parity has ended; who waited may go on."""
        keys = self._barriers(programs, addresses)
        done = np.array([self.phases[key] % 2 for key in keys]) != parity
        for key, ends in {*zip(keys, done.tolist(), strict=True)}:
            if ends:
                for begun in self.arrived.pop(key, []):
                    self.machine.flight.read_by_products[begun.units] -= 1
            elif self.committed.get(key):
                self.arrived.setdefault(key, []).extend(self.committed[key].pop(0))
                self.phases[key] += 1
                self.moved = True
        return done

    def finish(self) -> None:
        if self.begun or any(self.committed.values()) or any(self.arrived.values()):
            self.machine.report("a product is never waited for")
        if self.reserved.any():
            self.machine.report("tensor memory is not given back")

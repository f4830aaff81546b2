"""The machine: registers of all threads, and which of them run next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .assembly import SPECIALS, Kernel, Statement, parse
from .asynchrony import Asynchrony
from .forms import BITS, SIZES, TYPES
from .memory import EPOCH, PROGRAM, GlobalMemory, SharedMemory
from .tensors import TensorMemory
from .traffic import Traffic

MOST_LANES = 8192  # threads that run together; malloc maps larger arrays anew each time
MOST_SHARED_BYTES = 1 << 23  # of the programs that run together
MOST_STEPS = 5_000_000  # of one batch of programs: more is a loop without end
UNITS = {"warp": 32, "warp group": 128}


class Problem(NamedTuple):
    """A fault of a kernel, with the first statement that shows it."""

    kernel: str
    kind: str
    statement: str
    where: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.kernel}: {self.kind}{detail}: `{self.statement}` {self.where}"


@dataclass
class Launched:
    """The result of a launch."""

    kernel: str
    grid: tuple[int, int, int]
    instructions: int = 0  # each counted once, however many threads it has
    problems: list[Problem] = field(default_factory=list)


class Machine:
    """Runs the programs of one launch, in batches and in an order of chance."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        threads: int,
        parameters: dict[str, Any],  # by name: the bits
        memory: dict[int, tuple[str, int]],  # by address: name and size
        shared_bytes: int = 0,
        traffic: Traffic | None = None,
        copies_need_fence: bool = True,
    ):
        self.copies_need_fence = copies_need_fence
        self.kernel, self.threads, self.parameters = kernel, threads, parameters
        self.grid = (*map(int, grid), 1, 1)[:3]
        self.traffic = traffic
        self.shared_bytes = max(shared_bytes, kernel.shared_bytes)
        self.result = Launched(kernel.name, self.grid)
        self.seen: set[tuple[str, str]] = set()
        self.statement: Statement = kernel.code[0]
        unit = {space: narrowest(kernel, space) for space in ("global", "shared")}
        self.unit = unit["shared"]
        self.memory = GlobalMemory(memory, unit["global"], self.report)

    def report(self, kind: str, detail: str = "") -> None:
        """Note a problem, once for each kind and statement."""
        statement = self.statement
        if (kind, statement.text) not in self.seen:
            self.seen.add((kind, statement.text))
            found = Problem(self.kernel.name, kind, statement.text, statement.where, detail)
            self.result.problems.append(found)

    def run(self, generator: np.random.Generator) -> Launched:
        """Run every program."""
        x, y, z = self.grid
        chosen = generator.permutation(x * y * z)
        most = MOST_LANES // (4 if self.kernel.uses("tcgen05") else 1)  # for their tensor memory
        together = min(
            most // self.threads, MOST_SHARED_BYTES // max(self.shared_bytes, 1), len(chosen)
        )
        with np.errstate(all="ignore"):
            for first in range(0, len(chosen), max(1, together)):
                self._start(chosen[first : first + max(1, together)])
                self._run()
        # they hold the machine, and with it each other until Python looks for such circles
        del self.memory, self.shared, self.flight, self.registers
        return self.result

    def _start(self, programs: np.ndarray) -> None:
        threads, n = self.threads, len(programs)
        self.n_lanes = n * threads
        self.program = np.repeat(np.arange(n), threads)
        self.thread = np.tile(np.arange(threads), n)
        self.warp = self.thread // 32
        self.programs = programs
        self.epoch = np.zeros(n, np.int64)
        self.shared = SharedMemory(n, self.shared_bytes, self.unit, self.report)
        self.flight = Asynchrony(self)
        self.tensors = TensorMemory(self, n if self.kernel.uses("tcgen05") else 0)
        self.asleep = np.zeros(self.n_lanes, bool)
        self.some_sleep = False
        self.lanes: np.ndarray | None = None  # the active ones; None stands for all
        self.n = self.n_lanes
        self.registers: list[Any] = [None] * len(self.kernel.registers)
        index = programs.astype(np.uint32)
        x, y, _ = map(np.uint32, self.grid)
        of_program = {"x": index % x, "y": index // x % y, "z": index // (x * y)}
        zero = np.zeros(self.n_lanes, np.uint32)
        for axis, size in zip("xyz", self.grid, strict=True):
            first = axis == "x"
            self._set(f"%tid.{axis}", self.thread if first else zero)
            self._set(f"%ntid.{axis}", zero + (threads if first else 1))
            self._set(f"%ctaid.{axis}", of_program[axis][self.program])
            self._set(f"%nctaid.{axis}", zero + size)
        self._set("%laneid", self.thread % 32)
        self._set("%warpid", self.warp)

    def _set(self, name: str, values: np.ndarray) -> None:
        self.registers[SPECIALS.index(name)] = values.astype(np.uint32)

    # ---------------------------------------------------------------------------------- registers

    def read(self, slot: int) -> np.ndarray:
        """Return the bits of a register, of the active lanes; they may not be changed."""
        values = self.registers[slot]
        if values is None:
            return self._unwritten(slot)
        return values if self.lanes is None else values[self.lanes]

    def _unwritten(self, slot: int) -> np.ndarray:
        """Return NaN for a register that is only moved: compilers pack halves that nobody reads."""
        name, kind = self.kernel.registers[slot], self.kernel.kinds[slot]
        if self.statement.opcode != "mov" or kind == "pred":
            raise RuntimeError(f"{name} was never written")
        return np.full(self.n, -1, np.int64).astype(BITS[SIZES[kind]])

    def write(self, slot: int, values: np.ndarray) -> None:
        if self.lanes is None:
            self.registers[slot] = self.spread(values)
            return
        present = self.registers[slot]
        new = np.zeros(self.n_lanes, values.dtype) if present is None else present.copy()
        new[self.lanes] = values
        self.registers[slot] = new

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return a number for each active lane."""
        return values if np.ndim(values) else np.full(self.n, values)

    def of_lanes(self, values: np.ndarray) -> np.ndarray:
        """Return those of the active lanes."""
        return values if self.lanes is None else values[self.lanes]

    def everywhere(self, values: np.ndarray) -> np.ndarray:
        """Return an array of all lanes with these numbers of the active ones, and zeros."""
        values = self.spread(values)
        if self.lanes is None:
            return values
        result = np.zeros(self.n_lanes, values.dtype)
        result[self.lanes] = values
        return result

    def numbers(self) -> np.ndarray:
        """Return the numbers of the active lanes."""
        return np.arange(self.n_lanes) if self.lanes is None else self.lanes

    def count(self, kind: str, lanes: np.ndarray, addresses: np.ndarray, n_bytes: int) -> None:
        """Count a load or store of so many bytes by each of these lanes, if anybody wants it."""
        if self.traffic is not None:
            warps = self.program[lanes] * -(-self.threads // 32) + self.warp[lanes]
            self.traffic.record(self.kernel.name, kind, warps, addresses, n_bytes)

    def marks(self, lanes: np.ndarray | None = None) -> np.ndarray:
        """Return who the active lanes, or these, are: program, epoch and warp."""
        chosen = slice(None) if lanes is None and self.lanes is None else lanes
        chosen = self.lanes if chosen is None else chosen
        program = self.program[chosen]
        who = self.programs[program].astype(np.int64) << PROGRAM
        return who | self.epoch[program] << EPOCH | self.warp[chosen]

    # ----------------------------------------------------------------------------------- schedule

    def _run(self) -> None:
        """Run a batch of programs until all have returned.

        While all threads are at one place, `place` alone says where; when they part, each has its
        own, and those that are least far go on until they meet. Who waits in a loop for a barrier
        of products would be least far for ever: it sleeps until nobody else can go on.
        """
        code, end = self.kernel.code, len(self.kernel.code)
        everyone = np.arange(self.n_lanes)
        place, places = 0, np.zeros(self.n_lanes, np.int64)
        alive, waiting = np.ones(self.n_lanes, bool), np.zeros(self.n_lanes, bool)
        together, active = True, everyone
        steps = 0
        while True:
            steps += 1
            if steps > MOST_STEPS:
                self.report("a loop without end, or threads that wait for what never comes")
                break
            if not together:
                if not alive.any():
                    break
                ready = alive & ~waiting & ~self.asleep
                if not ready.any():
                    if self.tensors.moved:
                        self.wake()
                        continue
                    awaited = "a barrier at which no product arrives"
                    others = awaited if self.some_sleep else "others at different barriers"
                    self.report(f"deadlock: threads wait for {others}")
                    break
                place = int(places[ready].min())
                active = np.flatnonzero(ready & (places == place))
                if len(active) == np.count_nonzero(alive):
                    together = len(active) == self.n_lanes
                elif place < end and code[place].together:
                    waiting[active] = True
                    here = waiting & (places == place)
                    active = self._complete(here, alive, code[place].together)
                    if not len(active):
                        continue
                    waiting[active] = False
            if place >= end:
                break
            statement = self.statement = code[place]
            self.result.instructions += 1
            lanes = active
            if statement.guard is not None:
                self.lanes = None if together else active
                takes = self.read(statement.guard)
                lanes = active[~takes if statement.negated else takes]
            some = len(lanes) > 0
            if statement.opcode in ("bra", "ret", "exit"):
                if statement.opcode == "bra":
                    if len(lanes) == len(active):
                        place, following = statement.target, None
                    else:
                        following = statement.target if some else None
                        place += 1
                    if following is None:
                        if not together:
                            places[active] = place
                    else:
                        places[active] = place
                        places[lanes] = following
                        together = False
                    continue
                if len(lanes) == len(active) and together:
                    break
                alive[lanes] = False
                places[active] = place + 1
                together = together and not some
                place += 1
                continue
            if some:
                self.lanes = None if len(lanes) == self.n_lanes else lanes
                self.n = len(lanes)
                self._step(statement)
                together = together and not self.some_sleep
            place += 1
            if not together:
                places[active] = place
        self.flight.finish()
        self.tensors.finish()

    def sleep(self, lanes: np.ndarray) -> None:
        """Let others go on before these lanes, which have waited in vain."""
        self.asleep[lanes] = True
        self.some_sleep |= len(lanes) > 0

    def wake(self) -> None:
        """Let those who sleep look again, because a product or a barrier has gone on."""
        self.asleep[:] = False
        self.some_sleep = self.tensors.moved = False

    def _complete(self, here: np.ndarray, alive: np.ndarray, together: str) -> np.ndarray:
        """Return the lanes that are here with all others of their warp, warp group or program."""
        size = UNITS.get(together, self.threads)
        groups = self.program * -(-self.threads // size) + self.thread // size
        n = int(groups.max()) + 1
        arrived = np.bincount(groups[here & alive], minlength=n)
        full = (arrived == np.bincount(groups[alive], minlength=n)) & (arrived > 0)
        return np.flatnonzero(here & alive & full[groups])

    def _step(self, statement: Statement) -> None:
        flight = self.flight
        if flight.registers and not flight.registers.isdisjoint(statement.registers):
            flight.touched(statement)
        try:
            statement.execute(self)
        except Exception as error:
            raise RuntimeError(
                f"{self.kernel.name}: `{statement.text}` {statement.where}: {error}"
            ) from error


def narrowest(kernel: Kernel, space: str) -> int:
    """Return the bytes of the smallest number that a kernel loads or stores, 4 at most."""
    forms = [x.form for x in kernel.code if x.opcode in ("ld", "st")]
    chosen = [x for x in forms if any(word.startswith(space) for word in x.words)]
    return min([4, *(np.dtype(TYPES[x.type]).itemsize for x in chosen)])


def launch(
    text: str | Kernel,
    arguments: Sequence[Any],
    grid: Sequence[int] = (1,),
    threads: int = 32,
    shared_bytes: int = 0,
    traffic: Traffic | None = None,
    seed: int = 0,
    wrap: Callable[[Machine], Any] = lambda machine: None,
) -> Launched:
    """Run PTX on numpy arrays, which are memory, and on numbers; return what it did."""
    kernel = parse(text) if isinstance(text, str) else text
    memory, parameters = {}, {}
    for parameter, value in zip(kernel.parameters, arguments, strict=True):
        if isinstance(value, np.ndarray):
            memory[value.ctypes.data] = (parameter.name, value.nbytes)
            value = np.uint64(value.ctypes.data)
        parameters[parameter.name] = value
    machine = Machine(kernel, grid, threads, parameters, memory, shared_bytes, traffic)
    wrap(machine)
    return machine.run(np.random.default_rng(seed))

"""Memory, and who touched which part of it since the last barrier."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from .forms import BITS

PROGRAM, EPOCH = 40, 10  # where the parts of a mark begin: program, epoch, warp
SEVERAL_PROGRAMS, SEVERAL_WARPS = 1, 2

Report = Callable[[str, str], None]


class Watch:
    """The latest writer and readers of each unit of a memory.

    A mark names a program, its epoch and a warp; each barrier of a program begins an epoch. Within
    an epoch the warps of a program are in no order, and programs are in none at all.
    """

    def __init__(self, n_units: int, place: str, report: Report):
        self.place, self.report = place, report
        self.writer = np.full(n_units, -1, np.int64)
        self.reader = np.full(n_units, -1, np.int64)
        self.several = np.zeros(n_units, np.uint8)  # readers, beside the latest

    def read(self, units: np.ndarray, marks: np.ndarray) -> None:
        """Note that lanes with these marks [n] read these units [n, k]."""
        marks = np.broadcast_to(marks[:, None], units.shape)
        self._compare(self.writer[units], marks, "read", "wrote")
        before = self.reader[units]
        if (before != marks).any():
            several = self.several[units]
            several[before >> EPOCH != marks >> EPOCH] &= SEVERAL_PROGRAMS
            self.several[units] = several | self._others(before, marks)
        self.reader[units] = marks
        latest = self.reader[units]
        hidden = latest != marks
        if hidden.any():  # by another warp, which reads the unit at the same time
            self.several[units[hidden]] |= self._others(latest[hidden], marks[hidden])

    def write(self, units: np.ndarray, marks: np.ndarray) -> None:
        """Note that lanes with these marks write these units."""
        marks = np.broadcast_to(marks[:, None], units.shape)
        self._compare(self.writer[units], marks, "written", "wrote")
        reader, several = self.reader[units], self.several[units]
        self._compare(reader, marks, "written", "read")
        if (several & SEVERAL_PROGRAMS).any():
            self.report(f"{self.place} is written where another program read", "")
        same_epoch = reader >> EPOCH == marks >> EPOCH
        if (same_epoch & (several & SEVERAL_WARPS > 0)).any():
            self._race("written", "read", "")
        self.writer[units] = marks

    @staticmethod
    def _others(before: np.ndarray, marks: np.ndarray) -> np.ndarray:
        """Return which others than the marks were there before."""
        programs = (before >= 0) & (before >> PROGRAM != marks >> PROGRAM)
        warps = (before != marks) & (before >> EPOCH == marks >> EPOCH)
        return (programs * SEVERAL_PROGRAMS + warps * SEVERAL_WARPS).astype(np.uint8)

    def _compare(self, before: np.ndarray, marks: np.ndarray, verb: str, did: str) -> None:
        if not ((before != marks) & (before >= 0)).any():
            return
        others = self._others(before, marks)
        if (others & SEVERAL_PROGRAMS).any():
            self.report(f"{self.place} is {verb} where another program {did}", "")
        if (others & SEVERAL_WARPS).any():
            self._race(verb, did, f"{int((others & SEVERAL_WARPS > 0).sum())} places")

    def _race(self, verb: str, did: str, detail: str) -> None:
        self.report(f"{self.place} is {verb} where another warp {did}, without a barrier", detail)


class Segment:
    """A piece of this process's memory that a kernel may touch as global memory."""

    def __init__(self, name: str, start: int, n_bytes: int, unit: int, report: Report):
        self.name, self.start, self.n_bytes = name, start, n_bytes
        buffer = (ctypes.c_uint8 * n_bytes).from_address(start)
        self.bytes = np.frombuffer(buffer, np.uint8)
        self.watch = Watch(-(-n_bytes // unit), f"global memory ({name})", report)


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self, pieces: dict[int, tuple[str, int]], unit: int, report: Report):
        """Take (name, bytes) by address; accesses are watched in units of so many bytes."""
        self.unit, self.report = unit, report
        self.segments = [
            Segment(name, start, size, unit, report)
            for start, (name, size) in sorted(pieces.items())
            if size
        ]
        self.starts = np.array([x.start for x in self.segments], np.uint64)

    def access(
        self, addresses: np.ndarray, width: int, n: int, marks: np.ndarray, data: list | None = None
    ) -> list[np.ndarray]:
        """Load n words of so many bytes for each lane, or store the data; return what was loaded.

        What lies outside is reported and not touched; it is loaded as zeros.
        """
        size = width * n
        if (addresses % np.uint64(size)).any():
            self.report("misaligned vector in global memory", f"{n} words of {width} bytes")
        loaded = np.zeros((n, len(addresses)), BITS[width])
        owners = np.searchsorted(self.starts, addresses, "right") - 1
        for owner in np.unique(owners):
            lanes = np.flatnonzero(owners == owner)
            if owner >= 0:
                segment = self.segments[owner]
                offsets = (addresses[lanes] - np.uint64(segment.start)).astype(np.int64)
                inside = offsets + size <= segment.n_bytes
            else:
                inside = np.zeros(len(lanes), bool)
            if not inside.all():
                first = int(addresses[lanes][~inside][0])
                before = f"behind {segment.name}" if owner >= 0 else "before all tensors"
                what = f"{n} words of {width} bytes at {first:#x}, {before}"
                self.report("access outside of every tensor", what)
                lanes = lanes[inside]
                if not len(lanes):
                    continue
                offsets = offsets[inside]
            words = offsets // width
            view = segment.bytes[: segment.n_bytes // width * width].view(BITS[width])
            units = offsets[:, None] // self.unit + np.arange(max(size // self.unit, 1))
            if data is None:
                for i in range(n):
                    loaded[i, lanes] = view[words + i]
                segment.watch.read(units, marks[lanes])
            else:
                segment.watch.write(units, marks[lanes])
                for i in range(n):
                    store(view, words + i, data[i][lanes], segment.watch)
        return list(loaded)


class SharedMemory:
    """The shared memory of several programs, one after the other."""

    def __init__(self, n_programs: int, n_bytes: int, unit: int, report: Report):
        self.n_bytes = max(16, -(-n_bytes // 16) * 16)  # of one program
        self.unit, self.report = unit, report
        self.bytes = np.full(n_programs * self.n_bytes, 0xFF, np.uint8)  # NaN, whatever the type
        self.watch = Watch(len(self.bytes) // unit, "shared memory", report)

    def places(self, programs: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return where addresses of programs lie among the bytes; those outside are reported."""
        addresses = addresses.astype(np.int64)
        if ((addresses + size > self.n_bytes) | (addresses < 0)).any():
            self.report("access outside of shared memory", f"{addresses.max()} of {self.n_bytes}")
            addresses = np.clip(addresses, 0, self.n_bytes - size) // size * size
        return programs * self.n_bytes + addresses

    def units(self, places: np.ndarray, size: int) -> np.ndarray:
        """Return the watched units [n, k] of so many bytes from each place."""
        return places.reshape(-1, 1) // self.unit + np.arange(max(size // self.unit, 1))

    def access(
        self,
        programs: np.ndarray,
        addresses: np.ndarray,
        width: int,
        n: int,
        marks: np.ndarray,
        data: list | None = None,
    ) -> list[np.ndarray]:
        """Load n words of so many bytes for each lane, or store the data."""
        size = width * n
        if (addresses % addresses.dtype.type(size)).any():
            self.report("misaligned vector in shared memory", f"{n} words of {width} bytes")
        places = self.places(programs, addresses, size)
        words, view = places // width, self.bytes.view(BITS[width])
        units = self.units(places, size)
        if data is None:
            self.watch.read(units, marks)
            return [view[words + i] for i in range(n)]
        self.watch.write(units, marks)
        for i in range(n):
            store(view, words + i, data[i], self.watch)
        return []


def store(view: np.ndarray, words: np.ndarray, values: np.ndarray, watch: Watch) -> None:
    """Store words; several lanes may store the same number in one place, and no others."""
    view[words] = values
    stored = view[words]
    differs = stored != values
    if differs.any() and not agree(stored[differs], values[differs]).all():
        watch.report(f"{watch.place} is written by lanes that disagree", "")


def agree(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which words are NaN both, or the same number up to rounding, as floats of their size.

    Lanes that each reduce a row add its parts in different orders, and all store their sum.
    """
    if x.dtype.itemsize == 1:
        return np.zeros(x.shape, bool)
    x, y = (bits.view(f"f{bits.dtype.itemsize}") for bits in (x, y))
    near = np.abs(x - y) <= 2.0**-10 * np.abs(x)
    return near | (np.isnan(x) & np.isnan(y))

"""The memory that kernels touch, exactly, without a GPU.

    with Meter() as meter:            under TRITON_INTERPRET=1
        operation(...)
    meter.launches[0].arguments["labels_ptr"].loaded      bytes, every time they are asked for
    meter.launches[0].arguments["student.ptr"].loaded     the same of a field of a NamedTuple
    meter.traffic, meter.floor        bytes asked for; bytes if each were moved once per launch
    assert not meter.races            accesses whose result depends on the order of programs

    with PeakMemory() as memory:      any CPU or meta tensors
        operation(...)
    memory.peak_bytes                 most bytes alive at once that were allocated inside

A load or store outside every argument raises. Limits: races inside one program (a missing barrier)
are not seen; temporaries inside one ATen operation are not either.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOBODY, SEVERAL = -1, -2


@dataclass
class Argument:
    """Bytes, by lanes that are not masked out."""

    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0  # each byte once per launch
    unique_stored: int = 0


@dataclass
class Launch:
    name: str
    grid: tuple[int, int, int] = (0, 0, 0)
    arguments: dict[str, Argument] = field(default_factory=lambda: defaultdict(Argument))
    races: Counter = field(default_factory=Counter)

    @property
    def traffic(self) -> int:
        return sum(a.loaded + a.stored for a in self.arguments.values())

    @property
    def floor(self) -> int:
        return sum(a.unique_loaded + a.unique_stored for a in self.arguments.values())


class Memory:
    """One storage behind the arguments of a launch, and who touched each of its elements."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.names = list(tensors)
        storage = next(iter(tensors.values())).untyped_storage()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.unit = min(tensor.element_size() for tensor in tensors.values())
        count = storage.nbytes() // self.unit
        self.owners = np.zeros(count, np.int64)  # bit k: the k-th tensor's; 0: a gap, nobody's
        for k, tensor in enumerate(tensors.values()):
            ratio = tensor.element_size() // self.unit
            strides = [stride * ratio for stride in tensor.stride()] + [1]
            offset = tensor.storage_offset() * ratio
            places = torch.arange(count).as_strided((*tensor.shape, ratio), strides, offset)
            self.owners[places.numpy()] |= 1 << k
        self.loaded = np.zeros(count, bool)
        self.stored = np.zeros(count, bool)
        self.writer = np.full(count, NOBODY, np.int32)  # the last one
        self.reader = np.full(count, NOBODY, np.int32)

    def label(self, owner: int) -> str:
        """Return the argument's name; those of aliases are joined, they cannot be told apart."""
        return "/".join(name for k, name in enumerate(self.names) if owner >> k & 1)

    def record(self, kind: str, units: np.ndarray, program: int, launch: Launch):
        writer, reader = self.writer[units], self.reader[units]
        unread = (reader == NOBODY) | (reader == program)  # by other programs
        theirs = (writer != NOBODY) & (writer != program)
        if kind == "loaded":
            self.loaded[units] = True
            self.reader[units] = np.where(unread, program, SEVERAL)
            found = {"loads what another program stores": theirs.sum()}
        else:
            self.stored[units] = True
            self.writer[units] = program
            found = {
                "stores over what another program stores": theirs.sum(),
                "stores over what another program loads": (~unread).sum(),
                "stores twice in one instruction": units.size - np.unique(units).size,
            }
        launch.races += Counter({f"{launch.name} {what}": int(n) for what, n in found.items()})


def members(arguments: dict) -> Iterator[tuple[str, object]]:
    """Yield the arguments of a kernel and, instead of a tuple, the members: "x.ptr", "x.0"."""
    for name, value in arguments.items():
        if hasattr(value, "_asdict"):
            yield from members({f"{name}.{field}": x for field, x in value._asdict().items()})
        elif isinstance(value, tuple):
            yield from members({f"{name}.{place}": x for place, x in enumerate(value)})
        else:
            yield name, value


class Watched:
    """Triton's four functions that touch memory, each reported before it runs."""

    def __init__(self, functions, touch):
        self._functions, self._touch = functions, touch

    def __getattr__(self, name):
        return getattr(self._functions, name)

    def load(self, pointers, mask, other, dtype):
        self._touch("loaded", pointers, mask, np.dtype(dtype).itemsize)
        return self._functions.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._touch("stored", pointers, mask, values.dtype.itemsize)
        return self._functions.store(pointers, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, semantics):
        self._touch("atomic", pointers, mask, values.dtype.itemsize)
        return self._functions.atomic_rmw(operation, pointers, values, mask, semantics)


class Meter:
    def __init__(self):
        self.launches: list[Launch] = []
        self._memories: list[Memory] = []  # of the launch under way, by address
        self._patches = ExitStack()

    @property
    def traffic(self) -> int:
        return sum(launch.traffic for launch in self.launches)

    @property
    def floor(self) -> int:
        return sum(launch.floor for launch in self.launches)

    @property
    def races(self) -> Counter:
        """Number of elements by what happened to them."""
        return sum((launch.races for launch in self.launches), Counter())

    def __enter__(self):
        execute = triton_interpreter.GridExecutor.__call__

        def metered(executor, *args, **kwargs):
            self._begin(executor, args, kwargs)
            try:
                return execute(executor, *args, **kwargs)
            finally:
                self._end()

        watched = Watched(triton_interpreter._interpreter, self._touch)
        for place, name, replacement in (
            (triton_interpreter, "_interpreter", watched),
            (triton_interpreter.GridExecutor, "__call__", metered),
        ):
            self._patches.enter_context(mock.patch.object(place, name, replacement))
        return self

    def __exit__(self, *exception):
        self._patches.close()

    def _begin(self, executor, args, kwargs):
        storages: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        arguments = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        for name, value in members(arguments):
            if not isinstance(value, torch.Tensor):
                value = getattr(value, "base", None)  # of a tensor descriptor
            if value is not None and value.untyped_storage().nbytes():
                storages[value.untyped_storage().data_ptr()][name] = value
        self._memories = [Memory(tensors) for _, tensors in sorted(storages.items())]
        self.launches.append(Launch(executor.fn.__name__))

    def _end(self):
        launch = self.launches[-1]
        launch.grid = triton_interpreter.interpreter_builder.grid_dim
        for memory in self._memories:
            for owner in np.unique(memory.owners[memory.loaded | memory.stored]):
                argument, own = launch.arguments[memory.label(owner)], memory.owners == owner
                argument.unique_loaded = int((memory.loaded & own).sum()) * memory.unit
                argument.unique_stored = int((memory.stored & own).sum()) * memory.unit

    def _touch(self, kind: str, pointers: np.ndarray, mask, size: int):
        """One instruction of one program: size bytes at each pointer in the mask."""
        launch, builder = self.launches[-1], triton_interpreter.interpreter_builder
        if kind == "atomic":  # on floats the order of programs shows
            launch.races[f"{launch.name} is atomic"] += 1
            return
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        addresses = np.asarray(pointers)[np.broadcast_to(mask, np.shape(pointers))].astype(np.int64)
        starts = [memory.start for memory in self._memories]
        which = np.searchsorted(starts, addresses, side="right") - 1
        for k in np.unique(which):
            lanes, memory = addresses[which == k], self._memories[k]
            inside = (lanes >= memory.start) & (lanes + size <= memory.end)
            first = np.where(inside, lanes - memory.start, 0) // memory.unit
            owners = np.where(inside, memory.owners[first], 0)
            if not owners.all():
                stray = lanes[owners == 0]
                raise IndexError(
                    f"{launch.name}, program {builder.grid_idx}: {stray.size} of {lanes.size} "
                    f"lanes {kind} outside every argument, the first at byte "
                    f"{stray[0] - memory.start} of the storage of {', '.join(memory.names)}"
                )
            for owner in np.unique(owners):
                argument, moved = launch.arguments[memory.label(owner)], (owners == owner).sum()
                setattr(argument, kind, getattr(argument, kind) + int(moved) * size)
            units = (first[:, None] + np.arange(size // memory.unit)).ravel()
            memory.record(kind, units, program, launch)


class PeakMemory(TorchDispatchMode):
    """Allocations, operations and bytes moved by the ATen operations of a region.

    An operation that is no view is about one kernel in eager mode; it moves inputs and outputs.
    """

    FREE = ("empty", "lift_fresh", "resize_", "set_", "_unsafe_view")

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.operations = self.moved_bytes = 0
        self._sizes: dict[int, int] = {}  # of every storage seen that is alive; 0: from outside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            self._see(tensor.untyped_storage(), 0)
        result = function(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._see(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and not name.startswith(self.FREE):
            self.operations += 1
            moved = [*{id(tensor): tensor for tensor in inputs}.values(), *outputs]
            self.moved_bytes += sum(map(touched_bytes, moved))
        return result

    def _see(self, storage: torch.UntypedStorage, size: int):
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int):
        self.live_bytes -= self._sizes.pop(key)


def touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the tensor, of an expanded one those of its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

"""PTX text becomes a kernel: parameters, registers, and instructions with what executes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import instructions  # noqa: F401  because importing them registers them
from .forms import BITS, SIZES, TWICE, TYPES, Form, known


class UnknownInstruction(Exception):
    """An instruction, a modifier or an operand that the emulator does not know."""


@dataclass
class Statement:
    """An instruction with its guard, bound to its operands."""

    text: str
    where: str  # in the source, as the compiler says
    form: Form
    guard: int | None = None  # the slot of a predicate
    negated: bool = False
    execute: Callable = lambda machine: None
    together: str = ""
    target: int = -1  # of a branch
    registers: frozenset[int] = frozenset()

    @property
    def opcode(self) -> str:
        return self.form.words[0]


class Parameter(NamedTuple):
    name: str
    type: str


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    code: list[Statement] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)  # the name of each slot
    kinds: list[str] = field(default_factory=list)  # its type
    symbols: dict[str, int] = field(default_factory=dict)  # of shared memory
    shared_bytes: int = 0  # declared in the text

    def uses(self, *opcodes: str) -> bool:
        return any(statement.opcode in opcodes for statement in self.code)


SPECIAL = ["%tid", "%ntid", "%ctaid", "%nctaid"]
SPECIALS = [f"{name}.{axis}" for name in SPECIAL for axis in "xyz"] + ["%laneid", "%warpid"]
NAME = r"[%$\w]+"


def parse(text: str) -> Kernel:
    """Return the one kernel of a PTX module."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.S)
    if len(entries) != 1 or re.search(r"^\s*(\.visible|\.weak)?\s*\.func\b", text, re.M):
        raise UnknownInstruction(f"got {len(entries)} kernels and .func, need one kernel alone")
    name, parameters = entries[0]
    kernel = Kernel(name, [parameter(x) for x in parameters.split(",") if x.strip()])
    before, _, after = text.partition(".entry")
    for symbol in re.findall(r"\.extern\s+\.shared[^;]*?(\w+)\[\]\s*;", before):
        kernel.symbols[symbol] = 0
    Reader(kernel).read(after[after.index("{", after.index(")")) :])
    return kernel


def parameter(text: str) -> Parameter:
    *words, name = text.split()
    kind = next((word[1:] for word in words if word[1:] in TYPES), None)
    if kind is None or "[" in name:
        raise UnknownInstruction(f"a parameter of an unknown type: {' '.join(text.split())}")
    return Parameter(name, kind)


class Reader:
    """Reads the body of a kernel: statements, in scopes that may declare registers again."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.where = kernel, ""
        self.slots: dict[str, tuple[int, str]] = {}  # register -> its slot and type
        self.scopes: list[dict] = []  # what the names declared in each meant outside
        self.labels: list[dict[str, int]] = []  # of each scope around
        self.branches: list[list[tuple[Statement, str]]] = []
        for name in SPECIALS:
            self.declare(name, "b32")

    def read(self, text: str) -> None:
        for kind, piece in pieces(text):
            if kind == "location":
                self.where = piece
            elif kind == "{":
                self.scopes.append({})
                self.labels.append({})
                self.branches.append([])
            elif kind == "}":
                self.slots.update(self.scopes.pop())
                self.leave()
                if not self.scopes:
                    break
            elif kind == "label":
                self.labels[-1][piece] = len(self.kernel.code)
            elif piece.startswith("."):
                self.directive(piece)
            else:
                statement = self.statement(piece)
                self.kernel.code.append(statement)
                if statement.opcode == "bra":
                    self.branches[-1].append((statement, piece.split()[-1]))

    def leave(self) -> None:
        """Find the labels of a scope's branches, or leave them to the scope around."""
        labels, branches = self.labels.pop(), self.branches.pop()
        for statement, label in branches:
            if label in labels:
                statement.target = labels[label]
            elif self.branches:
                self.branches[-1].append((statement, label))
            else:
                raise UnknownInstruction(f"`{statement.text}`: there is no such label")

    def declare(self, name: str, kind: str) -> None:
        if self.scopes and name in self.slots:
            self.scopes[-1].setdefault(name, self.slots[name])
        self.slots[name] = (len(self.kernel.registers), kind)
        self.kernel.registers.append(name)
        self.kernel.kinds.append(kind)

    def directive(self, text: str) -> None:
        words = text.split(None, 2)
        if words[0] == ".reg":
            kind = words[1].removeprefix(".")
            for name in words[2].split(","):
                many = re.fullmatch(rf"({NAME})<(\d+)>", name.strip())
                names = [name.strip()]
                if many:
                    names = [f"{many[1]}{i}" for i in range(int(many[2]))]
                for each in names:
                    self.declare(each, kind)
        elif words[0] == ".shared":
            found = re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", text)
            if not found:
                raise UnknownInstruction(f"a declaration that is not known: {text}")
            align, name, size = int(found[1]), found[2], int(found[3])
            start = -(-self.kernel.shared_bytes // align) * align
            self.kernel.symbols[name], self.kernel.shared_bytes = start, start + size
        elif words[0] not in (".loc", ".pragma", ".file"):
            raise UnknownInstruction(f"a directive that is not known: {text}")

    def statement(self, text: str) -> Statement:
        result = Statement(text, self.where, Form("", ("",)))
        guard = re.match(rf"@(!?)({NAME})\s+", text)
        if guard:
            result.negated = bool(guard[1])
            result.guard = self.register(guard[2], "pred", text)
            text = text[guard.end() :]
        opcode, _, rest = text.partition(" ")
        form, candidates = known(opcode)
        result.form = form
        operands = split(rest)
        fitting = [each for each in candidates if fits(each.kinds, operands)]
        if not fitting:
            raise UnknownInstruction(
                f"{self.kernel.name}: `{text}` is not known to the emulator ({self.where}); declare"
                " its form, and what it does, in the file of ptx/ that has its kind"
            )
        if result.opcode not in ("bra", "ret", "exit"):
            kinds = fitting[0].kinds[: len(operands)]
            used: set[int] = set()
            bound = [self.operand(*x, form, text, used) for x in zip(kinds, operands, strict=True)]
            result.execute, result.together = fitting[0].build(form, *bound), fitting[0].together
            result.registers = frozenset(used)
        return result

    # -------------------------------------------------------------------------------- operands

    def register(self, name: str, kind: str, text: str) -> int:
        """Return a register's slot; its width must be that of the type."""
        if name not in self.slots:
            raise UnknownInstruction(f"`{text}`: {name} is declared nowhere")
        slot, declared = self.slots[name]
        size, width = SIZES[kind], SIZES[declared]
        fits = size == width
        if size < width:  # as PTX allows
            fits = re.match(r"(@\S+ )?(ld|st|cvt)\.", text) is not None
        if not fits or (kind == "pred") != (declared == "pred"):
            raise UnknownInstruction(f"`{text}`: {name} is .{declared}, need .{kind}")
        return slot

    def operand(self, kind: str, text: str, form: Form, whole: str, used: set[int]) -> Any:
        kind, _, named = kind.rstrip("?").partition(":")
        type_ = named or form.type
        if kind in ("{d}", "{s}", "d..", "s.."):
            inner = split(text[1:-1]) if text.startswith("{") else [text]
            if named == "part":
                type_ = f"b{SIZES[form.type] * 8 // len(inner)}"
            one = kind.strip("{}.")
            return [self.operand(f"{one}:{type_}", x, form, whole, used) for x in inner]
        if type_ == "wide":
            type_ = TWICE[form.type]
        elif type_.isdigit():  # the type at this place among those of the form
            type_ = form.types[int(type_)]
        if kind == "d|p":  # a register and a predicate, both written
            first = "pred" if form.words[0] == "setp" else type_
            parts = zip(text.split("|"), (first, "pred"), strict=True)
            return [self.operand(f"d:{each}", x, form, whole, used) for x, each in parts]
        if kind == "[a]":
            return self.address(text, whole, used)
        if kind == "i":
            return int(text.rstrip("U"), 0)
        if kind == "d":
            if text == "_":
                return Nowhere()
            slot = self.register(text, type_, whole)
            used.add(slot)
            width = SIZES[self.slots[text][1]]
            return Destination(slot, np.bool_ if type_ == "pred" else BITS[width])
        return self.source(text, "pred" if kind == "p" else type_, whole, used)

    def source(self, text: str, kind: str, whole: str, used: set[int]) -> Callable:
        dtype = TYPES[kind]
        if text.startswith("!"):
            inner = self.source(text[1:], "pred", whole, used)
            return lambda machine: ~inner(machine)
        if text in self.slots:
            slot = self.register(text, kind, whole)
            used.add(slot)
            return Source(slot, dtype)
        if text in self.kernel.symbols:
            return Constant(dtype(self.kernel.symbols[text]))
        return Constant(number(text, kind, whole))

    def address(self, text: str, whole: str, used: set[int]) -> Address:
        found = re.fullmatch(rf"\[\s*({NAME})\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not found:
            raise UnknownInstruction(f"`{whole}`: an address that is not known: {text}")
        name, offset = found[1], int(found[2] or 0)
        if name in self.slots:
            slot, declared = self.slots[name]
            used.add(slot)
            return Address(Source(slot, TYPES["u64" if declared[1:] == "64" else "u32"]), offset)
        if name in self.kernel.symbols:
            return Address(Constant(np.uint32(self.kernel.symbols[name])), offset)
        if name in [x.name for x in self.kernel.parameters]:
            return Address(None, offset, name)
        raise UnknownInstruction(f"`{whole}`: {name} is declared nowhere")


class Source:
    """Reads a register of the active lanes as numbers of a type."""

    def __init__(self, slot: int, dtype: Any):
        self.slot, self.dtype, self.size = slot, dtype, np.dtype(dtype).itemsize

    def __call__(self, machine: Any) -> np.ndarray:
        bits = machine.read(self.slot)
        if bits.dtype.itemsize != self.size:  # a byte of a wider register
            bits = bits.astype(BITS[self.size])
        return bits.view(self.dtype)


class Constant(NamedTuple):
    """Returns a number of a type, for all lanes the same."""

    value: Any

    def __call__(self, machine: Any) -> Any:
        return self.value


class Destination:
    """Writes a register of the active lanes; what is narrower is extended with zeros."""

    def __init__(self, slot: int, bits: Any):
        self.slot, self.bits, self.size = slot, bits, np.dtype(bits).itemsize

    def __call__(self, machine: Any, values: np.ndarray) -> None:
        if self.bits is not np.bool_:
            values = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
            if values.dtype != self.bits:
                values = values.view(BITS[values.dtype.itemsize])
                if values.dtype.itemsize < self.size:
                    values = values.astype(self.bits)
        machine.write(self.slot, values)


class Nowhere:
    """Takes what is thrown away."""

    slot = -1

    def __call__(self, machine: Any, values: np.ndarray) -> None:
        pass


class Address(NamedTuple):
    """Returns the addresses of the active lanes, or names a parameter."""

    source: Callable | None
    offset: int
    parameter: str = ""

    def __call__(self, machine: Any) -> np.ndarray:
        assert self.source is not None
        base = machine.spread(self.source(machine))
        size = base.dtype.itemsize
        return base + base.dtype.type(self.offset % (1 << 8 * size))


def number(text: str, kind: str, whole: str) -> Any:
    dtype = np.dtype(TYPES[kind])
    found = re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text)
    if found:
        size = len(found[1]) // 2
        if size != dtype.itemsize:
            raise UnknownInstruction(f"`{whole}`: {text} is no .{kind}")
        return BITS[size](int(found[1], 16)).view(dtype)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) or dtype.kind == "f":
        raise UnknownInstruction(f"`{whole}`: {text} is no .{kind}")
    value = int(text.rstrip("U"), 0)
    if kind == "pred":
        return np.bool_(value)
    return BITS[dtype.itemsize](value % (1 << 8 * dtype.itemsize)).view(dtype)


# --------------------------------------------------------------------------------------------- text


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield the statements and directives of a body, its labels, braces and source lines."""
    rest = ""
    for line in text.splitlines():
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            yield "location", comment.split("@")[0].strip()
            continue
        rest += code + " "
        while rest := rest.lstrip():
            label = re.match(r"([$\w]+):(?!:)", rest)
            if label:
                yield "label", label[1]
                rest = rest[label.end() :]
            elif rest[0] in "{}":
                yield rest[0], rest[0]
                rest = rest[1:]
            elif ";" in rest:
                piece, _, rest = rest.partition(";")
                if piece.strip():
                    yield "statement", " ".join(piece.split())
            else:
                break


def split(text: str) -> list[str]:
    """Return operands, which commas part outside of brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def fits(kinds: tuple[str, ...], operands: list[str]) -> bool:
    """Return whether there is an operand for each kind, and of its shape."""
    least = sum(not kind.endswith("?") for kind in kinds)
    if not least <= len(operands) <= len(kinds):
        return False
    for kind, operand in zip(kinds, operands, strict=False):
        kind = kind.rstrip("?").partition(":")[0]
        shape = "vector" if operand[0] == "{" else "address" if operand[0] == "[" else "one"
        needed = {"{d}": "vector", "{s}": "vector", "[a]": "address"}.get(kind, "one")
        if shape != needed and not (kind.endswith("..") and shape == "vector"):
            return False
        if kind == "i" and not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return False
    return True

"""Break the library one small edit at a time: the tests must fail every time.

    python tests/mutants.py [--seed 0] [--number 60] [paths]

Edits are made from the syntax tree of fastkd/ and kernels/: a sign flipped, a factor, term or mask
dropped, two arguments swapped, a comparison or a constant changed. A seeded sample, in which every
file has its share, is judged in copies of the repository by the tests that `make test` selects,
those first whose names fit the file. A mutant that survives is a hole in the tests, unless
EQUIVALENT says why it changes nothing. `--against test-all` puts survivors to all the tests.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
CPU_SECONDS, SECONDS, BYTES = 120, 900, 8 << 30  # limits of one test, so that endless loops end
# the interpreter decides at import, so the kernels are run and compiled in two processes
INTERPRETED = ["tests", "--ignore=tests/compiled", "--ignore=tests/integrations"]
COMPILED = ["tests/compiled"]

# (file, function, edit as it is printed or * for all, why no test can see it)
EQUIVALENT: list[tuple[str, str, str, str]] = []

SYMBOLS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
SYMBOLS |= {ast.Add: "+", ast.Sub: "-"}
OPPOSITES = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+"}
ENDS = {"min": "max", "minimum": "maximum", "amin": "amax", "clamp_min": "clamp_max"}
ENDS |= {largest: least for least, largest in ENDS.items()}
DROPPED_CALLS = "[a-z].*_|masked_fill|clamp.*|nan_to_num|detach|abs"
# calls that check types, speak to people, hint at something or fail at once with other arguments
IGNORED_CALLS = (
    "isinstance|hasattr|getattr|cast|TypeVar|warn|print|add_argument|.*Error"
    "|arange|static_assert|multiple_of|max_contiguous|assume"
)
IGNORED_NAMES = ("__repr__", "extra_repr", "num_warps", "num_stages", "stacklevel")
IGNORED_NODES = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)

Edit = tuple[str, int, int, str]  # kind, the bytes [start, end) of the file, what replaces them


class Mutant(NamedTuple):
    file: str
    line: int
    function: str  # qualified; empty outside of functions
    kind: str
    what: str  # old → new, each on one line
    start: int
    end: int
    replacement: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.function}  {self.kind}: {self.what}"

    def apply(self, root: Path) -> None:
        source = (root / self.file).read_bytes()
        changed = source[: self.start] + self.replacement.encode() + source[self.end :]
        (root / self.file).write_bytes(changed)


class Generator:
    """The mutants of one file."""

    def __init__(self, file: str) -> None:
        self.file, self.source = file, (ROOT / file).read_bytes()
        self.lines = [0, *itertools.accumulate(map(len, self.source.splitlines(keepends=True)))]

    def mutants(self) -> Iterator[Mutant]:
        tree = ast.parse(self.source)
        for function, shown, (kind, start, end, replacement) in self.walk(tree, "", tree):
            low, high = min(shown[0], start), max(shown[1], end)
            low, high = max(low, start - 40), min(high, end + 40)  # a long call is cut
            new = self.text(low, start) + replacement + self.text(end, high)
            what = " → ".join(" ".join(x.split()) for x in (self.text(low, high), new))
            line = self.source.count(b"\n", 0, start) + 1
            yield Mutant(self.file, line, function, kind, what, start, end, replacement)

    def is_another_program(self, mutant: Mutant) -> bool:
        old, size = self.source, len(self.source)
        new = self.text(0, mutant.start) + mutant.replacement + self.text(mutant.end, size)
        with contextlib.suppress(SyntaxError):
            return ast.dump(ast.parse(new)) != ast.dump(ast.parse(old))
        return False

    def text(self, start: int, end: int) -> str:
        return self.source[start:end].decode(errors="ignore")

    def span(self, node: Any) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        """Return the source of an expression, in parentheses where it needs them."""
        text = self.text(*self.span(node))
        atom = isinstance(node, ast.Name | ast.Constant | ast.Attribute | ast.Call | ast.Subscript)
        return text if atom else f"({text})"

    def walk(self, node: ast.AST, function: str, shown: Any) -> Iterator[tuple]:
        """Yield the function, the bytes to show and the edit of each mutant below a node."""
        name = getattr(node, "name", getattr(node, "arg", ""))
        if isinstance(node, ast.Call) and re.fullmatch(IGNORED_CALLS, _name(node)):
            return
        if isinstance(node, IGNORED_NODES) or name in IGNORED_NAMES:
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{name}".lstrip(".")
        if isinstance(node, ast.stmt | ast.expr | ast.keyword) and not hasattr(node, "body"):
            shown = shown if isinstance(node, ast.Constant) else self.span(node)
        for edit in self.edits(node, function):
            yield function, shown if isinstance(shown, tuple) else edit[1:3], edit
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not is_text | (
                    field in ("annotation", "returns")
                ):
                    yield from self.walk(child, function, node if hasattr(node, "body") else shown)

    def edits(self, node: Any, function: str) -> Iterator[Edit]:
        match node:
            case ast.BinOp(_, ast.BitAnd() | ast.BitOr()) if not function:
                return  # a union of types
            case ast.BinOp(left, op, right):
                factor = isinstance(op, ast.Mult | ast.Div | ast.FloorDiv | ast.Pow)
                if type(op) in SYMBOLS:
                    yield "sign flipped", *self.between(left, op, right)
                if not isinstance(op, ast.MatMult):
                    kind = "factor dropped" if factor else "term dropped"
                    yield kind, *self.span(node), self.of(left)
                    if isinstance(op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
                        yield kind, *self.span(node), self.of(right)
            case ast.UnaryOp(op, operand):
                kind = "condition negated" if isinstance(op, ast.Not) else "sign flipped"
                yield kind, *self.span(node), self.of(operand)
            case ast.Compare(left, [op], [right]) if type(op) in SYMBOLS:
                yield "comparison changed", *self.between(left, op, right)
            case ast.BoolOp(op, values):
                word = " and " if isinstance(op, ast.And) else " or "
                for dropped in values:
                    rest = word.join(self.of(x) for x in values if x is not dropped)
                    rest = f"({rest})" if len(values) > 2 else rest
                    yield "condition dropped", *self.span(node), rest
            case ast.Call():
                yield from self.edits_of_call(node)
            case ast.If(test) | ast.IfExp(test) | ast.While(test):
                yield "condition ignored", *self.span(test), "False"
                is_check = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
                if not (is_check or isinstance(node, ast.While)):
                    yield "condition ignored", *self.span(test), "True"
            case ast.Constant(int() | float() as value):
                other = 1 - value if value in (0, 1) else value * 2 if value % 1 else value + 1
                other = not value if isinstance(value, bool) else other
                yield "constant changed", *self.span(node), repr(other)
            case ast.AugAssign(target, op, value):
                yield "operation dropped", *self.span(node), "pass"
                if type(op) in SYMBOLS:
                    yield "sign flipped", *self.between(target, op, value)
            case ast.Expr(ast.Call(ast.Attribute(attr="store" | "append" | "update"))):
                yield "store dropped", *self.span(node), "pass"

    def edits_of_call(self, node: ast.Call) -> Iterator[Edit]:
        name, (start, end), (_, name_end) = _name(node), self.span(node), self.span(node.func)
        if name in ENDS:
            yield "minimum and maximum swapped", name_end - len(name), name_end, ENDS[name]
        for pair in itertools.pairwise(node.args):
            if name not in (*ENDS, "full", "map", "zip") and not any(
                isinstance(x, ast.Starred) for x in pair
            ):
                (first, low), (high, last) = map(self.span, pair)
                swapped = self.text(high, last) + self.text(low, high) + self.text(first, low)
                yield "arguments swapped", first, last, swapped
        if any(x.arg == "mask" for x in node.keywords):
            rest = [*node.args, *(x for x in node.keywords if x.arg not in ("mask", "other"))]
            call = ", ".join(self.text(*self.span(x)) for x in rest)
            yield "mask dropped", start, end, f"{self.of(node.func)}({call})"
        if name == "where" and len(node.args) == 3:
            yield "mask dropped", start, end, self.of(node.args[1])
        elif isinstance(node.func, ast.Attribute) and re.fullmatch(DROPPED_CALLS, name):
            yield "operation dropped", start, end, self.of(node.func.value)

    def between(self, left: Any, operator: Any, right: Any) -> tuple[int, int, str]:
        """Return the edit that turns an operator between two operands into its opposite."""
        (_, start), (end, _), symbol = self.span(left), self.span(right), SYMBOLS[type(operator)]
        return start, end, self.text(start, end).replace(symbol, OPPOSITES[symbol], 1)


def _name(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def sample(mutants: list[Mutant], seed: int, number: int) -> list[Mutant]:
    """Return about `number` mutants: every file has its share, and in it the kinds take turns."""
    chosen = []
    for file, group in itertools.groupby(mutants, lambda mutant: mutant.file):
        of_file, turns = list(group), defaultdict(itertools.count)
        share = max(1, round(number * len(of_file) / len(mutants)))
        # a seed for each file, so that a change of one leaves the others' mutants alone
        random.Random(f"{seed} {file}").shuffle(of_file)
        of_file.sort(key=lambda mutant, turns=turns: next(turns[mutant.kind]))
        chosen += itertools.islice(filter(Generator(file).is_another_program, of_file), share)
    return chosen


class Order:
    """The tests that fit the mutant's file come first, and one that does not end is ended."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant, self.judge = mutant, os.getpid()
        source = (ROOT / mutant.file).read_text()
        parts = Path(mutant.file).with_suffix("").parts[1:]
        topics = {part.strip("_") for part in parts} - {"problems", "portable"}
        topics |= {*re.findall(r"^from fastkd\.problems(?:\.| import )(\w+)", source, re.MULTILINE)}
        self.topics = topics | {*re.findall(r"^def ([a-z]\w+)", source, re.MULTILINE)}
        self.engine = "triton" if mutant.file.startswith("kernels/") else "portable"
        is_engine = mutant.file.startswith(("kernels/", "fastkd/portable/"))
        self.others = {"formula", "portable", "triton"} - {self.engine} if is_engine else set()
        self.problems = topics & {"rows", "pairs", "relations", "gram"} if is_engine else set()
        near = {*topics, "contracts", *(["kernels"] if self.engine == "triton" else [])}
        self.near = [x for x in (f"tests/test_{y}.py" for y in sorted(near)) if (ROOT / x).exists()]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        random.Random(0).shuffle(items)
        turns, ranks = defaultdict(itertools.count), {}
        for item in items:  # the cases of a test take turns with those of others
            name, case = item.nodeid.partition("[")[::2]
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            problem = getattr(parameters.get("case"), "problem", "")
            if self.engine not in case and any(x in case for x in self.others):
                continue  # because another engine computes it
            if problem and self.problems and problem not in self.problems:
                continue
            fits = (self.engine in case) + any(x in item.nodeid + problem for x in self.topics)
            ranks[item] = (-fits, next(turns[name, fits]))
        items[:] = sorted(ranks, key=ranks.__getitem__)

    def pytest_runtest_setup(self) -> None:
        if os.getppid() != self.judge:  # it was ended, and nobody waits for the tests
            os._exit(3)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)


def judge(mutant: Mutant | None, marker: str) -> str:
    """Return which test fails for a mutant, or how the run breaks; empty if all tests pass."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ignored = shutil.ignore_patterns(".*", "__pycache__", "results")
        shutil.copytree(ROOT, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        if not (root / "fastkd" / "kernels").exists():
            (root / "fastkd" / "kernels").symlink_to("../kernels")
        order = Order(mutant) if mutant else None
        selections = [INTERPRETED, COMPILED]
        if order:  # to collect a few files takes a third of the time that all of them take
            rest = [*INTERPRETED, *(f"--ignore={file}" for file in order.near)]
            selections = [order.near, rest, COMPILED]
            order.mutant.apply(root)
        for selection in selections:
            process = os.fork()
            if not process:
                _run_tests(root, order, [*selection, "-m", marker])
            try:
                _, status = os.waitpid(process, 0)
            finally:
                with contextlib.suppress(ProcessLookupError):  # what the tests have started
                    os.killpg(process, signal.SIGKILL)
            if os.WIFSIGNALED(status):
                return f"signal {os.WTERMSIG(status)}"
            if os.WEXITSTATUS(status) not in (0, 5):  # 5: no test is selected
                output = (root / "output").read_text(errors="replace")
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                return failed[1] if failed else output[-2000:]
    return ""


def _run_tests(root: Path, order: Order | None, arguments: list[str]) -> None:
    """Become the process that runs the tests of a copy; torch is imported already."""
    try:
        os.setsid()
        output = os.open(root / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path[:] = [str(root), *(x for x in sys.path if x != str(ROOT / "tests"))]
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        arguments = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
        if COMPILED[0] in arguments:
            os.environ["TRITON_INTERPRET"] = "0"
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
        status = pytest.main(arguments, plugins=[order] if order else [])
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["fastkd/", "kernels/"], help="what to break")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--marker", default="not full", help="selects the tests that must notice")
    parser.add_argument("--against", choices=["test", "test-all"], default="test")
    parser.add_argument("--trust", action="store_true", help="that the tests pass without a mutant")
    parser.add_argument("--list", action="store_true", help="print the sample and judge nothing")
    options = parser.parse_args()
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/**/*.py"))]
    files = [x for x in files if re.match("(fastkd/(?!demo/|kernels/)|kernels/)", x)]
    mutants = [mutant for file in files for mutant in Generator(file).mutants()]
    listed = {entry[:3] for entry in EQUIVALENT}
    names = {x: ((x.file, x.function, x.what), (x.file, x.function, "*")) for x in mutants}
    if stale := listed.difference(*names.values()):
        raise SystemExit(f"EQUIVALENT has what the code does not have: {sorted(stale)}")
    drawn = [x for x in mutants if x.file.startswith(tuple(options.paths))]
    chosen = sample(drawn, options.seed, options.number)
    if options.list:
        return print(*chosen, f"{len(chosen)} of {len(drawn)}", sep="\n") or 0
    run = [x for x in chosen if listed.isdisjoint(names[x])]
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for module in ("torch", "triton.language", "numpy", "hypothesis"):
        importlib.import_module(module)  # once: each mutant is judged in a fork of this process
    alive = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        unbroken = None if options.trust else pool.submit(judge, None, options.marker)
        judged = {pool.submit(judge, mutant, options.marker): mutant for mutant in run}
        for done in as_completed(judged):
            mutant, noticed = judged[done], done.result()
            print(f"killed  {mutant}  [{noticed}]" if noticed else f"ALIVE   {mutant}", flush=True)
            alive += [] if noticed else [mutant]
        if unbroken and unbroken.result():
            raise SystemExit(f"the tests fail without a mutant, mend that: {unbroken.result()}")
        left = Counter(mutant.file for mutant in alive)
        for file, count in Counter(mutant.file for mutant in run).items():
            print(f"{count - left[file]:3} of {count:3} killed  {file}")
        print(f"{len(run) - len(alive)} of {len(run)} killed, {len(chosen) - len(run)} equivalent")
        again = alive if options.against == "test-all" else []
        for mutant, noticed in zip(again, pool.map(judge, again, [""] * len(again)), strict=True):
            print(f"{'test-all kills' if noticed else 'ALIVE in all'}  {mutant}  [{noticed}]")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())

"""Break the library one small edit at a time: the tests must fail every time.

    python tests/mutants.py [--seed 0] [--number 60] [paths]

Edits are made from the syntax tree of fastkd/ and kernels/: a sign flipped, a factor, term or mask
dropped, two arguments swapped, a comparison or a constant changed. A seeded sample, in which every
file has its share, is judged in copies of the repository by the tests of `make test` that cover the
file (TOPICS), up to the first that fails. A mutant is killed, or survives, which is a hole in the
tests, or is equivalent for the reason that EQUIVALENT gives, or stays undecided where the time ends
first. `--all` puts those that are left to all the tests.
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
TEST_SECONDS, BYTES = 60, 8 << 30  # of CPU, and of memory: so that endless loops end
# the interpreter decides at import, so the kernels are run and compiled in two processes
IGNORED = ("compiled", "integrations", "test_docs.py")  # which quotes the code as it is laid out
INTERPRETED = ["tests", *(f"--ignore=tests/{name}" for name in IGNORED)]
COMPILED = ["tests/compiled"]
PROBLEMS = {
    "rows",
    "corrected",
    "pairs",
    "relations",
    "gram",
    "levels",
    "peers",
    "sorted_rows",
    "moments",
    "tokens",
    "linear",
}
# a part of a file's path, and the tests that cover it: those of its problem, what else is about it
TOPICS = [
    ("kernels/rows|_row_terms|_softmaxes", "rows infinities kd reduction kernels"),
    ("portable/rows", "rows infinities kd reduction memory"),
    ("corrected|label_aware", "corrected reduction"),
    ("levels|multi_level", "levels"),
    ("ensemble|_mixtures", "ensemble linear_teachers"),
    ("online|peers", "peers"),
    ("ema.py", "ema"),
    ("schedules", "schedules"),
    ("cross_tokenizer|likelihoods|sorted_rows|_vocabularies", "cross_tokenizer"),
    ("alignment", "alignment"),
    ("softened", "softened"),
    ("decoupled", "rows infinities kd"),
    ("kernels/pairs", "pairs kernels"),
    ("kernels/relations", "relations mirrored_angles kernels"),
    ("onednn", "onednn linear_chunks"),
    ("linear|_heads|_logits|_products", "linear linear_chunks linear_teachers"),
    ("moments|_features|_pages|feature.py", "moments moment_engines"),
    ("kernels/tokens", "tokens"),
    ("tokens", "tokens"),
    ("kernels/", "kernels rows pairs relations traffic"),
    ("portable/relations|relational", "relations memory mirrored_angles"),
    ("relations", "relations mirrored_angles errors"),
    ("portable/gram", "gram memory"),
    ("gram|correlation", "gram errors"),
    ("portable/.*pair", "pairs memory"),
    ("pairs|contrast", "pairs distributed errors"),
    ("self_dist|_crops", "self_distillation errors rows"),
    ("divergence|vanilla|problems/rows", "rows infinities kd reduction errors"),
    ("_chunks", "rows pairs relations gram memory"),
    ("modules", "modules"),
    ("__main__|_doctor", "backend doctor"),
    ("_ranks", "distributed pairs"),
    ("_backend", "backend decorator errors"),
    ("_op", "compile decorator reduction errors backend"),
    ("", "decorator errors reduction backend compile"),
]
EVERYWHERE = ["test_contracts", "test_engines", "test_any_input"]
COMPILED_LOSSES = {"rows": "forward_kl or jensen_shannon or kd", "relations": "rkd"}
COMPILED_LOSSES["moments"] = "hint or attention_transfer or embedding_mse"
COMPILED_LOSSES["tokens"] = "token_relation or tokens"
COMPILED_LOSSES["linear"] = "linear_kd"
COMPILED_LOSSES["pairs"] = "info_nce or clip_contrastive or siglip or sup_con or similarity_kl"
# a copy is found by PYTHONPATH, where the folder kernels/ is a package too
DESELECTED = "tests/test_backend.py::test_importing_fastkd_is_light_and_shadows_nothing"
LEFT = ("survived", "undecided")

# (file, function, edit as it is printed, why no test can see it)
EQUIVALENT = [
    (
        *("fastkd/_doctor.py", "_crops", "teacher.expand(2, -1, -1) → teacher.expand(3, -1, -1)"),
        "the doctor tries its losses with any number of crops",
    ),
    (
        *("fastkd/_loss.py", "loss.decorate.compute", "weights.detach() → weights"),
        "a comparison has no gradient",
    ),
    (
        *("fastkd/_loss.py", "_prepared"),
        "mask is not None and x.shape[:mask.ndim] == mask.shape → True",
        "every tensor beside a mask has a row for each example, and without one nothing is masked",
    ),
    (
        *("fastkd/problems/_crops.py", "tensors_of", "isinstance(crops, Tensor) → False"),
        "a tensor of crops is one of them after the other, which takes longer",
    ),
    (
        *("fastkd/portable/_pair_chunks.py", "PairChunks.shift", "4 * LARGEST → LARGEST"),
        "rows are shifted by their maxima instead, which takes longer and gives the same",
    ),
    (
        *("fastkd/portable/_pair_chunks.py", "PairChunks.shift", "4 * LARGEST → 5 * LARGEST"),
        "sums that come out too small send the rows to their maxima, as a larger bound does",
    ),
    (
        *("fastkd/portable/relations.py", "_angles"),
        "slopes[:, local].fill_diagonal_(0) → slopes[:, local]",
        "the Laplacian of the slopes cancels its diagonal",
    ),
    (
        *("fastkd/portable/pairs.py", "_Solver._pairs.of_chunk", "any(self.needs_grad) → True"),
        "slopes that nobody reads take time",
    ),
    ("fastkd/portable/_row_chunks.py", "", "1 << 23 → 1 << 24", "the size of a chunk on a GPU"),
    (
        *("fastkd/portable/_kept_pairs.py", "value_and_gradients"),
        "problem.classes is not None → True",
        "pairs without classes are left to chunks, which takes longer",
    ),
    (
        *("fastkd/portable/_soft_pairs.py", "value_and_gradients"),
        "len(student.q) * len(student.k) → len(student.k)",
        "more pairs than need it go the way that is exact, which takes longer",
    ),
    ("kernels/device.py", "rows_of", "size > 1 → size >= 1", "one row has narrower vectors"),
    (
        *("kernels/pairs/chunks.py", "Chunks.__init__"),
        "(False, False, False) → (False, False, True)",
        "a gradient in the scale that nobody reads takes time",
    ),
]

OPPOSITES = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Add: ast.Sub}
OPPOSITES |= {last: first for first, last in OPPOSITES.items()}
FACTORS = (ast.Mult, ast.Div, ast.FloorDiv, ast.Pow)
ENDS = {"min": "max", "minimum": "maximum", "amin": "amax", "clamp_min": "clamp_max"}
ENDS |= {largest: least for least, largest in ENDS.items()}
# swapped arguments change nothing, or fail at once
ANY_ORDER = ("add", "mul", "addcmul", "addcmul_", "logaddexp", "vecdot", "full", "map", "zip")
DROPPED_CALLS = "[a-z].*_|masked_fill|clamp.*|nan_to_num|detach|abs"
# calls that check types, speak to people, hint at something or fail at once with other arguments
IGNORED_CALLS = (
    "isinstance|hasattr|getattr|cast|TypeVar|warn|print|add_argument|.*Error"
    "|arange|static_assert|multiple_of|max_contiguous|assume"
)
IGNORED_NAMES = ("__repr__", "extra_repr", "num_warps", "num_stages", "stacklevel")
IGNORED_NODES = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)


class Mutant(NamedTuple):
    file: str
    number: int  # in the file
    line: int
    function: str  # qualified; empty outside of functions
    kind: str
    what: str  # old → new

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what stays the same when lines move."""
        return self.file, self.function, self.what

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.function}  {self.kind}: {self.what}"

    def apply(self, root: Path) -> None:
        """Write the file anew, without its comments."""
        tree = ast.parse((root / self.file).read_text())
        _, _, old, _, new = next(itertools.islice(places(tree), self.number, None))
        (root / self.file).write_text(ast.unparse(Replacement(old, new).visit(tree)))


class Replacement(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(file: str) -> Iterator[Mutant]:
    for number, place in enumerate(places(ast.parse((ROOT / file).read_text()))):
        function, shown, old, kind, new = place
        before, node = ast.unparse(shown), Replacement(old, new).visit(shown)
        after = ast.unparse(node)
        Replacement(new, old).visit(node)
        if before != after:  # arguments that are swapped may be the same
            what = " → ".join(" ".join(x.split())[:100] for x in (before, after))
            yield Mutant(file, number, old.lineno, function, kind, what)


def places(node: Any, function: str = "", parent: Any = None) -> Iterator[tuple]:
    """Yield the function, what to show, a node, and the kind and the node of each edit of it."""
    name = getattr(node, "name", getattr(node, "arg", ""))
    if isinstance(node, ast.Call) and re.fullmatch(IGNORED_CALLS, _name(node)):
        return
    if isinstance(node, IGNORED_NODES) or name in IGNORED_NAMES:
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{name}".lstrip(".")
    for old, kind, new in edits(node, function):
        shown = parent if isinstance(old, ast.Constant) and isinstance(parent, ast.expr) else old
        yield function, shown, old, kind, new
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not is_text | (field in ("annotation", "returns")):
                yield from places(child, function, node)


def edits(node: Any, function: str) -> Iterator[tuple[Any, str, Any]]:
    match node:
        case ast.BinOp(_, ast.BitAnd() | ast.BitOr()) if not function:
            return  # a union of types
        case ast.BinOp(left, op, right):
            kind = "factor dropped" if isinstance(op, FACTORS) else "term dropped"
            if type(op) in OPPOSITES:
                yield node, "sign flipped", ast.BinOp(left, OPPOSITES[type(op)](), right)
            if not isinstance(op, ast.MatMult):
                yield node, kind, left
            if isinstance(op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
                yield node, kind, right
        case ast.UnaryOp(op, operand):
            is_not = isinstance(op, ast.Not)
            yield node, "condition negated" if is_not else "sign flipped", operand
        case ast.Compare(left, [op], right) if type(op) in OPPOSITES:
            yield node, "comparison changed", ast.Compare(left, [OPPOSITES[type(op)]()], right)
        case ast.BoolOp(op, values):
            for dropped in values:
                rest = [x for x in values if x is not dropped]
                new = ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
                yield node, "condition dropped", new
        case ast.Call():
            yield from edits_of_call(node)
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            yield test, "condition ignored", ast.Constant(False)
            is_check = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
            if not (is_check or isinstance(node, ast.While)):
                yield test, "condition ignored", ast.Constant(True)
        case ast.Constant(bool() as value):
            yield node, "constant changed", ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            other = 1 - value if value in (0, 1) else value * 2 if value % 1 else value + 1
            yield node, "constant changed", ast.Constant(other)
        case ast.AugAssign(target, op, value):
            yield node, "operation dropped", ast.Pass()
            if type(op) in OPPOSITES:
                new = ast.AugAssign(target, OPPOSITES[type(op)](), value)
                yield node, "sign flipped", new
        case ast.Expr(ast.Call(ast.Attribute(attr="store" | "append" | "update"))):
            yield node, "store dropped", ast.Pass()


def edits_of_call(node: ast.Call) -> Iterator[tuple[Any, str, Any]]:
    name, func, args = _name(node), node.func, node.args
    if name in ENDS and isinstance(func, ast.Attribute):
        other = ast.Attribute(func.value, ENDS[name])
        yield node, "minimum and maximum swapped", ast.Call(other, args, node.keywords)
    for i in range(1, 0 if name in (*ENDS, *ANY_ORDER) else len(args)):
        if not any(isinstance(x, ast.Starred) for x in args[i - 1 : i + 1]):
            swapped = [*args[: i - 1], args[i], args[i - 1], *args[i + 1 :]]
            yield node, "arguments swapped", ast.Call(func, swapped, node.keywords)
    if any(x.arg == "mask" for x in node.keywords):
        rest = [x for x in node.keywords if x.arg not in ("mask", "other")]
        yield node, "mask dropped", ast.Call(func, args, rest)
    if name == "where" and len(args) == 3:
        yield node, "mask dropped", args[1]
    elif isinstance(func, ast.Attribute) and re.fullmatch(DROPPED_CALLS, name):
        yield node, "operation dropped", func.value


def _name(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def sample(drawn: list[Mutant], seed: int, number: int) -> list[Mutant]:
    """Return about `number` mutants: every file has its share, and in it the kinds take turns."""
    chosen = []
    for file, group in itertools.groupby(drawn, lambda mutant: mutant.file):
        of_file, turns = list(group), defaultdict(itertools.count)
        share = max(1, round(number * len(of_file) / len(drawn)))
        # a seed for each file, so that a change of one leaves the others' mutants alone
        random.Random(f"{seed} {file}").shuffle(of_file)
        of_file.sort(key=lambda mutant, turns=turns: next(turns[mutant.kind]))
        chosen += of_file[:share]
    return chosen


class Covering:
    """A plugin of pytest that selects and orders the tests of a file, and ends what never ends."""

    def __init__(self, file: str) -> None:
        topics = next(topics for part, topics in TOPICS if re.search(part, file)).split()
        self.near = [f"test_{x}" for x in topics]
        is_kernel = file.startswith("kernels/")
        is_engine = is_kernel or file.startswith("fastkd/portable/")
        engine = "triton" if is_kernel else "portable"
        self.others = {"formula", "portable", "triton"} - {engine} if is_engine else set()
        self.problems = PROBLEMS.intersection(topics) if is_engine else PROBLEMS
        others = EVERYWHERE if "doctor" not in topics else []
        self.selections = [[f"tests/{x}.py" for x in (*self.near, *others)]]
        if is_kernel:
            problems = sorted(self.problems & COMPILED_LOSSES.keys())
            losses = " or ".join(COMPILED_LOSSES[x] for x in problems)
            self.selections.append([*COMPILED, "-k", losses])

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Let the tests take turns, three cases of the topics' and then one of the others."""
        random.Random(0).shuffle(items)
        turns: dict[str, Any] = defaultdict(itertools.count)
        ranks = {}
        for item in filter(self.fits, items):
            is_near = item.path.stem in self.near
            ranks[item] = next(turns[item.nodeid.partition("[")[0]]) / (3 if is_near else 1)
        items[:] = sorted(ranks, key=ranks.__getitem__)

    def fits(self, item: Any) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        problem = getattr(parameters.get("case"), "problem", "")
        engine = str(parameters.get("engine", "")).partition(" ")[0]
        return engine not in self.others and (not problem or problem in self.problems)

    def pytest_runtest_setup(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 10 * TEST_SECONDS)


def judge(mutant: Mutant, seconds: float, whole: bool) -> tuple[str, str]:
    """Return what becomes of a mutant, and the test that fails or how the run breaks."""
    covering = None if whole else Covering(mutant.file)
    selections = covering.selections if covering else [INTERPRETED, COMPILED]
    return tested(selections, seconds, mutant, covering)


def tested(
    selections: list[list[str]],
    seconds: float,
    mutant: Mutant | None = None,
    covering: Covering | None = None,
) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "site")
        shutil.copytree(ROOT, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        if not (root / "fastkd" / "kernels").exists():
            (root / "fastkd" / "kernels").symlink_to("../kernels")
        if mutant:
            mutant.apply(root)
        fate, why = "survived", ""
        for selection in filter(None, selections):
            process = os.fork()
            if not process:
                run_tests(root, covering, selection, seconds)
            try:
                _, status = os.waitpid(process, 0)
            finally:
                with contextlib.suppress(ProcessLookupError):  # what the tests have started
                    os.killpg(process, signal.SIGKILL)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGVTALRM:
                fate, why = "undecided", f"no test failed in {seconds:.0f} s"
            elif os.WIFSIGNALED(status):
                return "killed", signal.Signals(os.WTERMSIG(status)).name
            elif os.WEXITSTATUS(status) not in (0, 5):  # 5: no test is selected
                output = (root / "output").read_text(errors="replace")
                failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
                return "killed", failed[1] if failed else output[-1000:]
    return fate, why


def run_tests(root: Path, covering: Covering | None, selection: list[str], seconds: float) -> None:
    """Become the process that runs the tests of a copy; torch is imported already."""
    try:
        os.setsid()
        output = os.open(root / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path[:] = [str(root), *(x for x in sys.path if x != str(ROOT / "tests"))]
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        options = ["-x", "-q", "-m", "not full", "-W", "ignore", "-p", "no:cacheprovider"]
        options += ["--deselect", DESELECTED]
        if COMPILED[0] in selection:
            os.environ["TRITON_INTERPRET"] = "0"
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *options, *selection])
        status = pytest.main([*options, *selection], plugins=[covering] if covering else [])
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["fastkd/", "kernels/"], help="what to break")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60, help="of CPU for a mutant's tests")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--all", action="store_true", help="put what is left to all the tests")
    parser.add_argument("--list", action="store_true", help="print the sample and judge nothing")
    options = parser.parse_args()
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/**/*.py"))]
    files = [x for x in files if re.match("(fastkd/(?!demo/|kernels/)|kernels/)", x)]
    every = [mutant for file in files for mutant in mutants(file)]
    reasons = {entry[:3]: entry[3] for entry in EQUIVALENT}
    if stale := reasons.keys() - {mutant.key for mutant in every}:
        raise SystemExit(f"EQUIVALENT has what the code does not have: {sorted(stale)}")
    drawn = [x for x in every if x.file.startswith(tuple(options.paths))]
    chosen = sample(drawn, options.seed, options.number)
    if options.list:
        return print(*chosen, f"{len(chosen)} of {len(drawn)}", sep="\n") or 0
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for module in ("torch", "triton.language", "numpy", "hypothesis"):
        importlib.import_module(module)  # once: each mutant is judged in a fork of this process
    found = {mutant: "equivalent" for mutant in chosen if mutant.key in reasons}
    noticed: set[str] = set()  # by which tests
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        for whole in (False, True) if options.all else (False,):
            left = [mutant for mutant in chosen if found.get(mutant) in (None, *LEFT)]
            seconds = 600 if whole else options.seconds
            judged = {pool.submit(judge, mutant, seconds, whole): mutant for mutant in left}
            for done in as_completed(judged):
                found[judged[done]], why = done.result()
                noticed |= {why} if "::" in why else set()
                print(f"{found[judged[done]]:9} {judged[done]}  [{why}]", flush=True)
        compiled = {test for test in noticed if test.startswith(COMPILED[0])}
        fate, why = pool.submit(tested, [[*noticed - compiled], [*compiled]], 3600).result()
    fates = ["killed", *LEFT, "equivalent"]
    for file in [*dict.fromkeys(mutant.file for mutant in chosen), ""]:
        counts = Counter(fate for mutant, fate in found.items() if file in ("", mutant.file))
        print(*(f"{counts[fate]:3} {fate}" for fate in fates), file or "in all", sep="  ")
    if fate == "killed":
        raise SystemExit(f"mend this first, because it fails without a mutant too: {why}")
    return 1 if "survived" in found.values() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Break the engines and the tests' tools one line at a time: the tests must notice every time.

    python tests/mutants.py [words]        mutants whose description or file holds every word

A mutant lives in a copy of the repository; one that survives is a hole in the tests. Engines are
put to the quick tests, each tool to its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from broken import MUTANTS
from mutant import (
    BUDGETS,
    CHUNK_LAUNCHES,
    CHUNK_SWEEPS,
    CHUNKS,
    CONTRAST_LAUNCHES,
    CONTRAST_PROBLEM,
    CONTRASTIVE,
    CONTRASTS,
    CORRELATION,
    CORRELATIONS,
    COUNTS,
    FLOOR,
    GATE,
    GROUP,
    GUARD,
    INTERPRETER,
    METER,
    MODULES,
    PAIRED,
    PAIRS,
    PORTABLE,
    PORTABLE_CONTRASTS,
    PORTABLE_RELATIONS,
    PORTABLE_SOFT,
    RELATIONAL,
    RELATIONS,
    SASS,
    SELF_DISTILLATION,
    SIDES,
    SIMILARITY_TILES,
    SMALL,
    SMALL_CONTRASTS,
    SOFT,
    SOFT_LAUNCHES,
    SOFT_TILES,
    Mutant,
)

ROOT = Path(__file__).parent.parent
CONTRASTIVE_KERNELS = [
    *(SIMILARITY_TILES, CONTRASTS, CONTRAST_LAUNCHES, SIDES),
    *(SOFT_TILES, SOFT_LAUNCHES),
]
CONTRASTIVE_LOSSES = [
    *(PORTABLE_CONTRASTS, CHUNKS, PORTABLE_SOFT),
    *(SOFT, CONTRASTIVE, PAIRED, CONTRAST_PROBLEM),
]

# each tool's own tests; those in tests/compiled run without the interpreter
_BUDGET_TESTS = [
    ["tests/compiled/test_budgets.py", "-k", "not keeps or (forward_kl and sm_90)"],
    ["tests/test_traffic.py", "-k", "budget and jensen_shannon"],
]
TESTS_OF_TOOLS = {
    FLOOR: [["tests/test_floor.py"]],
    METER: [["tests/test_meter.py"]],
    GUARD: [["tests/test_meter.py"]],
    INTERPRETER: [["tests/test_interpreter.py"]],
    GATE: [["tests/compiled/test_tools.py"]],
    SASS: [["tests/compiled/test_tools.py"]],
    COUNTS: _BUDGET_TESTS,
    BUDGETS: _BUDGET_TESTS,
}


def noticed(mutant: Mutant, applied: bool = True) -> str | None:
    """None if the tests notice; else what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__", "demo")
        for name in ("fastkd", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        shutil.copytree(ROOT / "kernels", root / "fastkd" / "kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "fastkd" / "demo").mkdir()
        if applied:
            mutant.apply(root)
        for selection in selections(mutant):
            command = [
                *(sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore"),
                *("-p", "no:cacheprovider", *selection),
            ]
            interpreted = "0" if "compiled" in selection[0] else "1"
            environment = {**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": interpreted}
            # in the folder: the package beside the real tests must not be found first
            run = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True
            )
            if run.returncode == 1:
                return None
            if run.returncode:
                return f"broke the run:\n{run.stdout[-2000:]}"
    return "survived"


def selections(mutant: Mutant) -> Iterator[list[str]]:
    """What to run, the quickest to notice first."""
    if mutant.file in TESTS_OF_TOOLS:
        yield from TESTS_OF_TOOLS[mutant.file]
        return
    if mutant.file in (PAIRS, RELATIONS, PORTABLE_RELATIONS, RELATIONAL, GROUP):
        relations = ["tests/test_relational.py", "tests/test_relational_training.py"]
        if mutant.file not in (PORTABLE_RELATIONS, GROUP):
            yield [*relations, "-m", "smoke", "-k", "triton"]
        if mutant.file != GROUP:
            yield [*relations, "-m", "smoke", "-k", "portable"]
        yield ["tests/test_distributed.py", "-k", "relations and 3"]
        return
    if mutant.file in (CHUNK_SWEEPS, CHUNK_LAUNCHES):
        yield ["tests/test_contrastive_kernels.py", "-m", "smoke", "-k", "chunks"]
        yield ["tests/test_contrastive_kernels.py", "-k", "chunks_of_half"]
        return
    names = ("contrastive", "similarity", "contrastive_kernels", "contrastive_training")
    contrasts = [*(f"tests/test_{name}.py" for name in names), "-k"]
    if mutant.file in CONTRASTIVE_KERNELS:
        yield [*contrasts, "triton or however or rank", "-m", "smoke"]
        yield [*contrasts, "triton and (dtype or any_scale or nan or kind) or rounded"]
        return
    if mutant.file == SMALL_CONTRASTS:
        yield [*contrasts, "few", "-m", "smoke"]
        yield [*contrasts, "few"]
        return
    if mutant.file in CONTRASTIVE_LOSSES:
        yield [*contrasts, "portable or close", "-m", "smoke"]
        yield [*contrasts, "not triton and (dtype or any_scale or alike or found or burned)"]
        yield ["tests/test_distributed.py", "-k", "contrasts and 3"]
        return
    if mutant.file in (CORRELATIONS, CORRELATION):
        yield ["tests/test_correlation.py", "-m", "smoke", "-k", "portable"]
        yield ["tests/test_correlation.py", "-k", "not compile"]
        return
    if mutant.file in (SELF_DISTILLATION, MODULES):
        yield ["tests/test_dino.py", "-m", "smoke", "-k", "not formula and not triton"]
        yield ["tests/test_distributed.py", "-k", "self_distillation and 3"]
        return
    engine: list[str] = []
    if mutant.file.startswith("kernels"):
        engine = ["-k", "not formula and not portable"]
        yield ["tests/test_kernels.py", "-m", "smoke"]
    elif mutant.file in (PORTABLE, SMALL):
        engine = ["-k", "not formula and not triton"]
        yield ["tests/test_value_and_gradient.py", "tests/test_kd.py", "-m", "smoke", *engine]
    ignored = [f"--ignore=tests/{name}" for name in ("compiled", "integrations")]
    yield ["tests", "-m", "smoke", *ignored, *engine]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if all(word in f"{m.file} {m}" for word in words)]
    alive, each_selection = 0, {str(list(selections(mutant))): mutant for mutant in chosen}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        unbroken = list(pool.map(lambda mutant: noticed(mutant, False), each_selection.values()))
        if any(outcome != "survived" for outcome in unbroken):
            raise SystemExit("the tests fail without any mutant: mend that first")
        for mutant, outcome in zip(chosen, pool.map(noticed, chosen), strict=True):
            alive += outcome is not None
            print(f"{'ALIVE' if outcome else 'killed':6}  {mutant.file}  {mutant}", flush=True)
            if outcome:
                print(f"        {outcome}")
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())

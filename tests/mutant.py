"""A mutant, and the files that have some."""

from dataclasses import dataclass
from pathlib import Path

TERMS, SWEEPS = "kernels/_divergence_terms.py", "kernels/_divergence_sweeps.py"
TILES, LAUNCHES = "kernels/_tiles.py", "kernels/divergence.py"
PORTABLE, SMALL = "fastkd/portable/divergence.py", "fastkd/portable/_small_divergence.py"
LOSSES = "fastkd/divergence.py"
PAIRS, RELATIONS = "kernels/_relational_tiles.py", "kernels/relational.py"
PORTABLE_RELATIONS, RELATIONAL = "fastkd/portable/relational.py", "fastkd/relational.py"
GROUP = "fastkd/_distributed.py"
CORRELATIONS, CORRELATION = "fastkd/portable/correlation.py", "fastkd/correlation.py"
SIMILARITY_TILES, CONTRASTS = "kernels/_similarity_tiles.py", "kernels/_contrastive_tiles.py"
CONTRAST_LAUNCHES, SIDES = "kernels/contrastive.py", "kernels/_similarities.py"
SOFT_TILES, SOFT_LAUNCHES = "kernels/_divergence_of_tiles.py", "kernels/similarity.py"
CHUNK_SWEEPS, CHUNK_LAUNCHES = "kernels/_chunk_sweeps.py", "kernels/_chunks.py"
PORTABLE_CONTRASTS, CHUNKS = "fastkd/portable/contrastive.py", "fastkd/portable/_similarities.py"
SMALL_CONTRASTS = "fastkd/portable/_small_contrastive.py"
PORTABLE_SOFT, SOFT = "fastkd/portable/similarity.py", "fastkd/similarity.py"
CONTRASTIVE, PAIRED = "fastkd/contrastive.py", "fastkd/_pairs.py"
CONTRAST_PROBLEM = "fastkd/_contrasts.py"
SELF_DISTILLATION, MODULES = "fastkd/self_distillation.py", "fastkd/modules.py"
METER, GUARD, INTERPRETER = "tests/meter.py", "tests/guard.py", "tests/interpreter.py"
GATE, SASS = "tests/gate.py", "tests/sass.py"
COUNTS, BUDGETS = "tests/counts.py", "tests/budgets.py"
FLOOR = "benchmarks/floor.py"


@dataclass(frozen=True)
class Mutant:
    file: str
    operator: str  # what kind of mistake
    old: str  # must be in the file once, or `place` times counting from 1
    new: str
    place: int = 1

    def __str__(self) -> str:
        return f"{self.operator}: {' '.join(self.old.split())} → {' '.join(self.new.split())}"

    def apply(self, root: Path) -> None:
        path = root / self.file.replace("kernels/", "fastkd/kernels/", 1)
        parts = path.read_text().split(self.old)
        if len(parts) <= self.place:
            raise SystemExit(f"{self.file} no longer has {self.old!r}: renew the table of mutants")
        before, after = self.old.join(parts[: self.place]), self.old.join(parts[self.place :])
        path.write_text(before + self.new + after)

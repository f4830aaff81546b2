"""How exact relational losses are where embeddings are alike: python benchmarks/accuracy.py

Relative errors against float64 on the same embeddings, loss / gradient by norm, N = 128: of fastkd
in both precisions, of the published code, of distances from a Gram matrix, and what one unit in the
last place of the student's embeddings changes. Only rounding decides, on every machine alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import published
import torch
import torch.nn.functional as F
from tables import Table
from torch import Tensor

import fastkd

RESULTS = Path(__file__).parent / "results"
N, D, D_TEACHER = 128, 128, 64
Loss = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clusters(n: int, distance: float, offset: float = 0.0) -> Tensor:
    """n of them on the unit sphere around the offset, and how far apart their members are."""
    centres = F.normalize(normal(n, D, seed=3)).repeat(N // n, 1)
    return centres + distance / (2 * D) ** 0.5 * normal(N, D, seed=4) + offset


def duplicated(student: bool, teacher: bool) -> Pair:
    """Four examples twice."""
    s, t = normal(N, D, seed=1), normal(N, D_TEACHER, seed=2)
    for x, wanted in ((s, student), (t, teacher)):
        if wanted:
            x[-4:] = x[:4]
    return s, t


def with_teacher(student: Tensor) -> Pair:
    return student, normal(N, D_TEACHER, seed=2)


def converged(noise: float) -> Pair:
    student = normal(N, D, seed=1)
    return student, 2 * student + noise * normal(N, D, seed=2)


def half(dtype: torch.dtype) -> Pair:
    student, teacher = with_teacher(normal(N, D, seed=1) + 2)
    return student.to(dtype), teacher.to(dtype)


DATA: dict[str, Callable[[], Pair]] = {
    "normal": lambda: with_teacher(normal(N, D, seed=1)),
    "of length 1": lambda: with_teacher(F.normalize(normal(N, D, seed=1))),
    "1 cluster of 1e-2, offset 100": lambda: with_teacher(clusters(1, 1e-2, 100.0)),
    "8 clusters of 1e-2": lambda: with_teacher(clusters(8, 1e-2)),
    "8 clusters of 1e-2, offset 100": lambda: with_teacher(clusters(8, 1e-2, 100.0)),
    "duplicates in both": lambda: duplicated(True, True),
    "duplicates in the teacher": lambda: duplicated(False, True),
    "duplicates in the student": lambda: duplicated(True, False),
    "student near its teacher": lambda: converged(1e-2),
    "bfloat16": lambda: half(torch.bfloat16),
    "float16": lambda: half(torch.float16),
}


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    return [value.detach().double(), torch.autograd.grad(value, student)[0].double()]


def one_step_away(x: Tensor) -> Tensor:
    """Each number of x one unit in the last place up or down."""
    infinity = torch.where(normal(*x.shape, seed=9) > 0, torch.inf, -torch.inf)
    return torch.nextafter(x, infinity.to(x))


def errors(loss: str, pair: Pair, engine: str = "portable") -> dict[str, list[float]]:
    """Of the loss and of its gradient, by implementation."""
    fused = getattr(fastkd, loss)
    student, teacher = pair
    with fastkd.backend("formula"):
        truth = value_and_gradient(fused, student.double(), teacher.double())

    def error(of: Loss, student: Tensor = student, teacher: Tensor = teacher) -> list[float]:
        found = value_and_gradient(of, student, teacher)
        return [
            float((x - true).norm() / true.norm()) for x, true in zip(found, truth, strict=True)
        ]

    with fastkd.backend(engine):
        found = {"fastkd": error(fused), "fastkd, high": error(partial(fused, precision="high"))}
    found["published"] = error(getattr(published, loss))
    found["Gram matrix"] = error(getattr(published, f"{loss}_from_gram"))
    if student.dtype == torch.float32:  # there is no such step in half precision
        moved = one_step_away(student).double()
        with fastkd.backend("formula"):
            found["last place"] = error(fused, moved, teacher.double())
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [
        {"loss": loss, "data": name, "errors": errors(loss, pair())}
        for loss in ("rkd_distance", "rkd_angle")
        for name, pair in DATA.items()
    ]
    columns = list(rows[0]["errors"])
    table = Table(
        f"Relative error against float64, loss / gradient, N = {N}, D = {D}",
        ["loss", "embeddings", *columns],
        [
            [row["loss"], row["data"], *(cell(row["errors"].get(name)) for name in columns)]
            for row in rows
        ],
        [
            "published: the reference implementation in the embeddings' dtype. Gram matrix: "
            "squared distances from products, and the law of cosines. last place: what one unit in "
            "the last place of the student's embeddings changes.",
            "A gradient of half-precision embeddings is itself rounded to half precision; float16 "
            "has few digits for numbers below 6e-5.",
            "Of duplicates in the student alone the published gradient is that of a division by "
            "1e-12; fastkd passes none between them.",
        ],
    )  # fmt: skip
    table.show()
    record = {"schema": 1, "label": "counted", "torch": torch.__version__, "rows": rows}
    (RESULTS / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "accuracy.md").write_text(table.markdown())


def cell(found: list[float] | None) -> str:
    return " / ".join(f"{x:.0e}" for x in found) if found else "–"


if __name__ == "__main__":
    main()

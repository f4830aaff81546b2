"""Count how exact relational losses are where embeddings are alike: python benchmarks/accuracy.py

Relative errors against float64 on the same embeddings, loss / gradient by norm, N = 128: of fastkd
in both precisions, of the published code, of distances from a Gram matrix, and what one unit in
the last place of the student's embeddings changes. Only rounding decides, though that of a matrix
product differs from one processor to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import checkout  # noqa: F401
import eager
import torch
import torch.nn.functional as F
from tables import section
from torch import Tensor

import fastkd

N, D, D_TEACHER = 128, 128, 64
Loss = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_teacher(student: Tensor) -> Pair:
    return student, normal(N, D_TEACHER, seed=2)


def clusters(n: int, distance: float, offset: float = 0.0) -> Pair:
    """Return n clusters on the unit sphere around the offset, whose members are so far apart."""
    centres = F.normalize(normal(n, D, seed=3)).repeat(N // n, 1)
    return with_teacher(centres + distance / (2 * D) ** 0.5 * normal(N, D, seed=4) + offset)


def duplicated(*networks: int) -> Pair:
    """Return embeddings of which four examples are there twice, in these of the two networks."""
    pair = with_teacher(normal(N, D, seed=1))
    for network in networks:
        pair[network][-4:] = pair[network][:4]
    return pair


def converged() -> Pair:
    student = normal(N, D, seed=1)
    return student, 2 * student + 1e-2 * normal(N, D, seed=2)


def half(dtype: torch.dtype) -> Pair:
    student, teacher = with_teacher(normal(N, D, seed=1) + 2)
    return student.to(dtype), teacher.to(dtype)


DATA: dict[str, Callable[[], Pair]] = {
    "normal": lambda: with_teacher(normal(N, D, seed=1)),
    "of length 1": lambda: with_teacher(F.normalize(normal(N, D, seed=1))),
    "1 cluster of 1e-2, offset 100": lambda: clusters(1, 1e-2, 100.0),
    "8 clusters of 1e-2": lambda: clusters(8, 1e-2),
    "8 clusters of 1e-2, offset 100": lambda: clusters(8, 1e-2, 100.0),
    "duplicates in both": lambda: duplicated(0, 1),
    "duplicates in the teacher": lambda: duplicated(1),
    "duplicates in the student": lambda: duplicated(0),
    "student near its teacher": converged,
    "bfloat16": lambda: half(torch.bfloat16),
    "float16": lambda: half(torch.float16),
}


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    return [value.detach().double(), torch.autograd.grad(value, student)[0].double()]


def one_step_away(x: Tensor) -> Tensor:
    """Return each number of x one unit in the last place up or down."""
    infinity = torch.where(normal(*x.shape, seed=9) > 0, torch.inf, -torch.inf)
    return torch.nextafter(x, infinity.to(x))


def errors(loss: str, pair: Pair, engine: str = "portable") -> dict[str, list[float]]:
    """Return the errors of the loss and of its gradient, by implementation."""
    fused = getattr(fastkd, loss)
    student, teacher = pair
    with fastkd.backend("formula"):
        truth = value_and_gradient(fused, student.double(), teacher.double())

    def error(of: Loss, student: Tensor = student, teacher: Tensor = teacher) -> list[float]:
        found = value_and_gradient(of, student, teacher)
        return [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]

    with fastkd.backend(engine):
        found = {"fastkd": error(fused), "fastkd, high": error(partial(fused, precision="high"))}
    found["published"] = error(getattr(eager, loss))
    found["Gram matrix"] = error(getattr(eager, f"{loss}_from_gram"))
    if student.dtype == torch.float32:  # because half precision has no such step
        moved = one_step_away(student).double()
        with fastkd.backend("formula"):
            found["last place"] = error(fused, moved, teacher.double())
    return found


def cell(found: list[float] | None) -> str:
    return " / ".join(f"{x:.0e}" for x in found) if found else "–"


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        (loss, name, errors(loss, pair()))
        for loss in ("rkd_distance", "rkd_angle")
        for name, pair in DATA.items()
    ]
    names = list(rows[0][2])
    print(
        section(
            f"Relative error against float64, loss / gradient, N = {N}, D = {D}: counted",
            ["loss", "embeddings", *names],
            [[loss, data, *(cell(found.get(x)) for x in names)] for loss, data, found in rows],
            "published: the reference implementation in the embeddings' dtype. Gram matrix: from "
            "squared distances and the law of cosines. last place: what one unit in the "
            "last place of the student's embeddings changes.",
            "A gradient of half-precision embeddings is itself rounded to half precision; float16 "
            "has few digits for numbers below 6e-5.",
            "For duplicates in the student alone the published gradient is that of a division by "
            f"1e-12; fastkd passes none between them. torch {torch.__version__}.",
        )
    )


if __name__ == "__main__":
    main()

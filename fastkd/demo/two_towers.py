"""Distillation of two towers like CLIP's: the halves of a handwritten digit find each other.

One tower embeds the upper half of an image, the other the lower one. The teacher learns from all
training images, a student of 0.3 times its size from 250 of them: alone, or also from how alike
the halves of different images are to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.demo import training
from fastkd.demo.training import N_TRAIN, load_images, per_cent, rows_of_student, train


class Halves(NamedTuple):
    """Embeddings of the upper and the lower halves of images."""

    upper: Tensor  # (N, D), of length 1
    lower: Tensor  # (N, D), of length 1
    scale: Tensor  # 0-dim, multiplies their products

    def take(self, rows: Tensor) -> Halves:
        """Return those of the images with these numbers."""
        return Halves(self.upper[rows], self.lower[rows], self.scale)


class TwoTowers(nn.Module):
    """A network for the upper halves of images and one for the lower halves."""

    def __init__(self, width: int, n_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(
                *(nn.Linear(32, width), nn.ReLU(), nn.Dropout(dropout)),
                *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
                nn.Linear(width, n_features),
            )
            for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # as CLIP starts

    def forward(self, images: Tensor) -> Halves:
        upper, lower = images.flatten(1).chunk(2, dim=1)
        features = F.normalize(self.upper(upper)), F.normalize(self.lower(lower))
        return Halves(*features, self.log_scale.exp())


def new_teacher() -> TwoTowers:
    return TwoTowers(128, n_features=64, dropout=0.1)


def new_student() -> TwoTowers:
    return TwoTowers(64, n_features=32)


# ------------------------------------------------------------- the methods, which are their losses

Loss = Callable[[Halves, Halves], Tensor]  # (student, teacher) of a batch


def alone(student: Halves, teacher: Halves) -> Tensor:
    return fastkd.clip_contrastive(*student)


def distilled(student: Halves, teacher: Halves) -> Tensor:
    """Add the divergence from the teacher's similarities, which are soft positives."""
    return fastkd.clip_contrastive(*student) + fastkd.similarity_kl(
        student.upper,
        teacher.upper,
        student_keys=student.lower,
        teacher_keys=teacher.lower,
        student_temperature=1 / student.scale,
        teacher_temperature=0.1,
        symmetric=True,
    )


class Method(NamedTuple):
    """A way to train two towers."""

    name: str
    loss: Loss


TEACHER = Method("teacher", alone)
ALONE = Method("student alone", alone)
DISTILLED = Method("student distilled", distilled)
METHODS = [ALONE, DISTILLED]

# --------------------------------------------------------------------------------------- training


class Fit(NamedTuple):
    """One trained model."""

    method: Method
    seed: int
    to_lower: float  # recall@1 of lower halves for upper ones, per cent
    to_upper: float  # the other way round


def experiment(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train the teacher, then one student for each of METHODS and each seed."""
    images = load_images(device)[0]
    images, test = images[:N_TRAIN], images[N_TRAIN:]
    torch.manual_seed(0)
    teacher = new_teacher().to(device)
    fit(teacher, alone, images, None, training.TEACHER_STEPS, seed=0)
    yield Fit(TEACHER, 0, *recall(embed(teacher, test)))

    for method in METHODS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            student = new_student().to(device)
            seen = images[rows_of_student(seed)]
            fit(student, method.loss, seen, embed(teacher, seen), steps, seed)
            yield Fit(method, seed, *recall(embed(student, test)))


def fit(
    model: TwoTowers, loss: Loss, images: Tensor, teacher: Any, steps: int, seed: int
) -> Tensor:
    """Train the model and return the loss of each step; `teacher` has Halves of the images."""

    def of_batch(rows: Tensor) -> Tensor:
        return loss(model(images[rows]), teacher and teacher.take(rows))

    return train(model, of_batch, len(images), steps, seed)


def embed(model: TwoTowers, images: Tensor) -> Halves:
    with torch.no_grad():
        return model.eval()(images)


def recall(halves: Halves) -> tuple[float, float]:
    """Return recall@1 of the lower halves for the upper ones and the other way round, per cent."""
    similarities = halves.upper @ halves.lower.mT
    right = torch.arange(len(similarities), device=similarities.device)
    return per_cent(similarities.argmax(1) == right), per_cent(similarities.argmax(0) == right)

"""Distillation without a teacher that was trained before, on scikit-learn's handwritten digits.

`MUTUAL` trains groups of students that teach each other. Each sees 250 images, 50 of them with a
label, and the answers of the others for all of them. `EMA` trains a network without labels: its own
moving average teaches it, by DINO, and its features are judged by a linear classifier that sees
50 labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.demo import training
from fastkd.demo.digits import (
    N_LABELLED,
    Data,
    few_labels,
    fit,
    load,
    new_student,
    new_teacher,
    no_teacher,
    predict,
)
from fastkd.demo.study import Fit, Method, Study
from fastkd.demo.training import IGNORED, N_STUDENT, N_TRAIN, per_cent, rows_of_student, train

# --------------------------------------------------------------- networks that teach each other


class Alone(nn.Module):
    """The cross-entropies of a group of students, each with the labels that there are."""

    n_students = 2

    def forward(self, logits: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> Tensor:
        losses = [F.cross_entropy(x, labels, ignore_index=IGNORED) for x in logits]
        return torch.stack(losses).sum()


class Mutual(Alone):
    """Deep mutual learning: besides, each learns from the others, on all images."""

    def __init__(self, n_students: int = 2) -> None:
        super().__init__()
        self.n_students = n_students
        self.others = fastkd.MutualKLLoss()

    def forward(self, logits: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits, teacher, labels) + self.others(logits)


class KD(Alone):
    """Plain distillation: besides, each learns from a trained teacher, on all images."""

    def forward(self, logits: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> Tensor:
        taught = [fastkd.forward_kl(x, teacher, temperature=4.0) for x in logits]
        return super().forward(logits, teacher, labels) + torch.stack(taught).sum()


TEACHER = Method("teacher", Alone)
GROUPS = (
    Method("labels alone", Alone),
    Method("each other, two", Mutual),
    Method("each other, three", lambda: Mutual(3)),
    Method("the teacher, KD", KD),
)


def groups(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train the teacher, then one group of students for each of GROUPS and each seed."""
    data, test = load(device)
    torch.manual_seed(0)
    teacher = new_teacher().to(device)
    fit(teacher, no_teacher, data, training.TEACHER_STEPS, seed=0)
    teacher.eval()
    with torch.no_grad():
        data = data._replace(teacher=teacher(data.images))
    accuracy = per_cent(predict(teacher, test) == test.labels)
    yield Fit(TEACHER, 0, (accuracy, accuracy))

    for method in GROUPS:
        for seed in range(seeds):
            seen, criterion = few_labels(data, seed), cast(Any, method.new_loss())
            torch.manual_seed(seed)
            students = nn.ModuleList(new_student().to(device) for _ in range(criterion.n_students))
            train_group(students, criterion, seen, steps, seed)
            yield Fit(method, seed, results_of(students, test))


def train_group(
    students: nn.ModuleList, criterion: nn.Module, data: Data, steps: int, seed: int
) -> None:
    def of_batch(rows: Tensor) -> Tensor:
        images, labels, teacher = data.take(rows)
        return criterion([student(images).logits for student in students], teacher.logits, labels)

    train(students, of_batch, len(data.images), steps, seed)


def results_of(students: nn.ModuleList, test: Data) -> tuple[float, float]:
    """Return the accuracy of a student, the mean over them, and that of their mean, per cent."""
    with torch.no_grad():
        answers = torch.stack([student(test.images).logits.softmax(-1) for student in students])
    together = answers.mean(0).argmax(-1) == test.labels
    return per_cent(answers.argmax(-1) == test.labels), per_cent(together)


MUTUAL = Study(
    name="mutual",
    title=f"{N_STUDENT} images, {N_LABELLED} of them with a label",
    about=(
        "Digits of scikit-learn: students that learn at the same time and teach each other, by "
        f"mutual_kl. The teacher, which learned all {N_TRAIN} labels before, is there for the last "
        "row alone."
    ),
    legend=(
        "Accuracy on 650 test images of one student, the mean over its group, and of the mean of "
        "the group's probabilities. Groups have two students where nothing else is said. Gain: "
        "points over labels alone, seed by seed. Wins: seeds with a gain."
    ),
    measures=("accuracy, %", "together, %"),
    n_gains=1,
    teacher=TEACHER,
    methods=GROUPS,
    experiment=groups,
)

# ---------------------------------------------------------- a network and its moving average

N_PROTOTYPES, N_CROPS, N_GLOBAL = 64, 4, 2
BATCH, LEARNING_RATE = 128, 3e-3


class Encoder(nn.Module):
    """A network for features, and a head for the outputs that DINO compares."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, N_PROTOTYPES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = F.normalize(self.body(images))
        return F.linear(features, F.normalize(self.head.weight))


class Pixels(nn.Module):
    """Pixels as features, of which nothing is trained."""


class DINO(nn.Module):
    """DINO's loss, with the decay of the average and the way in which it is centred."""

    def __init__(
        self,
        decay: Callable[[int], fastkd.schedules.Schedule],  # of the number of steps
        centering: str = "mean",
    ) -> None:
        super().__init__()
        self.decay = decay
        self.criterion = fastkd.DINOLoss(
            N_PROTOTYPES, centering=centering, teacher_temperature=0.05
        )


def _average(steps: int) -> fastkd.schedules.Schedule:
    return fastkd.schedules.cosine(0.96, 1.0, steps)


def _itself(steps: int) -> fastkd.schedules.Schedule:
    return fastkd.schedules.constant(0.0)


SUPERVISED = Method("all labels", Alone)
AVERAGES = (
    Method("nothing: pixels", Pixels),
    Method("itself, mean", lambda: DINO(_itself)),
    Method("its average, mean", lambda: DINO(_average)),
    Method("itself, Sinkhorn", lambda: DINO(_itself, "sinkhorn")),
    Method("its average, Sinkhorn", lambda: DINO(_average, "sinkhorn")),
)


def averages(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train a network with all labels, then one without any for each of AVERAGES and each seed."""
    data, test = load(device)
    torch.manual_seed(0)
    supervised = new_student().to(device)
    fit(supervised, no_teacher, data, training.TEACHER_STEPS, seed=0)
    yield Fit(SUPERVISED, 0, (per_cent(predict(supervised, test) == test.labels),))

    for method in AVERAGES:
        for seed in range(seeds):
            torch.manual_seed(seed)
            loss: Any = method.new_loss()
            features: nn.Module = nn.Flatten()
            if isinstance(loss, DINO):
                features = train_by_average(loss.to(device), data.images, steps, seed).body
            labelled = data.take(rows_of_student(seed)[:N_LABELLED])
            yield Fit(method, seed, (probed(features, labelled, test),))


def train_by_average(loss: DINO, images: Tensor, steps: int, seed: int) -> Any:
    """Return the average of a network that it has taught, without a label."""
    student = Encoder().to(images.device)
    teacher = fastkd.EMATeacher(student, loss.decay(steps))
    generator = torch.Generator().manual_seed(seed)

    def of_batch(rows: Tensor) -> Tensor:
        teacher.update(student)  # what the step before has made of it
        crops = [cropped(images[rows], generator) for _ in range(N_CROPS)]
        outputs = student(torch.cat(crops)).unflatten(0, (N_CROPS, -1))
        targets = teacher(torch.cat(crops[:N_GLOBAL])).unflatten(0, (N_GLOBAL, -1))
        return loss.criterion(outputs, targets)

    train(student, of_batch, len(images), steps, seed, BATCH, LEARNING_RATE)
    teacher.update(student)
    return teacher.module


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images that are turned, moved, made larger or smaller, and noisy, at random."""
    n = len(images)

    def uniform(size: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * size

    angle, scale = uniform(0.35), 1 + uniform(0.15)
    turned = torch.stack([scale * angle.cos(), -angle.sin(), uniform(0.25)], 1)
    other = torch.stack([angle.sin(), scale * angle.cos(), uniform(0.25)], 1)
    places = F.affine_grid(torch.stack([turned, other], 1), [*images.shape], align_corners=False)
    moved = F.grid_sample(images, places.to(images.device), align_corners=False)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return moved + 0.1 * noise


def probed(features: nn.Module, labelled: Data, test: Data) -> float:
    """Return the accuracy of ridge regression from features to labels, per cent."""
    with torch.no_grad():
        x, y = (F.normalize(features(data.images)) for data in (labelled, test))
    mean = x.mean(0)
    x, y = (x - mean).double(), (y - mean).double()
    target = F.one_hot(labelled.labels, 10).double() - 0.1
    penalty = 0.1 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(x.mT @ x + penalty, x.mT @ target)
    return per_cent((y @ weight).argmax(-1) == test.labels)


EMA = Study(
    name="ema",
    title=f"{N_TRAIN} images without a label, then {N_LABELLED} labels for a linear classifier",
    about=(
        "Digits of scikit-learn: a small perceptron that its own moving average, an EMATeacher, "
        "teaches by DINO. Another one of its kind learned all labels."
    ),
    legend=(
        "Accuracy on 650 test images of ridge regression from the features, mean ± standard "
        "deviation over the seeds. Gain: points over the pixels, seed by seed. Wins: seeds with a "
        "gain. The teacher is the network of the step before, itself, or its average; it is "
        "centred by the mean of its outputs or by Sinkhorn's iteration."
    ),
    measures=("accuracy, %",),
    n_gains=1,
    teacher=SUPERVISED,
    methods=AVERAGES,
    experiment=averages,
)

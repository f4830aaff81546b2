"""Distillation on scikit-learn's handwritten digits, real data that needs no download.

A convolutional teacher learns from all labels of the training images. Each student, a small
perceptron, gets 250 of the images, 50 of them with a label, and the teacher's outputs for them.
Only the loss differs between the students: a seed gives all of them the same start and batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd._backend import choose
from fastkd.demo import training
from fastkd.demo.training import N_TRAIN, load_images, per_cent, rows_of_student, train

N_LABELLED = 50  # of the images of a student
IGNORED = -100  # the label of an image without label, as in torch


class Output(NamedTuple):
    logits: Tensor  # (N, 10)
    features: Tensor  # (N, D), what the last layer reads


class Data(NamedTuple):
    images: Tensor  # (N, 1, 8, 8)
    labels: Tensor  # (N), IGNORED where there is none
    teacher: Any = None  # Output, computed once: the images are never augmented

    def take(self, rows: Tensor) -> Data:
        """Some of the examples."""
        teacher = self.teacher and Output(*(output[rows] for output in self.teacher))
        return Data(self.images[rows], self.labels[rows], teacher)


class Classifier(nn.Module):
    def __init__(self, *body: nn.Module, n_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(n_features, 10)

    def forward(self, images: Tensor) -> Output:
        features = self.body(images)
        return Output(self.head(features), features)


def new_teacher() -> Classifier:
    return Classifier(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.3)),
        n_features=64,
    )


def new_student() -> Classifier:
    return Classifier(
        *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        n_features=64,
    )


# ------------------------------------------------------------- the methods, which are their losses

Loss = Callable[[Output, Output, Tensor], Tensor]  # (student, teacher, labels) of a batch


def no_teacher(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits, labels, ignore_index=IGNORED)


def hard_labels(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """The teacher labels what has no label: how far does one get without soft targets?"""
    answers = teacher.logits.argmax(-1)
    return F.cross_entropy(student.logits, torch.where(labels == IGNORED, answers, labels))


def kd(**options: Any) -> Loss:
    """Cross-entropy on the labelled images, a divergence from the teacher on all of them."""

    def loss(student: Output, teacher: Output, labels: Tensor) -> Tensor:
        return fastkd.kd(student.logits, teacher.logits, labels, distill_ignored=True, **options)

    return loss


def eager_kd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """What `kd()` replaces."""
    log_q = F.log_softmax(student.logits / 4, dim=-1)
    p = F.softmax(teacher.logits / 4, dim=-1)
    divergence = F.kl_div(log_q, p, reduction="batchmean") * 4**2
    return 0.5 * F.cross_entropy(student.logits, labels, ignore_index=IGNORED) + 0.5 * divergence


def logit_mse(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return 0.5 * supervised + 0.5 * fastkd.logit_mse(student.logits, teacher.logits)


def rkd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Cross-entropy on the labelled images; on all of them the teacher's distances and angles."""
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return supervised + fastkd.rkd(student.features, teacher.features)


def kd_and_rkd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return kd()(student, teacher, labels) + fastkd.rkd(student.features, teacher.features)


def contrast(student: Output, teacher: Output) -> Tensor:
    """A student's features find the teacher's of the same image among all of the batch.

    Others of the same class are negatives too. The widths agree: no projection is trained.
    """
    return 4 * fastkd.info_nce(student.features, teacher.features, temperature=0.2)


def contrastive(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return supervised + contrast(student, teacher)


def kd_and_contrastive(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return kd()(student, teacher, labels) + contrast(student, teacher)


class Method(NamedTuple):
    name: str
    loss: Loss
    uses: Callable | None = None  # the function of fastkd in it
    all_labels: bool = False  # whether the student gets all the images and labels of the teacher

    def engine(self, device: str) -> str:
        """What computes the loss."""
        if self.uses is None:
            return "PyTorch"
        if getattr(self.uses, "fused", True) is None:
            return "formula"
        tensors = [torch.empty(0, device=device)]
        return choose(tensors, getattr(self.uses, "has_kernels", True))


TEACHER = Method("teacher", no_teacher, all_labels=True)
NO_TEACHER = Method("no teacher", no_teacher)
KD = Method("KD, forward KL", kd(), fastkd.kd)
EAGER_KD = Method("KD, forward KL, eager", eager_kd)
METHODS = [
    NO_TEACHER,
    Method("teacher's hard labels", hard_labels),
    EAGER_KD,
    KD,
    Method("KD, reverse KL", kd(divergence="reverse_kl"), fastkd.kd),
    Method("KD, Jensen-Shannon", kd(divergence="jensen_shannon"), fastkd.kd),
    Method("KD, skew KL", kd(divergence="skew_kl"), fastkd.kd),
    Method("KD, symmetric KL", kd(divergence="symmetric_kl"), fastkd.kd),
    Method("KD, total variation", kd(divergence="total_variation"), fastkd.kd),
    Method("logit MSE", logit_mse, fastkd.logit_mse),
    Method("relational KD", rkd, fastkd.rkd),
    Method("KD + relational KD", kd_and_rkd, fastkd.rkd),
    Method("contrastive KD", contrastive, fastkd.info_nce),
    Method("KD + contrastive KD", kd_and_contrastive, fastkd.info_nce),
    NO_TEACHER._replace(all_labels=True),
    KD._replace(all_labels=True),
]

# --------------------------------------------------------------------------------------- training


def fit(model: Classifier, loss: Loss, data: Data, steps: int, seed: int) -> Tensor:
    """The loss of each step."""

    def of_batch(rows: Tensor) -> Tensor:
        images, labels, teacher = data.take(rows)
        return loss(model(images), teacher, labels)

    return train(model, of_batch, len(data.images), steps, seed)


class Fit(NamedTuple):
    """One trained model."""

    method: Method
    seed: int
    accuracy: float  # on the test images, per cent
    agreement: float  # test images on which it gives the teacher's answer, per cent
    losses: Tensor


def experiment(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """The teacher, then for each of METHODS a student for each seed."""
    data, test = load(device)
    torch.manual_seed(0)
    teacher = new_teacher().to(device)
    losses = fit(teacher, no_teacher, data, training.TEACHER_STEPS, seed=0)
    teacher.eval()
    with torch.no_grad():
        data = data._replace(teacher=teacher(data.images))
    answers = predict(teacher, test)
    yield Fit(TEACHER, 0, per_cent(answers == test.labels), 100.0, losses)

    for method in METHODS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            student = new_student().to(device)
            seen = data if method.all_labels else few_labels(data, seed)
            losses = fit(student, method.loss, seen, steps, seed)
            predicted = predict(student, test)
            accuracy, agreement = predicted == test.labels, predicted == answers
            yield Fit(method, seed, per_cent(accuracy), per_cent(agreement), losses)


def load(device: str) -> tuple[Data, Data]:
    """Those for training and for the test."""
    images, labels = load_images(device)
    return (
        Data(images[:N_TRAIN], labels[:N_TRAIN]),
        Data(images[N_TRAIN:], labels[N_TRAIN:]),
    )


def few_labels(data: Data, seed: int) -> Data:
    """What a student sees: other images and other labels for each seed."""
    few = data.take(rows_of_student(seed))
    few.labels[N_LABELLED:] = IGNORED
    return few


def predict(model: Classifier, data: Data) -> Tensor:
    with torch.no_grad():
        return model(data.images).logits.argmax(-1)

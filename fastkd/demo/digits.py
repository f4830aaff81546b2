"""Distillation on scikit-learn's handwritten digits, real data that needs no download.

A convolutional teacher learns from all labels of the training images. Each student, a small
perceptron or a convolutional network, gets 250 of the images, 50 of them with a label, and the
teacher's outputs for them. Only the loss differs between the students of one kind: a seed gives all
of them the same start and batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd._backend import choose
from fastkd.demo import training
from fastkd.demo.training import IGNORED, N_TRAIN, load_images, per_cent, rows_of_student, train

N_LABELLED = 50  # of the images of a student
N_RELATED = 64  # images of a batch whose relations are compared: the work grows with their cube


class Output(NamedTuple):
    """Outputs of a classifier."""

    logits: Tensor  # (N, 10)
    features: Tensor  # (N, D), inputs of the last layer
    maps: tuple[Tensor, ...] = ()  # (N, C, H, W), of each convolution

    def take(self, rows: Tensor) -> Output:
        """Return what belongs to the images with these numbers."""
        maps = tuple(x[rows] for x in self.maps)
        return Output(self.logits[rows], self.features[rows], maps)


class Data(NamedTuple):
    """Images, their labels, and the outputs of the teacher for them."""

    images: Tensor  # (N, 1, 8, 8)
    labels: Tensor  # (N), IGNORED if an image has none
    teacher: Any = None  # Output, computed once because the images are never augmented

    def take(self, rows: Tensor) -> Data:
        """Return the examples with these numbers."""
        return Data(self.images[rows], self.labels[rows], self.teacher and self.teacher.take(rows))


class Classifier(nn.Module):
    """A network of convolutions, if any, that ends in features and a linear layer."""

    def __init__(self, *body: nn.Module, n_features: int, channels: Sequence[int] = ()) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n, m, 3, padding=1, stride=1 + i)
            for i, (n, m) in enumerate(itertools.pairwise((1, *channels)))
        )
        self.body = nn.Sequential(nn.Flatten(), *body)
        self.head = nn.Linear(n_features, 10)

    def forward(self, images: Tensor) -> Output:
        x, maps = images, list[Tensor]()
        for convolution in self.convolutions:
            x = convolution(x).relu()
            maps.append(x)
        features = self.body(x)
        return Output(self.head(features), features, tuple(maps))


TEACHER_CHANNELS, STUDENT_CHANNELS = (16, 32), (4, 8)


def new_teacher() -> Classifier:
    return Classifier(
        *(nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.3)),
        n_features=64,
        channels=TEACHER_CHANNELS,
    )


def new_student() -> Classifier:
    return Classifier(*(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), n_features=64)


def new_convolutional_student() -> Classifier:
    return Classifier(*(nn.Linear(128, 64), nn.ReLU()), n_features=64, channels=STUDENT_CHANNELS)


# ------------------------------------------------------------- the methods, which are their losses

Loss = Callable[[Output, Output, Tensor], Tensor]  # (student, teacher, labels) of a batch


def no_teacher(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits, labels, ignore_index=IGNORED)


def hard_labels(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Compute the cross-entropy, with the teacher's answers in place of missing labels."""
    answers = teacher.logits.argmax(-1)
    return F.cross_entropy(student.logits, torch.where(labels == IGNORED, answers, labels))


def kd(**options: Any) -> Loss:
    """Return a loss: cross-entropy on the labelled images plus a divergence on all of them."""

    def loss(student: Output, teacher: Output, labels: Tensor) -> Tensor:
        return fastkd.kd(student.logits, teacher.logits, labels, distill_ignored=True, **options)

    return loss


def eager_kd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Compute what `kd()` computes, in plain PyTorch."""
    log_q = F.log_softmax(student.logits / 4, dim=-1)
    p = F.softmax(teacher.logits / 4, dim=-1)
    divergence = F.kl_div(log_q, p, reduction="batchmean") * 4**2
    return 0.5 * F.cross_entropy(student.logits, labels, ignore_index=IGNORED) + 0.5 * divergence


def logit_mse(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return 0.5 * supervised + 0.5 * fastkd.logit_mse(student.logits, teacher.logits)


def relations(student: Output, teacher: Output) -> Tensor:
    """Compute relational distillation of half of the batch, which is in random order."""
    return fastkd.rkd(student.features[:N_RELATED], teacher.features[:N_RELATED])


def rkd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Compute cross-entropy on the labelled images plus relational distillation."""
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return supervised + relations(student, teacher)


def kd_and_rkd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return kd()(student, teacher, labels) + relations(student, teacher)


def contrast(student: Output, teacher: Output) -> Tensor:
    """Compute how hard it is to find the teacher's features of an image by the student's.

    Other images of the same class are negatives too. No projection is trained, because both
    networks have features of one width.
    """
    return 4 * fastkd.info_nce(student.features, teacher.features, temperature=0.2)


def contrastive(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    supervised = F.cross_entropy(student.logits, labels, ignore_index=IGNORED)
    return supervised + contrast(student, teacher)


def kd_and_contrastive(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return kd()(student, teacher, labels) + contrast(student, teacher)


class Hint(nn.Module):
    """Cross-entropy on the labelled images plus the teacher's last maps, by a regressor, on all."""

    def __init__(self) -> None:
        super().__init__()
        self.regressor = fastkd.HintLoss(
            STUDENT_CHANNELS[-1], TEACHER_CHANNELS[-1], projector="conv1x1"
        )

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        supervised = no_teacher(student, teacher, labels)
        return supervised + 10 * self.regressor(student.maps[-1], teacher.maps[-1])


def attention(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Compute cross-entropy on the labelled images plus attention transfer on all."""
    supervised = no_teacher(student, teacher, labels)
    return supervised + 50 * fastkd.attention_transfer(student.maps, teacher.maps)


class Method(NamedTuple):
    """A way to train a student: its loss, its data and the student."""

    name: str
    loss: Loss | type[nn.Module]  # a class where something is trained with the student
    uses: Any = None  # the function of fastkd that it calls
    all_labels: bool = False  # whether the student sees all that the teacher saw
    new_student: Callable[[], Classifier] = new_student

    def engine(self, device: str) -> str:
        """Return the name of what computes the loss."""
        if self.uses is None:
            return "PyTorch"
        return choose([torch.empty(0, device=device)], self.uses.has_kernels)


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
    *(
        method._replace(new_student=new_convolutional_student)
        for method in (
            NO_TEACHER,
            KD,
            Method("feature KD, hint", Hint, fastkd.hint),
            Method("feature KD, attention", attention, fastkd.attention_transfer),
            Method("relational KD", rkd, fastkd.rkd),
            Method("contrastive KD", contrastive, fastkd.info_nce),
        )
    ),
]

# --------------------------------------------------------------------------------------- training


def fit(
    model: Classifier, loss: Loss | type[nn.Module], data: Data, steps: int, seed: int
) -> Tensor:
    """Train the model and return the loss of each step."""
    compute: Any = loss
    trained = nn.ModuleList([model])
    if isinstance(loss, type):
        compute = loss().to(data.images.device)
        trained.append(compute)

    def of_batch(rows: Tensor) -> Tensor:
        images, labels, teacher = data.take(rows)
        return compute(model(images), teacher, labels)

    return train(trained, of_batch, len(data.images), steps, seed)


class Fit(NamedTuple):
    """One trained model."""

    method: Method
    seed: int
    accuracy: float  # on the test images, per cent
    agreement: float  # test images on which it gives the teacher's answer, per cent
    losses: Tensor


def experiment(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train the teacher, then one student for each of METHODS and each seed."""
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
            student = method.new_student().to(device)
            seen = data if method.all_labels else few_labels(data, seed)
            losses = fit(student, method.loss, seen, steps, seed)
            predicted = predict(student, test)
            accuracy, agreement = predicted == test.labels, predicted == answers
            yield Fit(method, seed, per_cent(accuracy), per_cent(agreement), losses)


def load(device: str) -> tuple[Data, Data]:
    """Return the training data and the test data."""
    images, labels = load_images(device)
    return (
        Data(images[:N_TRAIN], labels[:N_TRAIN]),
        Data(images[N_TRAIN:], labels[N_TRAIN:]),
    )


def few_labels(data: Data, seed: int) -> Data:
    """Return the images and the labels that a student sees, others for each seed."""
    seen = data.take(rows_of_student(seed))
    seen.labels[N_LABELLED:] = IGNORED
    return seen


def predict(model: Classifier, data: Data) -> Tensor:
    with torch.no_grad():
        return model(data.images).logits.argmax(-1)

"""Scenes drawn from handwritten digits: what is where, and how far are the edges of its box?

A synthetic task of dense prediction on real digits: each scene has some of scikit-learn's digits in
several sizes on noise. A network says for each place of a grid which digit covers it, if any, and
for the four edges of that digit's box a distribution over distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.demo.study import Fit, Method, Study, fit
from fastkd.demo.training import IGNORED, N_TRAIN, load_images, per_cent

SIZE, STRIDE, N_DIGITS = 32, 2, 2  # pixels of a side, those of a place, digits of a scene
N_CLASSES, N_BINS = 6, 16  # the background and the digits 0 to 4; whole pixels to an edge
N_TEACHER, N_STUDENT, N_LABELLED, N_TEST = 2000, 400, 40, 200  # scenes
TEACHER_WIDTH, STUDENT_WIDTH = 32, 12
TEACHER_STEPS, BATCH, LEARNING_RATE = 500, 32, 2e-2


class Scenes(NamedTuple):
    """N scenes and their labels on a grid of G × G places."""

    images: Tensor  # [N, 1, SIZE, SIZE]
    classes: Tensor  # [N, G, G], 0 is the background, IGNORED where there is no label
    distances: Tensor  # [N, 4, G, G], to the left, upper, right and lower edge; else IGNORED

    def take(self, rows: Tensor) -> Scenes:
        """Return the scenes with these numbers."""
        return Scenes(*(x[rows] for x in self))


class Output(NamedTuple):
    """Outputs of a network for N scenes."""

    features: Tensor  # [N, width, G, G]
    classes: Tensor  # logits [N, N_CLASSES, G, G]
    edges: Tensor  # logits [N, 4, G, G, N_BINS]

    def take(self, rows: Tensor) -> Output:
        """Return what belongs to the scenes with these numbers."""
        return Output(*(x[rows] for x in self))

    def score(self) -> Tensor:
        """Return how sure the network is of a digit at each place, [N, G, G]."""
        return 1 - self.classes.softmax(1)[:, 0]


def draw(images: Tensor, digits: Tensor, n_scenes: int, seed: int) -> Scenes:
    """Return scenes of some of the images, at random places and in random sizes."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    canvas = 0.3 * torch.rand(n_scenes, 1, SIZE, SIZE, generator=generator)
    classes = torch.zeros(n_scenes, SIZE, SIZE, dtype=torch.int64)
    distances = torch.full((n_scenes, 4, SIZE, SIZE), IGNORED)
    for scene in range(n_scenes):
        for _ in range(N_DIGITS):
            which, side = whole(0, len(images)), whole(8, N_BINS)
            left, top = whole(0, SIZE - side + 1), whole(0, SIZE - side + 1)
            digit = F.interpolate(images[None, which], (side, side), mode="bilinear")[0, 0]
            box = slice(top, top + side), slice(left, left + side)
            ink = digit > 0.3
            canvas[scene, 0][box] = torch.maximum(canvas[scene, 0][box], digit)
            classes[scene][box].masked_fill_(ink, int(digits[which]) + 1)
            steps = torch.arange(side)
            to_edges = (steps, steps[:, None], side - 1 - steps, side - 1 - steps[:, None])
            for edge, distance in enumerate(to_edges):
                own = distances[scene, edge][box]
                own.copy_(torch.where(ink, distance, own))
    places = slice(STRIDE // 2, None, STRIDE)
    return Scenes(canvas, classes[:, places, places], distances[..., places, places])


class Network(nn.Module):
    """Convolutions that see more and more around a place, and two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1, stride=STRIDE), nn.BatchNorm2d(width), nn.ReLU()),
            *(
                layer
                for dilation in (1, 2, 2)
                for layer in (
                    nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            ),
        )
        self.classes = nn.Conv2d(width, N_CLASSES, 1)
        self.edges = nn.Conv2d(width, 4 * N_BINS, 1)

    def forward(self, scenes: Scenes) -> Output:
        features = self.body(scenes.images)
        edges = self.edges(features).unflatten(1, (4, N_BINS)).movedim(2, -1)
        return Output(features, self.classes(features), edges)


# ------------------------------------------------------------- the methods, which are their losses


class NoTeacher(nn.Module):
    """Cross-entropies of the classes and of the distances, where there are labels."""

    def forward(self, student: Output, teacher: Output, scenes: Scenes) -> Tensor:
        of_classes = F.cross_entropy(student.classes, scenes.classes, ignore_index=IGNORED)
        edges, distances = student.edges.flatten(0, -2), scenes.distances.flatten()
        is_labelled = distances != IGNORED
        of_edges = F.cross_entropy(edges, distances, ignore_index=IGNORED, reduction="sum")
        return of_classes + of_edges / is_labelled.sum().clamp(min=1)


class PixelKD(NoTeacher):
    """KL of the classes at each place."""

    def forward(self, student: Output, teacher: Output, scenes: Scenes) -> Tensor:
        classes = (x.movedim(1, -1) for x in (student.classes, teacher.classes))
        return super().forward(student, teacher, scenes) + fastkd.forward_kl(*classes)


class ChannelWise(NoTeacher):
    """CWD: where in the scene is each class?"""

    def forward(self, student: Output, teacher: Output, scenes: Scenes) -> Tensor:
        of_channels = fastkd.channel_wise(student.classes, teacher.classes, temperature=4.0)
        return super().forward(student, teacher, scenes) + 0.3 * of_channels


class Localization(NoTeacher):
    """LD: how far are the edges, where the teacher sees a digit?"""

    def forward(self, student: Output, teacher: Output, scenes: Scenes) -> Tensor:
        weights = teacher.score()[:, None].expand(-1, 4, -1, -1)
        of_edges = fastkd.localization(
            student.edges, teacher.edges, temperature=2.0, weights=weights
        )
        return super().forward(student, teacher, scenes) + of_edges


class Both(ChannelWise, Localization):
    """CWD and LD."""


class WeightedHint(NoTeacher):
    """The teacher's features, where it sees a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.hint = fastkd.HintLoss(STUDENT_WIDTH, TEACHER_WIDTH, projector="conv1x1")

    def forward(self, student: Output, teacher: Output, scenes: Scenes) -> Tensor:
        of_features = self.hint(student.features, teacher.features, weights=teacher.score())
        return super().forward(student, teacher, scenes) + of_features


TEACHER = Method("teacher", NoTeacher)
METHODS = (
    Method("no teacher", NoTeacher),
    Method("KD of each place", PixelKD),
    Method("channel-wise (CWD)", ChannelWise),
    Method("localization (LD)", Localization),
    Method("CWD + LD", Both),
    Method("hint, weighted", WeightedHint),
)

# --------------------------------------------------------------------------------------- training


def experiment(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train the teacher, then one student for each of METHODS and each seed."""
    images, digits = load_images("cpu")

    def new(part: slice, n_scenes: int, seed: int) -> Scenes:
        is_used = digits[part] < N_CLASSES - 1
        scenes = draw(images[part][is_used], digits[part][is_used], n_scenes, seed)
        return Scenes(*(x.to(device) for x in scenes))

    test = new(slice(N_TRAIN, None), N_TEST, seed=1)
    torch.manual_seed(0)
    teacher = Network(TEACHER_WIDTH).to(device)
    fit(
        TEACHER,
        teacher,
        new(slice(N_TRAIN), N_TEACHER, 0),
        None,
        TEACHER_STEPS,
        0,
        BATCH,
        LEARNING_RATE,
    )
    yield Fit(TEACHER, 0, measure(teacher, test))

    for seed in range(seeds):
        seen = new(slice(N_TRAIN), N_STUDENT, seed=2 + seed)
        for labels in seen[1:]:
            labels[N_LABELLED:] = IGNORED
        taught = predict(teacher, seen)  # once, because scenes are never augmented
        for method in METHODS:
            torch.manual_seed(seed)
            student = Network(STUDENT_WIDTH).to(device)
            fit(method, student, seen, taught, steps, seed, BATCH, LEARNING_RATE)
            yield Fit(method, seed, measure(student, test))


def predict(model: Network, scenes: Scenes) -> Output:
    with torch.no_grad():
        return model.eval()(scenes)


def measure(model: Network, scenes: Scenes) -> tuple[float, float]:
    """Return the mean IoU of the classes, and that of the boxes at places with a digit."""
    output = predict(model, scenes)
    found, true = (
        F.one_hot(x, N_CLASSES).bool().flatten(0, -2)
        for x in (output.classes.argmax(1), scenes.classes)
    )
    of_classes = (found & true).sum(0) / (found | true).sum(0).clamp(min=1)
    has_digit = scenes.distances[:, 0] >= 0
    # a box spreads from its place, so that distances alone tell how two boxes overlap
    a, b = (
        (x.movedim(1, 0)[:, has_digit].double() + 0.5)
        for x in (output.edges.argmax(-1), scenes.distances)
    )
    shared = torch.minimum(a, b)
    areas = [(x[0] + x[2]) * (x[1] + x[3]) for x in (a, b, shared)]
    return per_cent(of_classes), per_cent(areas[2] / (areas[0] + areas[1] - areas[2]))


STUDY = Study(
    name="segmentation",
    title=f"{N_STUDENT} scenes, {N_LABELLED} of them with labels",
    about=(
        f"Drawn scenes, a synthetic task: {N_DIGITS} real digits of scikit-learn in several sizes "
        f"on noise, {SIZE}×{SIZE} pixels. The teacher has {TEACHER_WIDTH} channels and learned "
        f"from {N_TEACHER} labelled scenes, its students have {STUDENT_WIDTH}."
    ),
    legend=(
        f"On {N_TEST} scenes of other digits, mean ± standard deviation over the seeds: mean "
        "intersection over union of the classes, and of the predicted boxes at places with a "
        "digit. Gain: points over no teacher, seed by seed. Wins: seeds with a gain."
    ),
    measures=("mIoU, %", "boxes, %"),
    n_gains=2,
    teacher=TEACHER,
    methods=METHODS,
    experiment=experiment,
)

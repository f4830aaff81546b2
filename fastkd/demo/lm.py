"""Distillation of a language model: which character of Python's reference comes next?

The teacher, a transformer of three layers, learns from the text. A student of two layers and half
the width learns from the same text, alone or also from the teacher's predictions. Then it samples
text of its own, and the teacher says how likely each of its characters is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.demo.training import train
from fastkd.linear import linear_kd

TEACHER_WIDTH, STUDENT_WIDTH, N_HEADS = 96, 48, 4
TEACHER_LAYERS, STUDENT_LAYERS = 3, 2
LENGTH, BATCH = 64, 16
TEACHER_STEPS, LEARNING_RATE = 900, 4e-3
ALPHA = 0.5  # the share of the cross-entropy
PROMPT, N_SAMPLED = 16, 32  # characters of the text, and those that the student adds
N_PROMPTS = 96  # about how many are continued to measure
OWN_STEPS, OWN_BATCH, OWN_LEARNING_RATE = 40, 32, 1e-3


class Data(NamedTuple):
    """Windows of text, as numbers of characters; each begins with the last one of another."""

    windows: Tensor  # [N, LENGTH + 1], to learn from
    held_out: Tensor  # [M, LENGTH + 1]
    characters: str  # all that occur


def load(device: str) -> Data:
    """Return the text, of which the last tenth is held out.

    A paragraph that stands in several topics is there once, otherwise what is held out would be
    known already.
    """
    paragraphs = (x for topic in topics.values() for x in re.split(r"\n\s*\n", topic.strip()))
    text = "\n\n".join(dict.fromkeys(paragraphs))
    characters = sorted({*text})
    number = {character: i for i, character in enumerate(characters)}
    codes = torch.tensor([number[character] for character in text], device=device)
    parts = codes.split([n := len(codes) * 9 // 10, len(codes) - n])
    windows, held_out = (x.unfold(0, LENGTH + 1, LENGTH) for x in parts)
    return Data(windows, held_out, "".join(characters))


class Layer(nn.Module):
    """Attention to what came before and a perceptron, each added to what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for y in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.before_perceptron(x))


class LanguageModel(nn.Module):
    """A transformer that returns its last hidden states, from which its head makes logits."""

    def __init__(self, n_characters: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(n_characters, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_characters, bias=False)
        nn.init.normal_(self.characters.weight, std=0.1)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places[: characters.shape[1]]
        return self.norm(self.layers(x))


# ------------------------------------------------------------- the methods, which are their losses


class Batch(NamedTuple):
    """Hidden states of both networks with their heads, and the characters that come next."""

    student: Tensor  # [..., width]
    student_head: Tensor  # [V, width]
    teacher: Tensor  # [..., width of the teacher]
    teacher_head: Tensor  # [V, width of the teacher]
    labels: Tensor  # [...]


def alone(batch: Batch) -> Tensor:
    logits = batch.student @ batch.student_head.mT
    return F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten())


def distilled(batch: Batch) -> Tensor:
    return linear_kd(*batch, alpha=ALPHA)


def eager(batch: Batch) -> Tensor:
    """Compute what `distilled` computes, in plain PyTorch, which makes all logits."""
    log_q = (batch.student @ batch.student_head.mT).flatten(0, -2).log_softmax(-1)
    log_p = (batch.teacher @ batch.teacher_head.mT).flatten(0, -2).log_softmax(-1)
    supervised = F.nll_loss(log_q, batch.labels.flatten())
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return ALPHA * supervised + (1 - ALPHA) * divergence


def reverse(batch: Batch) -> Tensor:
    return linear_kd(*batch[:4], divergence="reverse_kl")


class Method(NamedTuple):
    """A way to train a network: its name and its loss."""

    name: str
    loss: Callable[[Batch], Tensor]


TEACHER = Method("teacher", alone)
ALONE = Method("no teacher", alone)
DISTILLED = Method("KD, linear_kd", distilled)
EAGER = Method("KD, eager PyTorch", eager)
OWN_TEXT = Method("KD, then its own text", reverse)

# --------------------------------------------------------------------------------------- training

Watch = Callable[[str], None]  # called with what is trained, before each step


class Taught(NamedTuple):
    """A teacher, and its hidden states of all windows, which are computed once."""

    model: LanguageModel
    hidden: Tensor  # [N, LENGTH, width]


class Fit(NamedTuple):
    """One trained network."""

    method: Method
    seed: int
    nats: float  # for each character of the held-out text
    reverse_kl: float  # KL(q, p) for each character that it samples, in nats


def experiment(seeds: int, steps: int, data: Data, taught: Taught, watch: Watch) -> Iterator[Fit]:
    """Train the students of each seed: without the teacher, with it, and then on their own text."""
    for seed in range(seeds):
        for method in (ALONE, DISTILLED):
            student = new_student(data, seed)
            fit(method, student, data, taught, steps, seed, watch)
            yield measured(method, seed, student, data, taught)
        fit_to_own_text(student, data, taught, seed, watch)
        yield measured(OWN_TEXT, seed, student, data, taught)


def train_teacher(data: Data, watch: Watch) -> Taught:
    torch.manual_seed(0)
    n_characters = len(data.characters)
    teacher = LanguageModel(n_characters, TEACHER_WIDTH, TEACHER_LAYERS).to(data.windows.device)
    fit(TEACHER, teacher, data, None, TEACHER_STEPS, 0, watch)
    return Taught(teacher, hidden_states(teacher, data.windows))


def new_student(data: Data, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    student = LanguageModel(len(data.characters), STUDENT_WIDTH, STUDENT_LAYERS)
    return student.to(data.windows.device)


def fit(
    method: Method,
    model: LanguageModel,
    data: Data,
    taught: Taught | None,
    steps: int,
    seed: int,
    watch: Watch,
) -> Tensor:
    """Train the model on windows of the text, and return the loss of each step."""

    def of_batch(rows: Tensor) -> Tensor:
        watch(method.name)
        windows = data.windows[rows]
        hidden = model(windows[:, :-1])
        of_teacher = (hidden, model.head.weight)  # which is its own one, where there is no other
        if taught is not None:
            of_teacher = (taught.hidden[rows], taught.model.head.weight.detach())
        return method.loss(Batch(hidden, model.head.weight, *of_teacher, windows[:, 1:]))

    return train(model, of_batch, len(data.windows), steps, seed, BATCH, LEARNING_RATE)


def fit_to_own_text(
    student: LanguageModel, data: Data, taught: Taught, seed: int, watch: Watch
) -> None:
    """Train the student to sample what the teacher finds likely."""
    generator = torch.Generator(data.windows.device).manual_seed(seed)

    def of_batch(rows: Tensor) -> Tensor:
        watch(OWN_TEXT.name)
        prompts = data.windows[rows, :PROMPT]
        return OWN_TEXT.loss(continued(student, taught.model, prompts, generator))

    n = len(data.windows)
    train(student, of_batch, n, OWN_STEPS, seed, OWN_BATCH, OWN_LEARNING_RATE)


def continued(
    student: LanguageModel, teacher: LanguageModel, prompts: Tensor, generator: torch.Generator
) -> Batch:
    """Return what both networks make of the characters that the student adds to prompts."""
    text = sample(student, prompts, generator)
    inputs, labels = text[:, :-1], text[:, PROMPT:]
    with torch.no_grad():
        of_teacher = teacher(inputs)[:, PROMPT - 1 :]
    of_student = student(inputs)[:, PROMPT - 1 :]
    return Batch(of_student, student.head.weight, of_teacher, teacher.head.weight.detach(), labels)


@torch.no_grad()
def sample(model: LanguageModel, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Return the prompts with N_SAMPLED characters more, drawn at the temperature 1."""
    text = prompts
    for _ in range(N_SAMPLED):
        probabilities = model.head(model(text)[:, -1]).softmax(-1)
        text = torch.cat([text, probabilities.multinomial(1, generator=generator)], 1)
    return text


@torch.no_grad()
def measured(method: Method, seed: int, model: LanguageModel, data: Data, taught: Taught) -> Fit:
    """Return how well the model knows the held-out text, and the teacher its samples."""
    logits = model.head(hidden_states(model, data.held_out))
    nats = F.cross_entropy(logits.flatten(0, 1), data.held_out[:, 1:].flatten()).item()
    generator = torch.Generator(data.windows.device).manual_seed(0)
    prompts = data.held_out[:: len(data.held_out) // N_PROMPTS, :PROMPT]
    batch = continued(model, taught.model, prompts, generator)
    return Fit(method, seed, nats, reverse(batch).item())


@torch.no_grad()
def hidden_states(model: LanguageModel, windows: Tensor) -> Tensor:
    return torch.cat([model(x[:, :-1]) for x in windows.split(64)])

"""Distillation of a text classifier: which part of Python's library does a paragraph document?

The teacher, a transformer encoder of four layers, learns from the labels of all training
paragraphs. A student of two layers and half the width sees some of them, few with a label, and what
the teacher makes of them: its predictions, its hidden states or the relations of its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fastkd
from fastkd.demo import texts
from fastkd.demo.study import Fit, Method, Study, fit
from fastkd.demo.training import IGNORED, per_cent

N_TEST, N_STUDENT, N_LABELLED = 1000, 1500, 300
TEACHER_WIDTH, STUDENT_WIDTH, N_HEADS = 64, 32, 4
TEACHER_LAYERS, STUDENT_LAYERS = 4, 2
TEACHER_STEPS, BATCH, LEARNING_RATE = 300, 64, 3e-3
TEMPERATURE = 2.0


class Output(NamedTuple):
    """Outputs of an encoder for N texts of L tokens."""

    logits: Tensor  # [N, subjects]
    embeddings: Tensor  # [N, L, width]
    hidden: tuple[Tensor, ...]  # of each layer [N, L, width]
    scores: tuple[Tensor, ...]  # of each layer's attention [N, heads, L, L], before the softmax
    qkv: tuple[Tensor, Tensor, Tensor]  # of the last layer, [N, L, width]
    mask: Tensor  # [N, L], bool: which are tokens

    def take(self, rows: Tensor) -> Output:
        """Return what belongs to the texts with these numbers."""
        taken: Any = tree_map(lambda x: x[rows], self)
        return taken


class Layer(nn.Module):
    """Attention and a perceptron, each added to what it reads."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Any]:
        qkv = self.qkv(self.before_attention(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for y in qkv)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -1e4)
        mixed = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.perceptron(self.before_perceptron(x))), scores, qkv


class Encoder(nn.Module):
    """A transformer that classifies the mean of its last hidden states."""

    def __init__(self, n_tokens: int, width: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.dropout = nn.Embedding(n_tokens, width), nn.Dropout(dropout)
        self.places = nn.Parameter(0.02 * torch.randn(texts.LENGTH, width))
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(texts.SUBJECTS))
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, data: texts.Texts) -> Output:
        embeddings = x = self.dropout(self.tokens(data.tokens) + self.places)
        hidden, all_scores, qkv = list[Tensor](), list[Tensor](), None
        for layer in self.layers:
            x, scores, qkv = layer(x, data.mask)
            hidden.append(x)
            all_scores.append(scores)
        counts = data.mask[..., None]
        mean = (self.norm(x) * counts).sum(1) / counts.sum(1)
        assert qkv is not None
        return Output(self.head(mean), embeddings, tuple(hidden), tuple(all_scores), qkv, data.mask)


# ------------------------------------------------------------- the methods, which are their losses


class NoTeacher(nn.Module):
    """Cross-entropy with the labels that there are."""

    def forward(self, student: Output, teacher: Output, data: texts.Texts) -> Tensor:
        return F.cross_entropy(student.logits, data.subjects, ignore_index=IGNORED)


class KD(nn.Module):
    """Cross-entropy on what is labelled, and the divergence of predictions on everything."""

    def forward(self, student: Output, teacher: Output, data: texts.Texts) -> Tensor:
        return fastkd.kd(
            student.logits,
            teacher.logits,
            data.subjects,
            temperature=TEMPERATURE,
            distill_ignored=True,
        )


class Triple(KD):
    """DistilBERT: besides, the last hidden states point the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.cosine = fastkd.HintLoss(STUDENT_WIDTH, TEACHER_WIDTH, kind="cosine")

    def forward(self, student: Output, teacher: Output, data: texts.Texts) -> Tensor:
        of_states = self.cosine(student.hidden[-1], teacher.hidden[-1], mask=student.mask)
        return super().forward(student, teacher, data) + of_states


class Layers(KD):
    """TinyBERT: besides, embeddings, hidden states and attention of every other layer are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, *self_hints = (
            fastkd.HintLoss(STUDENT_WIDTH, TEACHER_WIDTH) for _ in range(1 + STUDENT_LAYERS)
        )
        self.hints = nn.ModuleList(self_hints)

    def forward(self, student: Output, teacher: Output, data: texts.Texts) -> Tensor:
        mask, step = student.mask, TEACHER_LAYERS // STUDENT_LAYERS
        loss = super().forward(student, teacher, data)
        loss = loss + self.embeddings(student.embeddings, teacher.embeddings, mask=mask)
        hidden, scores = teacher.hidden[step - 1 :: step], teacher.scores[step - 1 :: step]
        for i, hint in enumerate(self.hints):
            loss = loss + hint(student.hidden[i], hidden[i], mask=mask)
            loss = loss + fastkd.attention_mse(student.scores[i], scores[i], mask=mask)
        return loss


class Relations(KD):
    """MiniLM: besides, the last layer's queries, keys and values have the same relations."""

    def forward(self, student: Output, teacher: Output, data: texts.Texts) -> Tensor:
        relations = fastkd.minilm_relation(
            student.qkv, teacher.qkv, n_heads=N_HEADS, mask=student.mask
        )
        return super().forward(student, teacher, data) + relations


TEACHER = Method("teacher", NoTeacher)
METHODS = (
    Method("no teacher", NoTeacher),
    Method("KD", KD),
    Method("KD + cosine (DistilBERT)", Triple),
    Method("KD + layers (TinyBERT)", Layers),
    Method("KD + relations (MiniLM)", Relations),
)

# --------------------------------------------------------------------------------------- training


def experiment(seeds: int, steps: int, device: str = "cpu") -> Iterator[Fit]:
    """Train the teacher, then one student for each of METHODS and each seed."""
    data = texts.load(device)
    rows = torch.arange(len(data.tokens))
    test, data = data.take(rows[:N_TEST]), data.take(rows[N_TEST:])
    new = functools.partial(Encoder, data.n_tokens)
    torch.manual_seed(0)
    teacher = new(TEACHER_WIDTH, TEACHER_LAYERS, dropout=0.2).to(device)
    fit(TEACHER, teacher, data, None, TEACHER_STEPS, 0, BATCH, LEARNING_RATE)
    answers = predict(teacher, test).logits.argmax(-1)
    yield Fit(TEACHER, 0, (per_cent(answers == test.subjects), 100.0))

    for seed in range(seeds):
        seen = few_labels(data, seed)
        taught = predict(teacher, seen)  # once, because texts are never augmented
        for method in METHODS:
            torch.manual_seed(seed)
            student = new(STUDENT_WIDTH, STUDENT_LAYERS, dropout=0.1).to(device)
            fit(method, student, seen, taught, steps, seed, BATCH, LEARNING_RATE)
            found = predict(student, test).logits.argmax(-1)
            results = per_cent(found == test.subjects), per_cent(found == answers)
            yield Fit(method, seed, results)


def few_labels(data: texts.Texts, seed: int) -> texts.Texts:
    """Return the texts and the labels that a student sees, others for each seed."""
    generator = torch.Generator().manual_seed(seed)
    seen = data.take(torch.randperm(len(data.tokens), generator=generator)[:N_STUDENT])
    seen.subjects[N_LABELLED:] = IGNORED
    return seen


def predict(model: Encoder, data: texts.Texts) -> Output:
    with torch.no_grad():
        return model.eval()(data)


STUDY = Study(
    name="text",
    title=f"{N_STUDENT} paragraphs, {N_LABELLED} of them with a label",
    about=(
        "Paragraphs of the docstrings of Python's standard library, real text: which of "
        f"{len(texts.SUBJECTS)} subjects does the module belong to? The teacher, an encoder of "
        f"{TEACHER_LAYERS} layers and width {TEACHER_WIDTH}, learned from all training labels; its "
        f"students have {STUDENT_LAYERS} layers and width {STUDENT_WIDTH}."
    ),
    legend=(
        f"Accuracy on {N_TEST} test paragraphs, mean ± standard deviation over the seeds. Agrees: "
        "with the teacher there. Gain: points over no teacher, seed by seed. Wins: seeds with a "
        "gain. Every method but the first has KD's loss too."
    ),
    measures=("accuracy, %", "agrees, %"),
    n_gains=1,
    teacher=TEACHER,
    methods=METHODS,
    experiment=experiment,
)

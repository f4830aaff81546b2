"""The correlation losses as people write them, and their cases; all engines."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from losses import BatchCase, embeddings, logits

import fastkd
from fastkd.portable import correlation as portable


@pytest.fixture(params=["formula", "portable", "portable in chunks"])
def engine(request, monkeypatch):
    """Each in turn computes the losses of the test: there are no kernels."""
    if request.param == "portable in chunks":
        monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 50)
    name = request.param.split()[0]
    with fastkd.backend(name):
        yield name


def published_similarities(student, teacher):
    s, t = (F.normalize(torch.einsum("id,jd->ij", x, x), p=2, dim=1) for x in (student, teacher))
    return F.mse_loss(s, t)


def published_pkt(student, teacher):
    def probabilities(x):
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        similarity = 0.5 + 0.5 * torch.einsum("id,jd->ij", x, x)
        return similarity / similarity.sum(1, keepdim=True)

    q, p = probabilities(student), probabilities(teacher)
    return torch.mean(p * (torch.log(p + 1e-7) - torch.log(q + 1e-7)))


def published_congruence(student, teacher, form="sequential", gamma=0.4, order=2):
    if form == "sequential":
        gaps = (student - teacher).abs()
        return torch.stack([a @ b for a, b in pairwise(gaps)]).mean()

    def kernel(x):
        cosines = F.cosine_similarity(x[:, None], x[None], dim=2)
        terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(0)

    return torch.linalg.matrix_norm(kernel(student) - kernel(teacher)) ** 2 / len(student) ** 2


def published_dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    def agreement(x, y, dim):
        x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
        lengths = (torch.linalg.vector_norm(z, dim=dim) for z in (x, y))
        return (torch.mul(x, y).sum(dim) / (math.prod(lengths) + 1e-8)).mean()

    q, p = (torch.softmax(z / temperature, -1) for z in (student, teacher))
    total = beta * (1 - agreement(q, p, 1)) + gamma * (1 - agreement(q, p, 0))
    return temperature**2 * total


def embeddings_of_one_width(examples, n_features, *rest):
    student, teacher = embeddings(examples, n_features, *rest)
    return [student, teacher[..., :n_features].contiguous()]


def case(loss, published, inputs=embeddings, **options):
    return BatchCase(loss, options, (None, published), inputs)


CONGRUENCE = fastkd.correlation_congruence, published_congruence
SIMILARITIES = case(fastkd.similarity_preserving, published_similarities)
PKT = case(fastkd.pkt, published_pkt)
SEQUENTIAL = case(*CONGRUENCE, embeddings_of_one_width)
KERNEL = case(*CONGRUENCE, form="kernel")
DIST = case(fastkd.dist_kd, published_dist, logits)
WITH_OPTIONS = [
    case(*CONGRUENCE, form="kernel", gamma=1.5, order=1),
    case(*CONGRUENCE, form="kernel", gamma=0.8, order=4),
    case(fastkd.dist_kd, published_dist, logits, beta=2.0, gamma=0.5, temperature=4.0),
]
LOSSES = [SIMILARITIES, PKT, SEQUENTIAL, KERNEL, DIST]
OF_FEATURES = LOSSES[:-1]
OF_GRAM = [SIMILARITIES, PKT, KERNEL]
each_loss = pytest.mark.parametrize("case", LOSSES, ids=str)
each_case = pytest.mark.parametrize("case", LOSSES + WITH_OPTIONS, ids=str)


def of_gram(test):
    return pytest.mark.parametrize("case", OF_GRAM, ids=str)(test)

"""Losses of whole batches as their papers and their users write them, independently of fastkd."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)


# ------------------------------------------------------------------------------------------ pairs


def info_nce(
    query, key, negatives=None, temperature=0.07, negative_weight=1.0, normalize=True,
    symmetric=False, margin=0.0, decoupled=False, in_batch_negatives=True,
):  # fmt: skip
    """Return the mean over queries, one row after the other."""
    if normalize:
        query, key = unit(query), unit(key)
        negatives = None if negatives is None else unit(negatives)

    def one_way(query, key, negatives):
        losses = []
        for i, q in enumerate(query):
            positive = (q @ key[i] - margin) / temperature
            others = [j for j in range(len(key)) if j != i and in_batch_negatives]
            logits = [key[others] @ q, *([] if negatives is None else [negatives @ q])]
            logits = torch.cat(logits) / temperature
            if not len(logits):
                losses.append(0 * positive)
                continue
            below = torch.cat([logits + math.log(negative_weight), positive[None]])
            losses.append((below[:-1] if decoupled else below).logsumexp(0) - positive)
        return torch.stack(losses).mean()

    loss = one_way(query, key, negatives)
    return (loss + one_way(key, query, None)) / 2 if symmetric else loss


def clip_contrastive(image, text, logit_scale=5.0, logit_bias=0.0):
    logits = logit_scale * image @ text.T + logit_bias
    positives = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


def siglip(image, text, logit_scale=5.0, logit_bias=-2.0):
    logits = logit_scale * image @ text.T + logit_bias
    signs = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def nt_xent(view1, view2, temperature=0.5):
    z = unit(torch.cat([view1, view2]))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(view1)))


def sup_con(features, labels, temperature=0.1, anchors="with_positive"):
    """Return the mean over anchors, one after the other."""
    z, losses = unit(features), []
    for i, label in enumerate(labels.tolist()):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if int(labels[j]) == label]
        if positives:
            log_sum = (z[others] @ z[i] / temperature).logsumexp(0)
            losses.append(log_sum - (z[positives] @ z[i]).mean() / temperature)
        elif anchors == "all":
            losses.append(0 * z[i].sum())
    return torch.stack(losses).mean() if losses else 0 * z.sum()


def similarity_kl(
    student, teacher, student_keys=None, teacher_keys=None, student_temperature=0.07,
    teacher_temperature=0.07, symmetric=False, mask_self=False,
):  # fmt: skip
    networks = ((student, student_keys), (teacher, teacher_keys))
    s, t = (unit(q) @ unit(q if k is None else k).T for q, k in networks)
    s, t = s / student_temperature, t / teacher_temperature
    kept = torch.ones_like(s, dtype=torch.bool)
    if mask_self:
        kept.fill_diagonal_(False)

    def mean_kl(student_rows, teacher_rows, kept_rows):
        rows = zip(student_rows, teacher_rows, kept_rows, strict=True)
        kls = [F.kl_div(a[k].log_softmax(0), b[k].softmax(0), reduction="sum") for a, b, k in rows]
        return torch.stack(kls).mean()

    loss = mean_kl(s, t, kept)
    return (loss + mean_kl(s.T, t.T, kept.T)) / 2 if symmetric else loss


# -------------------------------------------------------------------------------------- relations


def distances(x):
    """Return relative distances as lenscloth/RKD has them: from a Gram matrix, means without 0."""
    lengths = x.square().sum(1)
    squares = lengths[:, None] + lengths - 2 * x @ x.T
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    d = squares.clamp(min=1e-12).sqrt().masked_fill(itself, 0)
    return d / d[d > 0].mean()


def cosines(x):
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(directions, directions.mT)


def rkd_distance(student, teacher, smooth_l1_beta=1.0):
    student, teacher = distances(student.flatten(1)), distances(teacher.flatten(1))
    return F.smooth_l1_loss(student, teacher, beta=smooth_l1_beta)


def rkd_angle(student, teacher, smooth_l1_beta=1.0):
    student, teacher = cosines(student.flatten(1)), cosines(teacher.flatten(1))
    return F.smooth_l1_loss(student, teacher, beta=smooth_l1_beta)


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0, **options):
    distance, angle = (
        rkd_distance(student, teacher, **options),
        rkd_angle(student, teacher, **options),
    )
    return distance_weight * distance + angle_weight * angle


# ------------------------------------------------------------------------------------------- gram


def similarity_preserving(student, teacher):
    s, t = (F.normalize(torch.einsum("id,jd->ij", x, x), p=2, dim=1) for x in (student, teacher))
    return F.mse_loss(s, t)


def pkt(student, teacher):
    def probabilities(x):
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        similarity = 0.5 + 0.5 * torch.einsum("id,jd->ij", x, x)
        return similarity / similarity.sum(1, keepdim=True)

    q, p = probabilities(student), probabilities(teacher)
    return torch.mean(p * torch.log((p + 1e-7) / (q + 1e-7)))


def correlation_congruence(student, teacher, form="sequential", gamma=0.4, order=2):
    if form == "sequential":
        gaps = (student - teacher).abs()
        return torch.stack([a @ b for a, b in pairwise(gaps)]).mean()

    def kernel(x):
        angles = F.cosine_similarity(x[:, None], x[None], dim=2)
        terms = [(2 * gamma) ** p / math.factorial(p) * angles**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(0)

    return torch.linalg.matrix_norm(kernel(student) - kernel(teacher)) ** 2 / len(student) ** 2


def dist_kd(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    def agreement(x, y, dim):
        x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
        lengths = (torch.linalg.vector_norm(z, dim=dim) for z in (x, y))
        return (torch.mul(x, y).sum(dim) / (math.prod(lengths) + 1e-8)).mean()

    q, p = (torch.softmax(z / temperature, -1) for z in (student, teacher))
    total = beta * (1 - agreement(q, p, 1)) + gamma * (1 - agreement(q, p, 0))
    return temperature**2 * total


# ---------------------------------------------------------------------------------- distillation


def dino(
    student, teacher, center, student_temperature=0.1, teacher_temperature=0.04, skip_same_view=True
):
    """Return the mean cross-entropy of all pairs of crops, with a softmax for each pair."""
    targets = ((teacher - center) / teacher_temperature).softmax(-1).detach()
    terms = [
        (-p * z.log_softmax(-1)).sum(-1).mean()
        for i, p in enumerate(targets)
        for j, z in enumerate(student / student_temperature)
        if not (skip_same_view and i == j)
    ]
    return torch.stack(terms).mean()

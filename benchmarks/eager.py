"""Each loss as people write it in PyTorch today, for comparison: functions of its inputs alone.

A loss that is missing is measured as its authors write it, in tests/published.py. There relations
make distances from a Gram matrix, and angles from all N² directions at once: N² D and N³ numbers
for each network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

T = 2.0  # the temperature of all divergences here


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = F.log_softmax(student / T, dim=-1)
    return F.kl_div(log_q, F.softmax(teacher / T, dim=-1), reduction="batchmean") * T**2


def linear_kd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Tensor:
    z, z_teacher = F.linear(student, student_weight), F.linear(teacher, teacher_weight)
    if z.dtype in (torch.float16, torch.bfloat16):
        z, z_teacher = z.float(), z_teacher.float()
    return forward_kl(z, z_teacher)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T**2


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    log_half = torch.tensor(0.5, dtype=log_q.dtype, device=log_q.device).log()
    log_m = torch.logsumexp(torch.stack([log_q + log_half, log_p + log_half]), dim=0)
    of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (of_p + of_q) / 2 * T**2


def skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    log_m = (0.1 * p + 0.9 * q).log()
    return (p * (F.log_softmax(teacher / T, dim=-1) - log_m)).sum(-1).mean() * T**2


def skew_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    log_m = (0.9 * p + 0.1 * q).log()
    return (q * (F.log_softmax(student / T, dim=-1) - log_m)).sum(-1).mean() * T**2


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (forward + reverse) / 2 * T**2


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher / T, dim=-1), F.softmax(student / T, dim=-1)
    return 0.5 * (p - q).abs().sum(-1).mean() * T**2


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student / T, F.softmax(teacher / T, dim=-1)) * T**2


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)  # T and T² cancel


def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * forward_kl(student, teacher)


def _with_and_without(logits: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """Return the log-probabilities of the label and of not it, and those of the other classes."""
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    p = F.softmax(logits / temperature, dim=-1)
    both = torch.stack([(p * is_label).sum(-1), (p * ~is_label).sum(-1)], -1)
    return [both.log(), F.log_softmax(logits / temperature - 1000.0 * is_label, dim=-1)]


def decoupled_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    both_q, others_q = _with_and_without(student, labels, 4.0)
    both_p, others_p = _with_and_without(teacher, labels, 4.0)
    target, others = (
        F.kl_div(q, p, reduction="batchmean", log_target=True)
        for q, p in ((both_q, both_p), (others_q, others_p))
    )
    return (target + 8.0 * others) * 4.0**2


def _of_others(classes: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the columns of the other classes, one fewer in each row."""
    is_other = torch.ones_like(tensors[0]).scatter_(-1, classes, 0).bool()
    return [x[is_other].reshape(len(x), -1) for x in tensors]


def nkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    classes = labels.unsqueeze(-1)
    log_q, p = F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1)
    target = -(p.gather(-1, classes) * log_q.gather(-1, classes)).mean()
    others_q, others_p = _of_others(classes, student, teacher)
    others = (F.softmax(others_p, dim=-1) * F.log_softmax(others_q, dim=-1)).sum(-1).mean()
    return target - 1.5 * others


def wsld(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = -(F.softmax(teacher / T, dim=-1) * F.log_softmax(student / T, dim=-1)).sum(-1)
    is_label = F.one_hot(labels, student.shape[-1]).float()
    of_student, of_teacher = (
        -(is_label * F.log_softmax(x.detach(), dim=-1)).sum(-1) for x in (student, teacher)
    )
    ratio = (of_student / of_teacher).clamp(min=0)
    return ((1 - torch.exp(-ratio)) * soft).mean() * T**2


def uskd(student: Tensor, labels: Tensor, weak: Tensor) -> Tensor:
    classes = labels.unsqueeze(-1)
    log_q, q = F.log_softmax(student, dim=-1), F.softmax(student, dim=-1)
    squares = (q.gather(-1, classes) ** 2).detach()
    target = -((1 + squares - squares.mean()) * log_q.gather(-1, classes)).mean()
    with torch.no_grad():
        odds = (p / (1 - p.gather(-1, classes)) for p in (q, F.softmax(weak, -1)))
        ranks = 1 + sum(odds).argsort(-1, descending=True).argsort(-1).to(student.dtype)
    others_q, ranks = _of_others(classes, student, ranks)
    others = F.cross_entropy(others_q, (1 / ranks) / (1 / ranks).sum(-1, keepdim=True))
    return target + 0.1 * others + 0.005 * F.cross_entropy(weak, labels, label_smoothing=0.1)


def ibot(student: Tensor, teacher: Tensor, mask: Tensor, center: Tensor) -> Tensor:
    p = F.softmax((teacher - center) / 0.04, dim=-1)
    losses = -(p * F.log_softmax(student / 0.1, dim=-1)).sum(-1) * mask
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def koleo(first: Tensor, second: Tensor) -> Tensor:
    x = F.normalize(torch.cat([first, second]))
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    nearest = (x @ x.T).masked_fill(itself, -1).max(-1).indices
    return -(F.pairwise_distance(x, x[nearest], eps=0) + 1e-8).log().mean()


def _taylor(x: Tensor) -> Tensor:
    """Return a Gaussian kernel with gamma = 0.4, to the second order."""
    cosines = F.normalize(x) @ F.normalize(x).T
    return math.exp(-0.8) * (1 + 0.8 * cosines + 0.8**2 / 2 * cosines.square())


def correlation_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    return (_taylor(student) - _taylor(teacher)).square().sum() / len(student) ** 2


def info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query) @ F.normalize(key).T / 0.07
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def clip_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(image), device=image.device)
    of_images = F.cross_entropy(scale * image @ text.T, own)
    return (of_images + F.cross_entropy(scale * text @ image.T, own)) / 2


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def nt_xent(view1: Tensor, view2: Tensor) -> Tensor:
    z = F.normalize(torch.cat([view1, view2]))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / 0.5).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(view1)))


def sup_con(features: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(features)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = z @ z.T / 0.1
    logits = logits - logits.detach().amax(1, keepdim=True)
    positive = ((labels[:, None] == labels) & ~own).to(z.dtype)
    log_p = logits - (logits.exp() * ~own).sum(1, keepdim=True).log()
    counts = positive.sum(1)
    means = (positive * log_p).sum(1) / counts.clamp(min=1)
    return -means.sum() / (counts > 0).sum()


def _attention(tokens: Tensor, heads: int) -> Tensor:
    """Return the scores of the tokens among each other, [B, heads, L, L]."""
    tokens = tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
    return tokens @ tokens.mT / math.sqrt(tokens.shape[-1])


def token_relation(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (_attention(x, 12).flatten(0, 2) for x in (student, teacher))
    return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")


def minilm_relation(*vectors: Tensor) -> Tensor:
    n = len(vectors) // 2
    losses = [token_relation(s, t) for s, t in zip(vectors[:n], vectors[n:], strict=True)]
    return torch.stack(losses).sum()


def gram_anchoring(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return F.mse_loss((s @ s.mT).relu(), (t @ t.mT).relu())


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss from kernels [L, L], as lightly does."""

    def centred(x: Tensor) -> Tensor:
        k = x @ x.mT
        return k - k.mean(1, keepdim=True) - k.mean(2, keepdim=True) + k.mean((1, 2), keepdim=True)

    s, t = centred(student), centred(teacher)
    lengths = s.square().sum((1, 2)).sqrt() * t.square().sum((1, 2)).sqrt()
    return (1 - (s * t).sum((1, 2)) / lengths).mean()


def similarity_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x) @ F.normalize(x).T / 0.07 for x in (student, teacher))
    return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")


def hint(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    squares = F.mse_loss(student, teacher, reduction="none")
    return (squares * weights).sum() / (weights.sum() * student.shape[1])


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.pow(2).mean(1).flatten(1))

    return (attention(student) - attention(teacher)).pow(2).mean()


def channel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    n, n_channels = student.shape[:2]
    s, t = (x.reshape(n * n_channels, -1) / T for x in (student, teacher))
    terms = t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))
    return terms.sum() * T**2 / (n * n_channels)


localization = forward_kl


def vid(mean: Tensor, teacher: Tensor, alpha: Tensor) -> Tensor:
    variance = torch.log(1.0 + torch.exp(alpha)) + 1e-5
    variance = variance.view(1, -1, *[1] * (mean.ndim - 2))
    return torch.mean(0.5 * ((mean - teacher) ** 2 / variance + torch.log(variance)))


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss as RepDistiller has it, with B·C·C numbers for each position."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)

    return kernel(t, t).mean().detach() + kernel(s, s).mean() - 2 * kernel(s, t).mean()


def fsp(student: Tensor, teacher: Tensor, student_2: Tensor, teacher_2: Tensor) -> Tensor:
    def flow(first: Tensor, second: Tensor) -> Tensor:
        return (first.flatten(2).unsqueeze(2) * second.flatten(2).unsqueeze(1)).mean(-1)

    return (flow(student, student_2) - flow(teacher, teacher_2)).pow(2).mean()


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in (student, teacher))
    return F.mse_loss(s, t)

"""Losses in Python floats, independently of fastkd; divergences as people write them besides.

Each pair is (by_hand, eager): `by_hand` takes one row of student and teacher as lists and returns a
float, `eager` takes tensors and returns a loss for each row. Options of other losses are ignored.
"""

import math

import torch
import torch.nn.functional as F


def log_softmax(logits, temperature):
    scaled = [z / temperature for z in logits]
    largest = max(scaled)
    log_z = math.log(math.fsum(math.exp(z - largest) for z in scaled))
    return [z - largest - log_z for z in scaled]


def standard(logits):
    """Return the logits less their mean, divided by their deviation + 1e-7, unbiased as theirs."""
    mean = math.fsum(logits) / len(logits)
    deviation = math.sqrt(math.fsum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / (deviation + 1e-7) for z in logits]


def standardized(known):
    """Return the pair of a loss whose logits are standardized first."""
    by_hand, eager = known

    def of_lists(student, teacher, *rest, standardize, **options):
        return by_hand(standard(student), standard(teacher), *rest, **options)

    def of_tensors(student, teacher, *rest, standardize, **options):
        both = (
            (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))
            for x in (student, teacher)
        )
        return eager(*both, *rest, **options)

    return of_lists, of_tensors


def by_classes(term):
    """Return the sum over classes of term(p, q, log_p, log_q, **own options)."""

    def by_hand(student, teacher, *, temperature=1.0, scale_t2=True, **own):
        total = math.fsum(
            term(math.exp(log_p), math.exp(log_q), log_p, log_q, **own)
            for log_p, log_q in zip(
                log_softmax(teacher, temperature), log_softmax(student, temperature), strict=True
            )
        )
        return total * (temperature**2 if scale_t2 else 1)

    return by_hand


def softened(terms):
    """Return the sum over classes of terms(log_p, log_q, **own options), tensors."""

    def eager(student, teacher, *, temperature=1.0, scale_t2=True, **own):
        log_q = (student / temperature).log_softmax(-1)
        log_p = (teacher / temperature).log_softmax(-1)
        return terms(log_p, log_q, **own).sum(-1) * (temperature**2 if scale_t2 else 1)

    return eager


def positive(mass, x):
    """Return mass · x, where a mass of 0 wins over an infinite x."""
    return 0.0 if mass == 0 else mass * x


def log(x):
    """Return log x; of 0 any number will do, because nothing has mass there."""
    return math.log(x or 1)


def log_mixture(log_p, log_q, weight):
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))


FORWARD_KL = (
    by_classes(lambda p, q, log_p, log_q, **_: positive(p, log_p - log_q)),
    softened(lambda log_p, log_q, **_: F.kl_div(log_q, log_p, reduction="none", log_target=True)),
)
REVERSE_KL = (
    by_classes(lambda p, q, log_p, log_q, **_: positive(q, log_q - log_p)),
    softened(lambda log_p, log_q, **_: F.kl_div(log_p, log_q, reduction="none", log_target=True)),
)
JENSEN_SHANNON = (
    by_classes(
        lambda p, q, log_p, log_q, beta, **_: (
            positive(beta * p, log_p - log(beta * p + (1 - beta) * q))
            + positive((1 - beta) * q, log_q - log(beta * p + (1 - beta) * q))
        )
    ),
    softened(
        lambda log_p, log_q, beta, **_: (
            beta * log_p.exp() * (log_p - log_mixture(log_p, log_q, beta))
            + (1 - beta) * log_q.exp() * (log_q - log_mixture(log_p, log_q, beta))
        )
    ),
)
SKEW_KL = (
    by_classes(
        lambda p, q, log_p, log_q, skew, **_: positive(p, log_p - log(skew * p + (1 - skew) * q))
    ),
    softened(
        lambda log_p, log_q, skew, **_: log_p.exp() * (log_p - log_mixture(log_p, log_q, skew))
    ),
)
SKEW_REVERSE_KL = (
    by_classes(
        lambda p, q, log_p, log_q, skew, **_: positive(q, log_q - log((1 - skew) * p + skew * q))
    ),
    softened(
        lambda log_p, log_q, skew, **_: log_q.exp() * (log_q - log_mixture(log_p, log_q, 1 - skew))
    ),
)
SYMMETRIC_KL = (
    by_classes(
        lambda p, q, log_p, log_q, weight, **_: (
            positive(weight * p, log_p - log_q) + positive((1 - weight) * q, log_q - log_p)
        )
    ),
    softened(
        lambda log_p, log_q, weight, **_: (
            weight * log_p.exp() * (log_p - log_q) + (1 - weight) * log_q.exp() * (log_q - log_p)
        )
    ),
)
TOTAL_VARIATION = (
    by_classes(lambda p, q, log_p, log_q, **_: abs(p - q) / 2),
    softened(lambda log_p, log_q, **_: (log_p.exp() - log_q.exp()).abs() / 2),
)
SOFT_CROSS_ENTROPY = (
    by_classes(lambda p, q, log_p, log_q, **_: positive(p, -log_q)),
    softened(lambda log_p, log_q, **_: -log_p.exp() * log_q),
)


def _mse_by_hand(student, teacher, *, temperature, scale_t2=True):
    pairs = zip(student, teacher, strict=True)
    squares = math.fsum((s - t) ** 2 for s, t in pairs if s != t)  # −∞ − −∞ is no number
    return squares / len(student) / (1 if scale_t2 else temperature**2)


def _mse(student, teacher, *, temperature, scale_t2=True):
    losses = F.mse_loss(student / temperature, teacher / temperature, reduction="none").mean(-1)
    return losses * (temperature**2 if scale_t2 else 1)


LOGIT_MSE = (_mse_by_hand, _mse)


LOCALIZATION = (
    lambda student, teacher, bins="sum", **options: (
        FORWARD_KL[0](student, teacher, **options) / (len(student) if bins == "mean" else 1)
    ),
    lambda student, teacher, bins="sum", **options: (
        FORWARD_KL[1](student, teacher, **options) / (student.shape[-1] if bins == "mean" else 1)
    ),
)


def with_labels(divergence):
    """Return alpha · cross-entropy with the labels + (1 − alpha) · the divergence."""
    divergence_by_hand, divergence_eager = divergence

    def by_hand(student, teacher, label, *, alpha, **options):
        cross_entropy = -log_softmax(student, 1.0)[label]
        return alpha * cross_entropy + (1 - alpha) * divergence_by_hand(student, teacher, **options)

    def eager(student, teacher, labels, *, alpha, **options):
        flat = student.reshape(-1, student.shape[-1]), labels.reshape(-1)
        cross_entropies = F.cross_entropy(*flat, reduction="none").view(labels.shape)
        return alpha * cross_entropies + (1 - alpha) * divergence_eager(student, teacher, **options)

    return by_hand, eager


def _rest(logits, label, temperature):
    """Return the log-softmax of all classes but the label's."""
    return log_softmax([z for i, z in enumerate(logits) if i != label], temperature)


def _decoupled_by_hand(
    student, teacher, label, *, alpha=1.0, beta=8.0, temperature=4.0, scale_t2=True
):
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    p, rest_p = math.exp(log_p[label]), _rest(teacher, label, temperature)
    of_others = [math.fsum(map(math.exp, x[:label] + x[label + 1 :])) for x in (log_p, log_q)]
    target = positive(p, log_p[label] - log_q[label])
    target += positive(of_others[0], log(of_others[0]) - log(of_others[1]))
    rest_q = _rest(student, label, temperature)
    pairs = zip(rest_p, rest_q, strict=True)
    others = math.fsum(positive(math.exp(x), x - y) for x, y in pairs)
    return (alpha * target + beta * others) * (temperature**2 if scale_t2 else 1)


def _decoupled_eager(
    student, teacher, labels, *, alpha=1.0, beta=8.0, temperature=4.0, scale_t2=True
):
    is_label = F.one_hot(labels, student.shape[-1]).bool()
    shape = (*student.shape[:-1], student.shape[-1] - 1)
    both, others = [], []
    for logits in (teacher, student):
        log_p = (logits / temperature).log_softmax(-1)
        rest = log_p[~is_label].view(shape).logsumexp(-1)
        both.append(torch.stack([log_p[is_label].view(rest.shape), rest], -1))
        others.append((logits[~is_label].view(shape) / temperature).log_softmax(-1))
    target, others = ((p.exp() * (p - q)).sum(-1) for p, q in (both, others))
    return (alpha * target + beta * others) * (temperature**2 if scale_t2 else 1)


def _nkd_by_hand(student, teacher, label, *, gamma=1.5, temperature=1.0, scale_t2=True):
    target = -math.exp(log_softmax(teacher, 1.0)[label]) * log_softmax(student, 1.0)[label]
    pairs = zip(_rest(teacher, label, temperature), _rest(student, label, temperature), strict=True)
    others = -math.fsum(positive(math.exp(x), y) for x, y in pairs)
    return target + gamma * others * (temperature**2 if scale_t2 else 1)


def _nkd_eager(student, teacher, labels, *, gamma=1.5, temperature=1.0, scale_t2=True):
    classes = labels.unsqueeze(-1)
    target = -(teacher.softmax(-1) * student.log_softmax(-1)).gather(-1, classes).squeeze(-1)
    is_label = F.one_hot(labels, student.shape[-1]).bool()
    shape = (*student.shape[:-1], student.shape[-1] - 1)
    others_q, others_p = (x[~is_label].view(shape) / temperature for x in (student, teacher))
    others = -(others_p.softmax(-1) * others_q.log_softmax(-1)).sum(-1)
    return target + gamma * others * (temperature**2 if scale_t2 else 1)


DECOUPLED_KD = (_decoupled_by_hand, _decoupled_eager)
NKD = (_nkd_by_hand, _nkd_eager)


def _labelled(by_hand):
    """Return a loss of log p, log q and the label by hand, both softened, times T²."""

    def softened(student, teacher, label, *, temperature, scale_t2=True, **own):
        networks = log_softmax(teacher, temperature), log_softmax(student, temperature)
        loss = by_hand(*networks, label, student=student, teacher=teacher, **own)
        return loss * (temperature**2 if scale_t2 else 1)

    return softened


def _kl_by_hand(p, log_q):
    return math.fsum(positive(x, log(x) - y) for x, y in zip(p, log_q, strict=True))


def _wsld_by_hand(log_p, log_q, label, *, student, teacher):
    of_student, of_teacher = (-log_softmax(z, 1.0)[label] for z in (student, teacher))
    if of_student == 0:  # which is 0 / 0 where the teacher is certain, too
        return 0.0
    weight = 1 - math.exp(-of_student / of_teacher) if of_teacher else 1.0
    return weight * math.fsum(positive(math.exp(x), -y) for x, y in zip(log_p, log_q, strict=True))


def _wsld(student, teacher, labels, *, temperature, scale_t2=True):
    """Return what mdistiller and MMRazor write, without what they add to a divisor of 0."""
    n = student.shape[-1]
    z, t, y = student.reshape(-1, n), teacher.reshape(-1, n), labels.reshape(-1)
    ratio = F.cross_entropy(z.detach(), y, reduction="none") / F.cross_entropy(
        t, y, reduction="none"
    )
    weight = (1 - torch.exp(-ratio)).nan_to_num(0)
    p, log_q = (t / temperature).softmax(-1), (z / temperature).log_softmax(-1)
    losses = -weight * (p * log_q).sum(-1) * (temperature**2 if scale_t2 else 1)
    return losses.view(labels.shape)


WSLD = (_labelled(_wsld_by_hand), _wsld)


def _mft_by_hand(log_p, log_q, label, *, student, teacher, threshold):
    p = [math.exp(x) for x in log_p]
    behind = max(p) - p[label]
    if behind > 0:
        mixed = (behind + threshold) / (1 + behind)
    else:
        mixed = min(1, threshold / (1 - p[label])) if p[label] < 1 else 1
    target = [(1 - mixed) * x + mixed * (v == label) for v, x in enumerate(p)]
    return _kl_by_hand(target, log_q)


def _mft(student, teacher, labels, *, threshold, temperature, scale_t2=True):
    """Return what ModelOpt writes, without what it adds to a divisor of 0."""
    p, classes = (teacher / temperature).softmax(-1), labels.unsqueeze(-1)
    most, of_label = p.amax(-1, keepdim=True), p.gather(-1, classes)
    lifted = (most - of_label + threshold) / (1 + most - of_label)
    raised = (torch.clamp(of_label + threshold, max=1) - of_label) / (1 - of_label)
    mixed = torch.where(of_label < most, lifted, raised.nan_to_num(1))
    target = ((1 - mixed) * p).scatter_add(-1, classes, mixed)
    losses = F.kl_div((student / temperature).log_softmax(-1), target, reduction="none").sum(-1)
    return losses * (temperature**2 if scale_t2 else 1)


MFT = (_labelled(_mft_by_hand), _mft)


def _teacher_free_by_hand(student, label, *, correct_probability, temperature, scale_t2=True):
    n = len(student)
    others = (1 - correct_probability) / max(n - 1, 1)
    u = [correct_probability if v == label else others for v in range(n)]
    softened = [x ** (1 / temperature) for x in u]
    p = [x / math.fsum(softened) for x in softened]
    return _kl_by_hand(p, log_softmax(student, temperature)) * (temperature**2 if scale_t2 else 1)


def _teacher_free(student, labels, *, correct_probability, temperature, scale_t2=True):
    n = student.shape[-1]
    u = torch.full_like(student, (1 - correct_probability) / max(n - 1, 1))
    u = u.scatter(-1, labels.unsqueeze(-1), correct_probability)
    p, log_q = (u.log() / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    p = p / p.sum(-1, keepdim=True)  # because PyTorch rounds every sum of equal numbers alike
    losses = F.kl_div(log_q, p, reduction="none").sum(-1)
    return losses * (temperature**2 if scale_t2 else 1)


TEACHER_FREE_KD = (_teacher_free_by_hand, _teacher_free)

"""Losses of whole batches as their papers and their users write them, independently of fastkd."""

import math
from itertools import pairwise

import textbook
import torch
import torch.nn.functional as F


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)


# ----------------------------------------------------------------------------------------- linear


def linear_kd(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias=None,
    alpha=0.0, temperature=1.0, divergence="forward_kl", beta=0.5, student_softcap=None,
    student_logit_scale=1.0, reduction="mean",
):  # fmt: skip
    """Return the mean over tokens with a label, from all logits of all teachers at once."""
    z = (student_hidden @ student_weight.T + student_bias) * student_logit_scale
    if student_softcap is not None:
        z = student_softcap * torch.tanh(z / student_softcap)
    log_q = F.log_softmax(z / temperature, -1)
    teachers = [(teacher_hidden, teacher_weight)]
    if isinstance(teacher_hidden, tuple):
        teachers = [*zip(teacher_hidden, teacher_weight, strict=True)]
    p = sum(F.softmax(h @ weight.T / temperature, -1) for h, weight in teachers) / len(teachers)
    log_p = p.log()
    losses = alpha * F.cross_entropy(z, labels, reduction="none")
    known = {
        "forward_kl": lambda p, q: (p * (p.log() - q.log())).sum(-1),
        "reverse_kl": lambda p, q: (q * (q.log() - p.log())).sum(-1),
        "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    }
    known["jensen_shannon"] = lambda p, q: (
        beta * known["forward_kl"](p, beta * p + (1 - beta) * q)
        + (1 - beta) * known["forward_kl"](q, beta * p + (1 - beta) * q)
    )
    named = {divergence: 1.0} if isinstance(divergence, str) else divergence
    for name, weight in named.items():
        distance = known[name](log_p.exp(), log_q.exp())
        losses = losses + (1 - alpha) * weight * temperature**2 * distance
    counted = labels != -100
    losses = torch.where(counted, losses, 0)
    return losses if reduction == "none" else losses.sum() / counted.sum().clamp(min=1)


# ----------------------------------------------------------------------------------------- labels


def kd(student, teacher, labels, class_weights=None, *, alpha, temperature, label_smoothing=0.0):
    """Return what users write, with what F.cross_entropy takes: soft labels, weights, smoothing."""
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    divergence = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    of_labels = F.cross_entropy(student, labels, class_weights, label_smoothing=label_smoothing)
    return alpha * of_labels + (1 - alpha) * divergence


# ------------------------------------------------------------------------------------------ peers


def mutual_kl(*logits, temperature=1.0, scale_t2=True, detach_peers=True):
    """Return the loss of each network, as users write it, and the sum of them."""
    losses = []
    for i, z in enumerate(logits):
        log_q = F.log_softmax(z / temperature, -1)
        for j, other in enumerate(logits):
            p = F.softmax((other.detach() if detach_peers else other) / temperature, -1)
            if i != j:
                losses.append((p * (p.log() - log_q)).sum(-1) / (len(logits) - 1))
    return sum(losses) * (temperature**2 if scale_t2 else 1)


# ------------------------------------------------------------------------------------ one network


def uskd(
    student, labels, weak=None, alpha=1.0, beta=0.1, mu=0.005, label_smoothing=0.1,
    ranking="probabilities",
):  # fmt: skip
    """Return the mean over rows, one after the other, with the soft labels of the authors' code."""
    n = student.shape[-1]
    rows = student.reshape(-1, n).softmax(-1)
    weak_rows = None if weak is None else weak.reshape(-1, n).softmax(-1)
    of_labels = rows.gather(1, labels.reshape(-1, 1))[:, 0]
    soft = (1 + of_labels**2 - (of_labels**2).mean()).detach()
    losses = [0 * student.sum() + (0 if weak is None else 0 * weak.sum())]
    for i, (q, y) in enumerate(zip(rows, labels.flatten().tolist(), strict=True)):
        if n == 1:
            continue
        score = q.detach()
        if weak is not None:
            w = weak_rows[i].detach()
            if ranking == "log_probabilities":
                score = q.detach().log() / (1 - q.detach()[y].log())
            else:
                score = score / (1 - score[y])
            score = score + w / (1 - w[y])
        in_order = sorted(range(n), key=lambda v, score=score: -float(score[v]))
        others = [v for v in in_order if v != y]
        shares = [1 / (1 + in_order.index(v)) for v in others]
        zipf = torch.tensor(shares, dtype=q.dtype, device=q.device) / math.fsum(shares)
        rest = q[others] / q[others].sum()
        loss = -alpha * soft[i] * q[y].log() - beta * (zipf * rest.log()).sum()
        if weak is not None:
            smooth = torch.full_like(q, label_smoothing / n)
            smooth[y] += 1 - label_smoothing
            loss = loss - mu * (smooth * weak_rows[i].log()).sum()
        losses.append(loss)
    return torch.stack(losses).sum() / max(1, len(losses) - 1)


# ------------------------------------------------------------------------------- two vocabularies


def uld(student, teacher, temperature=1.0):
    """Return the mean over positions, the probabilities of which one after the other is sorted."""
    losses = [0 * student.sum()]
    for z, z_teacher in zip(student, teacher, strict=True):
        q, p = (torch.softmax(x / temperature, 0).sort().values.flip(0) for x in (z, z_teacher))
        q = torch.cat([q, q.new_zeros(max(0, len(p) - len(q)))])
        losses.append((q[: len(p)] - p).abs().sum() + q[len(p) :].sum())
    return torch.stack(losses).sum() / max(1, len(student))


KNOWN = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
}
KNOWN["jensen_shannon"] = lambda p, q, beta: (
    beta * KNOWN["forward_kl"](p, beta * p + (1 - beta) * q)
    + (1 - beta) * KNOWN["forward_kl"](q, beta * p + (1 - beta) * q)
)


def matched_kl(
    student, teacher, student_ids, teacher_ids, mass="renormalized", divergence="forward_kl",
    temperature=1.0, **own,
):  # fmt: skip
    """Return the mean of divergences of probabilities that are subtracted and divided."""
    both = []
    for logits, ids in ((student, student_ids), (teacher, teacher_ids)):
        found = torch.softmax(logits / temperature, -1)[..., ids]
        total = found.sum(-1, keepdim=True)
        tail = torch.cat([found, 1 - total], -1)
        both.append({"raw": found, "tail": tail, "renormalized": found / total}[mass])
    return temperature**2 * KNOWN[divergence](*both[::-1], **own).mean()


def projected_kl(
    student, teacher, ids, shares, mass="renormalized", divergence="forward_kl", temperature=1.0
):
    """Return the mean of divergences of the teacher from probabilities that are added up."""
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    shares = torch.where(ids < 0, 0, shares)
    shares = shares / shares.sum(1, keepdim=True)
    moved, reached = torch.zeros_like(p), torch.zeros_like(p[0])
    for index, share in zip(ids.clamp(min=0).T, shares.T, strict=True):
        moved = moved.index_add(-1, index, q * share)
        reached = reached.index_add(0, index, share)
    if mass == "renormalized":
        p, moved = p[..., reached > 0], moved[..., reached > 0]
        p = p / p.sum(-1, keepdim=True)
    elif divergence == "reverse_kl":  # 0 log 0 is 0 where nothing comes to
        p, moved = p[..., reached > 0], moved[..., reached > 0]
    return temperature**2 * KNOWN[divergence](p, moved).mean()


def alm(student, teacher, temperature=100.0, divergence="kl"):
    q, p = ((x / temperature).exp() for x in (student, teacher))
    if divergence == "tv":
        return ((p - q).abs() + ((1 - p) - (1 - q)).abs()).mean() / 2
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def multi_teacher(
    student, *teachers, teacher_weights=None, combine="mixture", teacher_index=None,
    divergence="forward_kl", temperature=1.0, scale_t2=True, **own,
):  # fmt: skip
    """Return the loss of each row, in which all teachers are there at once."""
    of_rows = getattr(textbook, divergence.upper())[1]
    options = dict(temperature=temperature, scale_t2=scale_t2, **own)
    t = torch.stack(teachers)
    if teacher_index is not None:
        return of_rows(
            student, t.gather(0, teacher_index[None, ..., None].expand_as(t))[0], **options
        )
    w = torch.as_tensor(teacher_weights or [1 / len(t)] * len(t), dtype=t.dtype, device=t.device)
    w = w.view(-1, *[1] * student.ndim)
    if combine == "sum":
        return sum(w[k, ..., 0] * of_rows(student, x, **options) for k, x in enumerate(t))
    if combine == "logits":
        return of_rows(student, (w * t).sum(0), **options)
    p = (w * (t / temperature).softmax(-1)).sum(0) / w.sum()
    return of_rows(student, temperature * p.log(), **options)


# ------------------------------------------------------------------------------------------ pairs


def reduced(losses, weights, reduction):
    losses = torch.stack(losses) if isinstance(losses, list) else losses
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    if reduction == "none":
        return weights * losses
    total = (weights * losses).sum()
    return total / weights.sum().clamp(min=1e-300) if reduction == "mean" else total


def info_nce(
    query, key, negatives=None, false_negatives=None, temperature=0.07, negative_weight=1.0,
    normalize=True, symmetric=False, margin=0.0, decoupled=False, in_batch_negatives=True,
    weights=None, reduction="mean",
):  # fmt: skip
    """Return the mean over queries, one row after the other."""
    n = len(query)
    if normalize:
        query, key = unit(query), unit(key)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)

    def one_way(query, key, negatives, out):
        losses = []
        for i, q in enumerate(query):
            positive = (q @ key[i] - margin) / temperature
            others = key if in_batch_negatives else key[:0]
            kept = [j != i and not (out is not None and out[i, j]) for j in range(len(others))]
            logits, further = [others[kept] @ q], key[:0]
            if negatives is not None:
                further = negatives[i] if negatives.ndim == 3 else negatives
                places = range(len(others), len(others) + len(further))
                further = further[[not (out is not None and out[i, j]) for j in places]]
                logits.append(further @ q)
            logits = torch.cat(logits) / temperature
            if not len(logits):
                losses.append(0 * (positive + further.sum()))
                continue
            below = torch.cat([logits + math.log(negative_weight), positive[None]])
            losses.append((below[:-1] if decoupled else below).logsumexp(0) - positive)
        return losses

    losses = one_way(query, key, negatives, false_negatives)
    if symmetric:
        out = None if false_negatives is None else false_negatives[:, :n].T
        losses = [(a + b) / 2 for a, b in zip(losses, one_way(key, query, None, out), strict=True)]
    return reduced(losses, weights, reduction) if losses else 0 * query.sum()


def clip_contrastive(image, text, logit_scale=5.0, logit_bias=0.0, weights=None, reduction="mean"):
    logits = logit_scale * image @ text.T + logit_bias
    own = torch.arange(len(image), device=image.device)
    losses = [F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    return reduced(sum(losses) / 2, weights, reduction)


def siglip(
    image, text, logit_scale=5.0, logit_bias=None, negative_only=False, weights=None,
    reduction="mean",
):  # fmt: skip
    logits = logit_scale * image @ text.T + (logit_bias or 0.0)
    signs = -torch.ones_like(logits)
    if not negative_only:
        signs = signs + 2 * torch.eye(len(image), device=image.device, dtype=image.dtype)
    return reduced(-F.logsigmoid(signs * logits).sum(1), weights, reduction)


def nt_xent(
    view1, view2, temperature=0.5, normalize=True, decoupled=False, weights=None, reduction="mean"
):
    n, z = len(view1), torch.cat([view1, view2])
    z = unit(z) if normalize else z
    losses = []
    for i, q in enumerate(z):
        j = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i and not (decoupled and k == j)]
        positive = z[j] @ q / temperature
        losses.append(
            (z[others] @ q / temperature).logsumexp(0) - positive if others else 0 * positive
        )
    losses = torch.stack(losses).view(2, n).mean(0)
    return reduced(losses, weights, reduction)


def sup_con(
    features, labels=None, keys=None, key_labels=None, positives=None, temperature=0.1,
    base_temperature=None, normalize=True, anchors="with_positive", weights=None, reduction="mean",
):  # fmt: skip
    """Return the mean over anchors, one after the other."""
    n_views = features.shape[1] if features.ndim == 3 else 1
    z, examples = features.flatten(0, -2), [i // n_views for i in range(features[..., 0].numel())]
    k = z if keys is None else keys
    z, k = (unit(z), unit(k)) if normalize else (z, k)
    of_keys = examples if keys is None else range(len(k))

    def belong(i, j):
        if positives is not None:
            return bool(positives[examples[i], of_keys[j]])
        other = labels if key_labels is None else key_labels
        label = int(labels[examples[i]])
        return label != -100 and label == int(other[of_keys[j]])

    losses, is_anchor = [], []
    for i, q in enumerate(z):
        others = [j for j in range(len(k)) if keys is not None or j != i]
        alike = [j for j in others if belong(i, j)]
        is_anchor.append(float(bool(alike) or anchors == "all"))
        loss = 0 * (q.sum() + k.sum())
        if alike:
            loss = (k[others] @ q / temperature).logsumexp(0) - (k[alike] @ q).mean() / temperature
        losses.append(loss if base_temperature is None else loss * temperature / base_temperature)
    if not losses:
        return 0 * z.sum()
    losses, is_anchor = torch.stack(losses), torch.tensor(is_anchor, device=z.device)
    weights = is_anchor if weights is None else is_anchor * weights.flatten()
    found = reduced(losses, weights, reduction)
    return found.view(features.shape[:-1]) if reduction == "none" else found


def similarity_kl(
    student, teacher, student_keys=None, teacher_keys=None, student_temperature=0.07,
    teacher_temperature=0.07, form="kl", normalize=True, symmetric=False, mask_self=False,
    weights=None, reduction="mean",
):  # fmt: skip
    networks = ((student, student_keys), (teacher, teacher_keys))
    direction = unit if normalize else lambda x: x
    s, t = (direction(q) @ direction(q if k is None else k).T for q, k in networks)
    s, t = s / student_temperature, t / teacher_temperature
    kept = torch.ones_like(s, dtype=torch.bool)
    if mask_self:
        kept.fill_diagonal_(False)

    def losses(student_rows, teacher_rows, kept_rows):
        rows = zip(student_rows, teacher_rows, kept_rows, strict=True)
        if form == "cross_entropy":
            return [-(b[k].softmax(0) * a[k].log_softmax(0)).sum() for a, b, k in rows]
        return [F.kl_div(a[k].log_softmax(0), b[k].softmax(0), reduction="sum") for a, b, k in rows]

    loss = reduced(losses(s, t, kept), weights, reduction)
    if symmetric:
        loss = (loss + reduced(losses(s.T, t.T, kept.T), weights, reduction)) / 2
    return loss


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


def dist_kd(student, teacher, beta=1.0, gamma=1.0, temperature=1.0, epsilon=1e-8):
    def agreement(x, y, dim):
        x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
        lengths = (torch.linalg.vector_norm(z, dim=dim) for z in (x, y))
        return (torch.mul(x, y).sum(dim) / (math.prod(lengths) + epsilon)).mean()

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


def ibot(student, teacher, mask, center, student_temperature=0.1, teacher_temperature=0.04):
    """Return DINOv2's loss of each image: its masked patches are gathered and weighted."""
    images = student.shape[:-2]
    losses = [0 * student.sum() for _ in range(images.numel())]
    student, teacher = (x.flatten(0, -3) for x in (student, teacher))
    for i, chosen in enumerate(mask.flatten(0, -2)):
        targets = ((teacher[i][chosen] - center) / teacher_temperature).softmax(-1).detach()
        logits = (student[i][chosen] / student_temperature).log_softmax(-1)
        if chosen.any():
            losses[i] = -(targets * logits).sum() / chosen.sum()
    return torch.stack(losses).view(images) if losses else student.sum((-1, -2)).view(images)


def koleo(first, second, epsilon=1e-8):
    """Return the logarithms of the distances to the nearest of all other embeddings."""
    rows = unit(torch.cat([first, second]))
    if len(rows) < 2:
        return 0 * rows.sum()
    nearest = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        distances = torch.stack([torch.linalg.vector_norm(row - rows[j]) for j in others])
        nearest.append(distances.min())
    return -(torch.stack(nearest) + epsilon).log().mean()


# --------------------------------------------------------------------------------------- textures


def nst(student, teacher):
    """Return RepDistiller's mean over channels of channels, one example after the other."""
    student, teacher = of_one_size(student, teacher)
    losses = [0 * student.sum()]
    for s, t in zip(student, teacher, strict=True):
        s, t = (F.normalize(x.flatten(1), dim=1) for x in (s, t))
        kernels = [(a[None] * b[:, None]).sum(-1).pow(2) for a, b in ((s, s), (t, t), (s, t))]
        losses.append(kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean())
    return torch.stack(losses).sum() / max(len(student), 1)


def of_one_size(*maps):
    sizes = [min(pair) for pair in zip(*(x.shape[2:] for x in maps), strict=True)]
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(sizes) - 1]
    return [x if [*x.shape[2:]] == sizes else pool(x, sizes) for x in maps]


def fsp(student, teacher, student_2, teacher_2):
    """Return RepDistiller's, whose products of channels are made position by position."""

    def flow(first, second):
        first, second = of_one_size(first, second)
        return (first[:, :, None] * second[:, None]).flatten(3).mean(-1)

    squares = (flow(student, student_2) - flow(teacher, teacher_2)).pow(2)
    return squares.mean() if squares.numel() else squares.sum()


def vid(mean, teacher, alpha, epsilon=1e-5):
    """Return RepDistiller's."""
    mean, teacher = of_one_size(mean, teacher)
    variance = torch.log(1.0 + torch.exp(alpha)) + epsilon
    variance = variance.view(1, -1, *[1] * (mean.ndim - 2))
    losses = 0.5 * ((mean - teacher) ** 2 / variance + torch.log(variance))
    return losses.mean() if losses.numel() else losses.sum()


def attention_mse(student, teacher):
    """Return TinyBERT's."""
    s, t = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in (student, teacher))
    return F.mse_loss(s, t) if s.numel() else s.sum()


# --------------------------------------------------------------------------------------- features


def hint(
    student, teacher, weights=None, mask=None, kind="mse", beta=1.0, feature_dim=None, batch_dim=0,
    normalizer=None, reduction="mean",
):  # fmt: skip
    """Return the mean over positions, one after the other, with the features of a position last."""
    feature_dim = (1 if student.ndim > 3 else -1) if feature_dim is None else feature_dim
    batch_dim -= batch_dim > feature_dim % student.ndim
    s, t = (x.movedim(feature_dim, -1) for x in (student, teacher))
    w = torch.ones(s.shape[:-1], dtype=torch.float64, device=s.device)
    for x in (weights, mask):
        if x is not None:
            x = x.movedim(feature_dim, -1)[..., 0] if x.ndim == s.ndim else x
            w = w * x.to(w.dtype)
    s, t, w = s.movedim(batch_dim, 0), t.movedim(batch_dim, 0), w.movedim(batch_dim, 0)
    examples, n = [], 0.0
    for i in range(len(s)):
        values, of_example = [0 * s[i].nan_to_num().sum()], 0.0
        rows = zip(*(x[i].reshape(-1, x.shape[-1]) for x in (s, t)), w[i].flatten(), strict=True)
        for a, b, weight in rows:
            if weight == 0:
                continue
            of_example = of_example + weight
            if kind == "mse":
                value = F.mse_loss(a, b)
            elif kind == "smooth_l1":
                value = F.smooth_l1_loss(a, b, beta=beta)
            elif kind == "cosine":
                value = 1 - F.cosine_similarity(a, b, dim=0)
            else:
                value = F.mse_loss(F.normalize(a, dim=0), F.normalize(b, dim=0))
            values.append(weight * value)
        total = torch.stack(values).sum()
        examples.append(total / (of_example or 1) if reduction == "none" else total)
        n = n + of_example
    if reduction == "none":
        return torch.stack(examples)
    total = torch.stack(examples).sum() if examples else 0 * s.sum()
    return total / (normalizer or n or 1) if reduction == "mean" else total


def embedding_mse(student, teacher, normalize=False):
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.mse_loss(student, teacher)


def attention_transfer(student, teacher, p=2, kind="sum"):
    """Return the loss as RepDistiller writes it, with the maximum as the paper has it."""

    def attention(features):
        powers = features.abs() ** p
        return F.normalize((powers.sum(1) if kind == "sum" else powers.amax(1)).flatten(1))

    sizes = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    student, teacher = (F.adaptive_avg_pool2d(x, sizes) for x in (student, teacher))
    return (attention(student) - attention(teacher)).square().mean()


# ----------------------------------------------------------------------------------------- tokens


def of_sequences(function):
    """Return a loss of one sequence as one of [..., L, D], with the tokens of the mask alone."""

    def of_each(student, teacher, mask=None, **options):
        if mask is None:
            mask = torch.ones_like(student[..., 0])
        if student.ndim > 2:
            batch = zip(student, teacher, mask, strict=True)
            losses = [of_each(s, t, mask=m, **options) for s, t, m in batch]
            return torch.stack(losses) if losses else student.sum((1, 2))
        kept = mask != 0
        if not kept.any():
            return 0 * student[:1].nan_to_num(0).sum()
        return function(student[kept], teacher[kept], **options)

    return of_each


@of_sequences
def token_relation(
    student, teacher, heads=1, normalize=False, temperature=None, student_temperature=None,
    teacher_temperature=None, divergence="kl", causal=False,
):  # fmt: skip
    def scores(x, own_temperature):
        parts = x.chunk(heads, -1)
        parts = [F.normalize(part, dim=-1) for part in parts] if normalize else parts
        scale = own_temperature or temperature or math.sqrt(x.shape[-1] / heads)
        return [part @ part.T / scale for part in parts]

    losses, n = [], len(student)
    pairs = zip(
        scores(student, student_temperature), scores(teacher, teacher_temperature), strict=True
    )
    for s, t in pairs:
        rows = [(s[i, : i + 1], t[i, : i + 1]) if causal else (s[i], t[i]) for i in range(n)]
        if divergence == "mse":
            losses.append(torch.cat([(a - b) ** 2 for a, b in rows]).mean())
            continue
        of_rows = [
            F.kl_div(a.log_softmax(0), b.log_softmax(0), reduction="sum", log_target=True)
            for a, b in rows
        ]
        losses.append(torch.stack(of_rows).mean())
    return torch.stack(losses).mean()


def minilm_relation(*vectors, n_heads=48, weights=None, mask=None, **options):
    """Take the vectors of the student and then as many of the teacher."""
    n = len(vectors) // 2
    factors = weights or [1.0] * n
    return sum(
        a * token_relation(s, t, heads=n_heads, mask=mask, **options).mean()
        for a, s, t in zip(factors, vectors[:n], vectors[n:], strict=True)
    )


def gram_anchoring(student, teacher, remove_negative="both", per_image=True, mask=None):
    @of_sequences
    def of_one(student, teacher):
        s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
        s, t = torch.einsum("id,jd->ij", s, s), torch.einsum("id,jd->ij", t, t)
        if remove_negative == "both":
            s = torch.where(s < 0, 0, s)
        if remove_negative == "teacher":
            s = torch.where((s < 0) & (t < 0), 0, s)
        if remove_negative is not None:
            t = torch.where(t < 0, 0, t)
        return F.mse_loss(s, t)

    if not per_image:
        mask = None if mask is None else mask.flatten()
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        return of_one(student, teacher, mask=mask)
    losses = of_one(student, teacher, mask=mask)
    counted = losses.numel() if mask is None else int((mask != 0).any(-1).sum())
    return losses.sum() / max(counted, 1)


@of_sequences
def cka(student, teacher, center=True):
    n = len(student)
    if n < 1 + center:
        return 0 * student.sum()
    centring = torch.eye(n, dtype=student.dtype, device=student.device) - center / n
    s, t = (centring @ x @ x.T @ centring for x in (student, teacher))
    return 1 - (s * t).sum() / (torch.linalg.matrix_norm(s) * torch.linalg.matrix_norm(t))


# ----------------------------------------------------------------------------------------- levels


def mlkd(
    student, teacher, temperatures=(2, 3, 4, 5, 6), instance_weight=1.0, batch_weight=1.0,
    class_weight=1.0,
):  # fmt: skip
    """Return what the authors' code sums up, without its masks."""
    loss = 0
    for T in temperatures:
        q, p = (student / T).softmax(1), (teacher / T).softmax(1)
        kl = F.kl_div((student / T).log_softmax(1), p, reduction="none").sum(1).mean() * T**2
        pairs = ((p @ p.T - q @ q.T) ** 2).sum() / len(p)
        classes = ((p.T @ p - q.T @ q) ** 2).sum() / p.shape[1]
        loss = loss + instance_weight * kl + batch_weight * pairs + class_weight * classes
    return loss

"""The contrastive losses, and the divergence of similarities, as people write them; all engines."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from losses import DEVICE, BatchCase, normal

import fastkd
from fastkd import _pairs, similarity
from fastkd._backend import triton_obstacle
from fastkd.portable import _similarities as portable

smoke = pytest.mark.smoke
ENGINES = [
    "formula",
    "portable",
    "portable for few",
    "portable in chunks",
    "portable with maxima",
    "portable in half",
    "triton",
]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each in turn computes the losses of the test."""
    if request.param == "triton":
        obstacle = triton_obstacle([torch.empty(0, device=DEVICE)])
        if obstacle:
            pytest.skip(f"{obstacle}; TRITON_INTERPRET=1 runs the kernels without one")
    for family in (_pairs, similarity):
        most = 1 << 40 if request.param == FOR_FEW else 0
        monkeypatch.setattr(family, "_FEW_PAIRS", most)
    if request.param == "portable in chunks":
        monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 50)
        monkeypatch.setattr(portable, "_PAGE", 1)  # rows with a gap, of any length
    if request.param == "portable in half":
        multiply_halves(monkeypatch)
    if request.param in ("portable with maxima", "portable in half"):  # as on a GPU
        monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 50)
        monkeypatch.setattr(portable.Similarities, "shift", lambda similarities: None)
    with fastkd.backend(request.param.split()[0]):
        yield request.param


def what_computes(case, engine):
    """The formula, or an engine."""
    return "formula" if engine == FOR_FEW and case not in FEW else engine


def multiply_halves(monkeypatch):
    """As on a GPU, where half precision is multiplied and summed in float32."""

    def product(a, b, out):
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    monkeypatch.setattr(
        portable, "multiplies_halves", lambda rows, half: rows.dtype == torch.float32
    )
    monkeypatch.setattr(portable, "_product", product)


# ------------------------------------------------------------- the losses as people write them


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)


def published_info_nce(
    query, key, negatives=None, temperature=0.07, negative_weight=1.0, normalize=True,
    symmetric=False, margin=0.0, decoupled=False, in_batch_negatives=True,
):  # fmt: skip
    """Row by row."""
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


def published_clip(image, text, logit_scale=5.0, logit_bias=0.0):
    logits = logit_scale * image @ text.T + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def published_siglip(image, text, logit_scale=5.0, logit_bias=-2.0):
    logits = logit_scale * image @ text.T + logit_bias
    signs = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def published_nt_xent(view1, view2, temperature=0.5):
    z = unit(torch.cat([view1, view2]))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(view1)))


def published_sup_con(features, labels, temperature=0.1, anchors="with_positive"):
    """Anchor by anchor."""
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


def published_similarity_kl(
    student, teacher, student_keys=None, teacher_keys=None, student_temperature=0.07,
    teacher_temperature=0.07, symmetric=False, mask_self=False,
):  # fmt: skip
    networks = ((student, student_keys), (teacher, teacher_keys))
    s, t = (unit(q) @ unit(q if k is None else k).T for q, k in networks)
    s, t = s / student_temperature, t / teacher_temperature
    if mask_self:
        kept = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
        s, t = (x.T[kept].view(len(x), -1) if symmetric is None else x for x in (s, t))
        rows = [(a[k], b[k]) for a, b, k in zip(s, t, kept, strict=True)]
        columns = [(a[k], b[k]) for a, b, k in zip(s.T, t.T, kept.T, strict=True)]
    else:
        rows, columns = zip(s, t, strict=True), zip(s.T, t.T, strict=True)

    def mean_kl(pairs):
        return torch.stack(
            [F.kl_div(a.log_softmax(0), b.softmax(0), reduction="sum") for a, b in pairs]
        ).mean()

    return (mean_kl(rows) + mean_kl(columns)) / 2 if symmetric else mean_kl(rows)


# ------------------------------------------------------------------------------------- the cases


def embeddings(examples, n_features, dtype=torch.float64, seed=0, n=2):
    tensors = [normal(*examples, n_features, seed=seed + i, dtype=dtype) for i in range(n)]
    return [x.requires_grad_() for x in tensors]


def unit_embeddings(*arguments):
    tensors = [F.normalize(x.detach(), dim=-1) for x in embeddings(*arguments)]
    return [x.requires_grad_() for x in tensors]


def with_bank(examples, n_features, dtype=torch.float64, seed=0):
    bank = normal(*examples[:-1], 13, n_features, seed=7, dtype=dtype)
    return [*embeddings(examples, n_features, dtype, seed), bank.requires_grad_()]


def with_labels(examples, n_features, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, 3, examples, generator=generator).mul_(1000).to(DEVICE)
    return [*embeddings(examples, n_features, dtype, seed, n=1), labels]


def of_two_networks(examples, n_features, dtype=torch.float64, seed=0):
    student, teacher = embeddings(examples, n_features, dtype, seed)
    return [student, torch.cat([teacher, teacher[..., :2].square()], -1).detach()]


def with_keys(examples, n_features, dtype=torch.float64, seed=0):
    networks = of_two_networks(examples, n_features, dtype, seed)
    keys = of_two_networks((*examples[:-1], 11), n_features, dtype, seed + 5)
    return [*networks, *keys]


def similarity_kl(student, teacher, student_keys, teacher_keys, **options):
    keys = dict(student_keys=student_keys, teacher_keys=teacher_keys)
    return fastkd.similarity_kl(student, teacher, **keys, **options)


def case(loss, published, inputs=embeddings, **options):
    return BatchCase(loss, options, (None, published), inputs)


NCE = fastkd.info_nce, published_info_nce
KL = fastkd.similarity_kl, published_similarity_kl
INFO_NCE = case(*NCE)
BOTH_WAYS = case(*NCE, symmetric=True)
CLIP = case(partial(fastkd.clip_contrastive, logit_scale=5.0), published_clip, unit_embeddings)
SIGLIP = case(
    partial(fastkd.siglip, logit_scale=5.0, logit_bias=-2.0), published_siglip, unit_embeddings
)
NT_XENT = case(fastkd.nt_xent, published_nt_xent)
SUP_CON = case(fastkd.sup_con, published_sup_con, with_labels)
SOFT = case(*KL, of_two_networks)
LOSSES = [INFO_NCE, BOTH_WAYS, CLIP, SIGLIP, NT_XENT, SUP_CON, SOFT]
NAMES = ["info_nce", "symmetric", "clip", "siglip", "nt_xent", "sup_con", "similarity_kl"]
WITH_OPTIONS = [
    case(*NCE, with_bank, negative_weight=0.3, margin=0.1),
    case(*NCE, with_bank, negative_weight=0.3, symmetric=True, decoupled=True),
    case(*NCE, with_bank, in_batch_negatives=False, temperature=0.2),
    case(*NCE, with_bank, in_batch_negatives=False, decoupled=True),
    case(*NCE, unit_embeddings, normalize=False, symmetric=True, margin=-0.2),
    case(*NCE, decoupled=True, negative_weight=2.0),
    case(fastkd.sup_con, published_sup_con, with_labels, anchors="all", temperature=0.3),
    case(*KL, of_two_networks, mask_self=True, teacher_temperature=0.2),
    case(*KL, of_two_networks, mask_self=True, symmetric=True),
    case(similarity_kl, published_similarity_kl, with_keys, teacher_temperature=0.03),
    case(similarity_kl, published_similarity_kl, with_keys, symmetric=True),
]
# what is not computed by its formula in a small batch on a CPU
FEW = [*LOSSES[:-1], WITH_OPTIONS[6]]
FOR_FEW = "portable for few"
for_many = pytest.mark.parametrize(
    "engine", [name for name in ENGINES if name != FOR_FEW], indirect=True
)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=NAMES)
each_case = pytest.mark.parametrize(
    "case", LOSSES + WITH_OPTIONS, ids=NAMES + [f"with options {i}" for i in range(11)]
)

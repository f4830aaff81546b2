"""Training with a part of the batch on each rank; a module that their processes can import."""

import itertools
import os
from functools import partial

import torch
import torch.distributed as dist
from inputs import INTERPRETED, normal
from torch.nn.parallel import DistributedDataParallel

import fastkd

# the examples of each rank: last batches are uneven, and a rank may have none
PARTS = {2: [4, 5], 3: [2, 4, 3], 4: [1, 5, 0, 3]}
ENGINES = ["formula", "portable", *(["triton"] if INTERPRETED else [])]
WEIGHTS = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([3, 1, 3, 7, 1, 3, 0, 7, 3])
BANK = normal(4, 11, seed=8).cpu()
SCALE = torch.tensor(3.0, dtype=torch.float64)


def batch():
    """Return nine examples with the same one on the first and on the last rank."""
    features, teacher = normal(9, 5, seed=1).cpu(), normal(9, 11, seed=2).cpu()
    features[8], teacher[8] = features[0], teacher[0]
    return features, teacher


def network():
    layer = torch.nn.Linear(5, 11).double()
    with torch.no_grad():
        layer.weight.copy_(normal(11, 5, seed=3))
        layer.bias.zero_()
    return layer


def unit(x):
    return torch.nn.functional.normalize(x)


def divisor(total):
    """Return the divisor of the whole batch, of whose ranks DDP averages the gradients."""
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def rows(loss):
    """State a loss of rows: ranks keep different numbers of examples, so they share a divisor."""

    def of_part(model, features, teacher, first, group=None):
        mine = slice(first, first + len(features))
        return loss(model(features), teacher, LABELS[mine], WEIGHTS[mine])

    return of_part


def relations(loss):
    return lambda model, features, teacher, first, **o: loss(model(features), teacher, **o)


def towers(loss):
    """State a loss of two views, which go through the network at once: DDP wants one forward."""

    def of_part(model, features, teacher, first, **options):
        views = model(torch.cat([features, features.square()]))
        return loss(*views.chunk(2), teacher, LABELS[first : first + len(features)], **options)

    return of_part


def crops(model, features, teacher, first, **options):
    """Make a second step, whose centre is what the teacher's outputs of all ranks left."""
    loss = fastkd.DINOLoss(11, **options).double()
    student = model(torch.cat([features, 2 * features, features.square()])).unflatten(0, (3, -1))
    outputs = torch.stack([teacher, teacher.square()])
    loss(student.detach(), outputs)
    return loss(student, outputs.flip(0))


def normalised_crops(model, features, teacher, first, **options):
    """Centre by Sinkhorn's iteration, in which the outputs of all ranks take part."""
    loss = fastkd.DINOLoss(11, centering="sinkhorn", **options).double()
    student = model(torch.cat([features, 2 * features])).unflatten(0, (2, -1))
    return loss(student, torch.stack([teacher, teacher.square()]))


def patches(model, features, teacher, first, **options):
    """Make a second step, with the mean of the masked outputs of all ranks as its centre."""
    loss = fastkd.IBOTLoss(11, **options).double()
    student = model(torch.cat([features, 2 * features])).unflatten(0, (2, -1)).transpose(0, 1)
    outputs = torch.stack([teacher, teacher.square()], 1)
    labels = LABELS[first : first + len(features)]
    mask = torch.stack([labels > 0, labels == 3], 1)
    loss(student.detach(), outputs, mask)
    n_images = divisor(torch.tensor(1.0 * len(features)))
    return loss(student, outputs.flip(1), mask, normalizer=n_images)


def queued(a, b, t, y, **options):
    """Make two steps, of which the second has the first one's keys of all ranks in its queue."""
    loss = fastkd.InfoNCELoss(queue_size=7, **options)
    loss(a.detach(), b.detach())
    return loss(a, b)


def _keys(a, b, t, y, **options):
    keys = dict(student_keys=b, teacher_keys=t.square(), symmetric=True)
    return fastkd.similarity_kl(a, t, **keys, **options)


def _of_each(a, b, t, y, **options):
    negatives = torch.stack([t, t.square()], 1)
    return fastkd.info_nce(a, b, negatives, weights=0.1 + y, **options)


def _unreduced(a, b, t, y, **options):
    losses = fastkd.info_nce(a, b, reduction="none", **options)
    return losses.sum() / divisor(torch.tensor(1.0 * len(a)))


def _labelled_keys(a, b, t, y, **options):
    return fastkd.sup_con(a, y, t, y, weights=1.0 + y, anchors="all", **options)


LOSSES = [
    rows(lambda s, t, y, w: fastkd.reverse_kl(s, t, weights=w, normalizer=divisor(w.sum()))),
    rows(lambda s, t, y, w: fastkd.kd(s, t, y, normalizer=divisor(torch.tensor(1.0 * len(y))))),
    towers(_unreduced),
    patches,
    relations(fastkd.rkd_distance),
    relations(fastkd.rkd_angle),
    relations(partial(fastkd.rkd, smooth_l1_beta=0.2, normalize=True)),
    relations(partial(fastkd.mlkd, batch_weight=0.5, class_weight=2.0)),
    relations(lambda s, t, **o: fastkd.mlkd(3 * s[:, :4], t[:, :4], temperatures=(1.0, 2.0), **o)),
    towers(lambda a, b, t, y, **o: fastkd.info_nce(a, b, BANK, margin=0.1, **o)),
    towers(queued),
    towers(lambda a, b, t, y, **o: fastkd.info_nce(a, b, symmetric=True, decoupled=True, **o)),
    towers(lambda a, b, t, y, **o: fastkd.info_nce(a, b, BANK, in_batch_negatives=False, **o)),
    towers(lambda a, b, t, y, **o: fastkd.info_nce(a, b, symmetric=True, weights=y, **o)),
    towers(_of_each),
    towers(lambda a, b, t, y, **o: fastkd.info_nce(a, b, None, y[:, None] == LABELS, **o)),
    towers(lambda a, b, t, y, **o: fastkd.clip_contrastive(unit(a), unit(b), SCALE, **o)),
    towers(lambda a, b, t, y, **o: fastkd.siglip(unit(a), unit(b), SCALE, -SCALE, **o)),
    towers(lambda a, b, t, y, **o: fastkd.nt_xent(a, b, **o)),
    towers(lambda a, b, t, y, **o: fastkd.sup_con(a, y, **o)),
    towers(lambda a, b, t, y, **o: fastkd.sup_con(torch.stack([a, b], 1), y, **o)),
    towers(_labelled_keys),
    towers(lambda a, b, t, y, **o: fastkd.sup_con(a, positives=y[:, None] == LABELS, **o)),
    towers(lambda a, b, t, y, **o: fastkd.similarity_kl(a, t, mask_self=True, **o)),
    towers(_keys),
    crops,
    normalised_crops,
    relations(lambda student, teacher, **o: fastkd.koleo(student, epsilon=0.1, **o)),
]


def train_part(rank, sizes, folder, engines):
    """Save the losses and the gradients that this rank gets from each loss and engine."""
    if INTERPRETED:
        import interpreter

        interpreter.correct()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(sizes)
    )
    try:
        start = sum(sizes[:rank])
        features, teacher = (x[start : start + sizes[rank]] for x in batch())
        found = []
        for loss_of_part, engine in itertools.product(LOSSES, engines):
            model = DistributedDataParallel(network())
            with fastkd.backend(engine):
                loss = loss_of_part(model, features, teacher, start, group="world")
            loss.backward()
            found.append((loss.detach(), model.module.weight.grad))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # C++'s own end of a process aborts if a thread of gloo is still about

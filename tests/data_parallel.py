"""Training with a part of the batch on each rank; a module that their processes can import."""

import itertools
import os
from functools import partial

import torch
import torch.distributed as dist
from losses import INTERPRETED, normal
from torch.nn.parallel import DistributedDataParallel

import fastkd

WORLD = 2
WEIGHTS = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def batch():
    features, teacher = normal(8, 5, seed=1).cpu(), normal(8, 11, seed=2).cpu()
    labels = torch.arange(8)
    labels[[1, 6, 7]] = -100
    return features, teacher, labels


def network():
    layer = torch.nn.Linear(5, 11).double()
    with torch.no_grad():
        layer.weight.copy_(normal(11, 5, seed=3))
        layer.bias.zero_()
    return layer


def mean_of_all(student, teacher, labels, weights):
    return fastkd.forward_kl(student, teacher)


def mean_of_kept(student, teacher, labels, weights):
    """Ranks keep different numbers of examples: the divisor is that of the whole batch."""
    total = weights.sum()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= WORLD  # DDP averages the gradients of the ranks
    return fastkd.reverse_kl(student, teacher, weights=weights, normalizer=total)


def labelled_and_soft(student, teacher, labels, weights):
    total = (labels >= 0).sum().double()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= WORLD
    return fastkd.kd(student, teacher, labels, normalizer=total)


def _leave():
    """Without C++'s own end of a process, which aborts if a thread of gloo is still about."""
    os._exit(0)


LOSSES = [mean_of_all, mean_of_kept, labelled_and_soft]


def train_half(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        mine = slice(4 * rank, 4 * rank + 4)
        features, teacher, labels = (x[mine] for x in batch())
        gradients = []
        for loss in LOSSES:
            model = DistributedDataParallel(network())
            loss(model(features), teacher, labels, WEIGHTS[mine]).backward()
            gradients.append(model.module.weight.grad)
        if rank == 0:
            torch.save(gradients, f"{folder}/gradients.pt")
    finally:
        dist.destroy_process_group()
    _leave()


# the examples of each rank: last batches are uneven, and a rank may have none
PARTS = {2: [4, 5], 3: [2, 4, 3], 4: [1, 5, 0, 3]}
RELATIONS = [
    fastkd.rkd_distance,
    fastkd.rkd_angle,
    partial(fastkd.rkd, smooth_l1_beta=0.2, normalize=True),
]
ENGINES = ["formula", "portable", *(["triton"] if INTERPRETED else [])]


def related_batch():
    """With the same example on the first and on the last rank."""
    features, teacher = normal(9, 5, seed=1).cpu(), normal(9, 7, seed=2).cpu()
    features[8], teacher[8] = features[0], teacher[0]
    return features, teacher


def of_relation(relation):
    def of_part(model, features, teacher, first, **options):
        return relation(model(features), teacher, **options)

    return of_part


def of_towers(loss):
    """The views of both towers go through the network at once: DDP wants one forward."""

    def of_part(model, features, teacher, first, **options):
        rows = model(torch.cat([features, features.square()]))
        return loss(*rows.chunk(2), teacher, first, **options)

    return of_part


def unit(x):
    return torch.nn.functional.normalize(x)


def classes(first, rows):
    return torch.tensor([3, 1, 3, 7, 1, 3, 0, 7, 3])[first : first + len(rows)]


BANK = normal(4, 11, seed=8).cpu()
SCALE = torch.tensor(3.0, dtype=torch.float64)
CONTRASTS = [
    lambda a, b, t, first, **o: fastkd.info_nce(a, b, BANK, margin=0.1, **o),
    lambda a, b, t, first, **o: fastkd.info_nce(a, b, symmetric=True, decoupled=True, **o),
    lambda a, b, t, first, **o: fastkd.info_nce(a, b, BANK, in_batch_negatives=False, **o),
    lambda a, b, t, first, **o: fastkd.clip_contrastive(unit(a), unit(b), SCALE, **o),
    lambda a, b, t, first, **o: fastkd.siglip(unit(a), unit(b), SCALE, -SCALE, **o),
    lambda a, b, t, first, **o: fastkd.nt_xent(a, b, **o),
    lambda a, b, t, first, **o: fastkd.sup_con(a, classes(first, a), **o),
    lambda a, b, t, first, **o: fastkd.similarity_kl(a, t, mask_self=True, **o),
    lambda a, b, t, first, **o: fastkd.similarity_kl(
        a, t, student_keys=b, teacher_keys=t.square(), symmetric=True, **o
    ),
]


def of_crops(model, features, teacher, first, **options):
    """In the second step the centre is what the teacher's outputs of all ranks left."""
    loss = fastkd.DINOLoss(11, **options).double()
    student = model(torch.cat([features, 2 * features, features.square()])).unflatten(0, (3, -1))
    outputs = torch.stack([teacher, teacher.square()]).repeat(1, 1, 2)[..., :11]
    loss(student.detach(), outputs)
    return loss(student, outputs.flip(0))


FAMILIES = {
    "relations": [*map(of_relation, RELATIONS)],
    "contrasts": [*map(of_towers, CONTRASTS)],
    "self_distillation": [of_crops],
}


def train_part(rank, sizes, folder, family):
    """The losses and the gradients of all engines, from the first and from the last rank."""
    if INTERPRETED:
        import interpreter

        interpreter.correct()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(sizes)
    )
    try:
        start = sum(sizes[:rank])
        features, teacher = (x[start : start + sizes[rank]] for x in related_batch())
        found = []
        for loss_of_part, engine in itertools.product(FAMILIES[family], ENGINES):
            model = DistributedDataParallel(network())
            with fastkd.backend(engine):
                loss = loss_of_part(model, features, teacher, start, group=dist.group.WORLD)
            loss.backward()
            found.append((loss.detach(), model.module.weight.grad))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    _leave()

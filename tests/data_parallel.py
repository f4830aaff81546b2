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


def train_part(rank, sizes, folder):
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
        for relation, engine in itertools.product(RELATIONS, ENGINES):
            model = DistributedDataParallel(network())
            with fastkd.backend(engine):
                loss = relation(model(features), teacher, group=dist.group.WORLD)
            loss.backward()
            found.append((loss.detach(), model.module.weight.grad))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    _leave()

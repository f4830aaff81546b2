"""Data parallelism: processes with a part of the batch each train as one with the whole batch."""

import itertools

import pytest
import torch
import torch.multiprocessing as multiprocessing
from data_parallel import (
    ENGINES,
    LOSSES,
    PARTS,
    RELATIONS,
    WEIGHTS,
    WORLD,
    batch,
    network,
    related_batch,
    train_half,
    train_part,
)
from exactness import assert_same

import fastkd


def test_ranks_train_as_one_process(tmp_path):
    multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=WORLD)
    expected = []
    for loss in LOSSES:
        model = network()
        features, teacher, labels = batch()
        loss(model(features), teacher, labels, WEIGHTS).backward()
        expected.append(model.weight.grad)
    assert_same(torch.load(tmp_path / "gradients.pt"), expected)


@pytest.mark.parametrize("world", PARTS)
def test_relations_between_ranks(world, tmp_path):
    """Every rank gets the loss of the whole batch, and DDP's average is the whole gradient."""
    multiprocessing.spawn(train_part, (PARTS[world], str(tmp_path)), nprocs=world)
    expected = []
    for relation, _ in itertools.product(RELATIONS, ENGINES):
        model = network()
        features, teacher = related_batch()
        with fastkd.backend("formula"):
            loss = relation(model(features), teacher)
        loss.backward()
        expected.append((loss.detach(), model.weight.grad))
    for rank in range(world):
        for found, true in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert_same(found, true)

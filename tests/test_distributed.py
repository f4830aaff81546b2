"""Data parallelism: processes with a part of the batch each train as one with the whole batch."""

import itertools

import pytest
import torch
import torch.multiprocessing as multiprocessing
from data_parallel import (
    ENGINES,
    FAMILIES,
    LOSSES,
    PARTS,
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
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_between_ranks(family, world, tmp_path):
    """Every rank gets the loss of the whole batch, and DDP's average is the whole gradient."""
    arguments = PARTS[world], str(tmp_path), family
    multiprocessing.spawn(train_part, arguments, nprocs=world)
    expected = []
    for loss_of_part, _ in itertools.product(FAMILIES[family], ENGINES):
        model = network()
        with fastkd.backend("formula"):
            loss = loss_of_part(model, *related_batch(), 0)
        loss.backward()
        expected.append((loss.detach(), model.weight.grad))
    for rank in range(world):
        for found, true in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert_same(found, true)

"""Data parallelism: processes with a part of the batch each train as one with the whole batch."""

import itertools

import pytest
import torch
import torch.multiprocessing as multiprocessing
from choice import full
from data_parallel import ENGINES, LOSSES, PARTS, batch, network, train_part
from exactness import assert_same

import fastkd

N_OF_ROWS = 4  # losses of examples, whose value is the share of a rank
# the smallest world for `make test`, and the engines that need no interpreter
WORLDS = [(2, ENGINES[:2]), *(pytest.param(n, ENGINES, marks=full) for n in PARTS)]


@pytest.mark.parametrize("world, engines", WORLDS)
def test_ranks_train_as_one_process(world, engines, tmp_path):
    """Every rank gets the loss of the whole batch, and DDP's average is the whole gradient."""
    multiprocessing.spawn(train_part, (PARTS[world], str(tmp_path), engines), nprocs=world)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for i, (loss_of_part, _) in enumerate(itertools.product(LOSSES, engines)):
        model = network()
        with fastkd.backend("formula"):
            loss = loss_of_part(model, *batch(), 0)
        loss.backward()
        values, gradients = zip(*(found[i] for found in of_ranks), strict=True)
        if i < N_OF_ROWS * len(engines):
            values = [torch.stack(values).mean()]
        for value in values:
            assert_same([value], [loss])
        for gradient in gradients:
            assert_same([gradient], [model.weight.grad])

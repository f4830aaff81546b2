"""Data parallelism: two processes with half a batch each train as one with the whole batch."""

import torch
import torch.multiprocessing as multiprocessing
from data_parallel import LOSSES, WEIGHTS, WORLD, batch, network, train_half
from exactness import assert_same


def test_ranks_train_as_one_process(tmp_path):
    multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=WORLD)
    expected = []
    for loss in LOSSES:
        model = network()
        features, teacher, labels = batch()
        loss(model(features), teacher, labels, WEIGHTS).backward()
        expected.append(model.weight.grad)
    assert_same(torch.load(tmp_path / "gradients.pt"), expected)

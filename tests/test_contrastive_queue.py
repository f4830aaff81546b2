"""The queue that InfoNCELoss keeps of the keys before."""

import pytest
import torch
from contrasts import embeddings
from exactness import assert_same

import fastkd


def test_a_queue_of_the_keys_before():
    loss, keys = fastkd.InfoNCELoss(queue_size=7, temperature=0.3), []
    for step in range(4):
        query, key = embeddings((3,), 4, seed=step)
        bank = torch.cat([key[:0].detach(), *keys])[-7:]
        expected = fastkd.info_nce(query, key, bank, temperature=0.3)
        assert_same([loss(query, key)], [expected])
        keys.append(key.detach())
        assert torch.equal(loss.queue, torch.cat(keys)[-7:]) and not loss.queue.requires_grad
    twin = fastkd.InfoNCELoss(queue_size=7, temperature=0.3)
    twin.load_state_dict(loss.state_dict())
    twin.eval()
    assert_same([twin(query, key), twin(query, key)], [loss.eval()(query, key)] * 2)
    for size in (-1, 2.5, True):
        with pytest.raises(ValueError, match=rf"queue_size .* got {size}"):
            fastkd.InfoNCELoss(queue_size=size)
    with pytest.raises(ValueError, match=r"queue holds keys of D = 4, got keys \[3, 5\]"):
        twin(*embeddings((3,), 5))


def test_a_queue_holds_no_more_than_its_keys():
    loss = fastkd.InfoNCELoss(queue_size=4)
    loss(*embeddings((50,), 3))
    assert loss.queue.untyped_storage().nbytes() == loss.queue.nbytes == 4 * 3 * 8
    shorter = fastkd.InfoNCELoss(queue_size=2)
    shorter.load_state_dict(loss.state_dict())
    assert torch.equal(shorter.queue, loss.queue[-2:])
    assert not fastkd.InfoNCELoss().state_dict()


def test_a_queue_alone():
    """The first step has no negatives."""
    loss = fastkd.InfoNCELoss(queue_size=5, in_batch_negatives=False)
    query, key = embeddings((3,), 4)
    assert loss(query, key) == 0
    expected = fastkd.info_nce(query, key, key.detach(), in_batch_negatives=False)
    assert_same([loss(query, key)], [expected])

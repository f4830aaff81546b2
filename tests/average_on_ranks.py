"""Train a network, and the teacher that follows it, on each of the processes of test_ema.py."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastkd

DECAY = fastkd.schedules.cosine(0.5, 1.0, 8)


def train_on_a_rank(rank, world, folder):
    """Save what this rank's teachers of a parallel and of a sharded network know."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        x, found = torch.randn(6, 3, generator=torch.Generator().manual_seed(rank)), []
        for shard in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
            if shard:
                teacher = fastkd.EMATeacher(model, DECAY)
                for whole in (model, teacher.module):
                    fully_shard(whole[0])
                    fully_shard(whole)
                with pytest.raises(
                    TypeError, match=r"sharded by fully_shard, .* EMATeacher .* first"
                ):
                    fastkd.EMATeacher(model)
            else:
                model = DistributedDataParallel(model)
                teacher = fastkd.EMATeacher(model, DECAY)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                loss = (model(x) - teacher(x).detach() - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                teacher.update(model)
            outputs = teacher(x)
            for module in teacher.module.modules():
                if shard and hasattr(module, "reshard"):
                    module.reshard()
            tensors = teacher.module.state_dict().values()
            found.append([outputs, *(x.full_tensor() if shard else x for x in tensors)])
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # C++'s own end of a process aborts if a thread of gloo is still about

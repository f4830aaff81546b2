"""The moving average of a network: its numbers, its state, and the wrappers of networks."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from average_on_ranks import DECAY, train_on_a_rank
from inputs import DEVICE, normal
from torch import nn

import fastkd


class Network(nn.Module):
    """A network with dropout, tied parameters, and buffers of three kinds."""

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.head = nn.Linear(width, width, bias=False)
        self.tied = self.head
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.tied(self.head(self.body(x)))


def network(seed=0):
    torch.manual_seed(seed)
    return Network().to(DEVICE)


def changed(model, step):
    """Change all parameters and buffers in place, as a step of training does."""
    with torch.no_grad():
        for i, x in enumerate([*model.parameters(), *model.buffers()]):
            x.copy_(10 * normal(*x.shape, seed=100 * step + i))
    return model


def trained(model, steps, optimizer, after=lambda: None):
    for step in steps:
        x = normal(6, 3, dtype=torch.float32, seed=step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after()


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("decay", [0.9, DECAY, 0.0, 1], ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_the_average_is_that_of_the_parameters(decay, buffers):
    model = network()
    teacher = fastkd.EMATeacher(model, decay, buffers=buffers)
    expected = [x.detach().double() for x in model.parameters()]
    of_buffers = {name: x.double() for name, x in model.named_buffers()}
    for step in range(3):
        teacher.update(changed(model, step))
        d = decay(step) if callable(decay) else decay
        expected = [
            d * a + (1 - d) * x.double() for a, x in zip(expected, model.parameters(), strict=True)
        ]
        for name, x in model.named_buffers():
            is_mean = buffers == "average" and x.is_floating_point()
            of_buffers[name] = (
                d * of_buffers[name] + (1 - d) * x.double() if is_mean else x.double()
            )
    for average, truth in zip(teacher.module.parameters(), expected, strict=True):
        torch.testing.assert_close(average.double(), truth, rtol=1e-6, atol=1e-6)
    for name, average in teacher.module.named_buffers():
        torch.testing.assert_close(average.double(), of_buffers[name], rtol=1e-6, atol=1e-6)
    assert teacher.step == 3
    assert teacher.module.tied is teacher.module.head


def test_the_copy_is_a_teacher():
    """It is in eval mode, on no graph, and the student's memory is its own."""
    model, x = network(), normal(6, 3, dtype=torch.float32).requires_grad_()
    teacher = fastkd.EMATeacher(model, 0.5).train()
    assert teacher.training and not any(m.training for m in teacher.module.modules())
    assert not any(x.requires_grad for x in teacher.parameters())
    assert all(x.requires_grad for x in model.parameters()) and model.training
    before = teacher(x)
    assert not before.requires_grad and torch.equal(before, copy.deepcopy(model).eval()(x))
    changed(model, 0)
    assert torch.equal(teacher(x), before)


def test_training_goes_on_from_a_checkpoint_with_the_same_bits():
    def start():
        model = network()
        teacher = fastkd.EMATeacher(model, DECAY)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, teacher, optimizer

    def run(parts, steps):
        model, teacher, optimizer = parts
        torch.manual_seed(steps[0])
        trained(model, steps[:3], optimizer, lambda: teacher.update(model))
        torch.manual_seed(3)
        trained(model, steps[3:], optimizer, lambda: teacher.update(model))

    whole, first, second = start(), start(), start()
    run(whole, range(6))
    run(first, range(3))
    for part, saved in zip(second, [copy.deepcopy(x.state_dict()) for x in first], strict=True):
        part.load_state_dict(saved)
    assert second[1].step == 3
    run(second, range(3, 6))
    assert same(whole[1], second[1]) and not same(whole[1], first[1])
    assert whole[1].step == second[1].step == 6


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on(twin_of):
    model = network()
    teacher = fastkd.EMATeacher(model, DECAY)
    teacher.update(changed(model, 0))
    twin = twin_of(teacher)
    changed(model, 1)
    teacher.update(model)
    assert not same(teacher, twin) and twin.step == 1
    twin.update(model)
    assert same(teacher, twin)
    assert repr(teacher) == repr(twin) and "step=2" in repr(twin)


def test_the_decay_is_an_attribute():
    model = network()
    teacher = fastkd.EMATeacher(model)
    assert teacher.decay == 0.999
    teacher.decay = 0.0
    teacher.update(changed(model, 0))
    assert same(teacher.module, model)


def test_what_compiled_or_parallel_networks_hold_is_averaged():
    model = network()
    compiled, plain = torch.compile(model), fastkd.EMATeacher(model, 0.5)
    teachers = [fastkd.EMATeacher(compiled, 0.5), fastkd.EMATeacher(nn.DataParallel(model), 0.5)]
    assert all(type(x.module) is Network for x in teachers)
    changed(model, 0)
    plain.update(model)
    for teacher, wrapped in zip(teachers, (compiled, nn.DataParallel(compiled)), strict=True):
        teacher.update(wrapped)
        assert same(teacher, plain)
    model.body = torch.compile(model.body)  # a part that is compiled has another name
    plain.update(changed(model, 1))
    teachers[0].update(changed(model, 1))
    assert same(teachers[0], plain)


def test_an_average_may_be_wider_than_the_network():
    model = network().bfloat16()
    teacher = fastkd.EMATeacher(model, 0.999).float()
    start = [x.clone() for x in teacher.module.parameters()]
    changed(model, 0)
    teacher.update(model)
    for average, first, x in zip(
        teacher.module.parameters(), start, model.parameters(), strict=True
    ):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, 0.999 * first + 0.001 * x.float())


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    model = network()
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\], got"):
        fastkd.EMATeacher(model, decay)
    teacher = fastkd.EMATeacher(model, lambda step: decay)
    before = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\], got"):
        teacher.update(changed(model, 0))
    assert same(teacher, before) and teacher.step == 0


def test_errors_say_what_is_needed():
    model = network()
    teacher = fastkd.EMATeacher(model)
    with pytest.raises(TypeError, match=r"decay must be a number .* or a schedule.* got str"):
        teacher.decay = "0.9"
    with pytest.raises(ValueError, match=r'must be "copy" or "average", got .all'):
        fastkd.EMATeacher(model, buffers="all")
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got function"):
        fastkd.EMATeacher(lambda x: x)
    with pytest.raises(
        ValueError, match=r"'extra.bias' in the module alone: make a new EMATeacher"
    ):
        other = network()
        other.extra = nn.Linear(2, 2)
        teacher.update(other)
    with pytest.raises(
        ValueError, match=r"'body.0.weight' needs the shape .* \[4, 3\] .* got \[5, 3\]"
    ):
        teacher.update(Network(5).to(DEVICE))
    with pytest.raises(ValueError, match="'later' in the module alone"):
        model.register_buffer("later", torch.ones(1))
        teacher.update(model)


# ---------------------------------------------------------------------------------------- ranks


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_ranks_have_the_same_teacher_and_shards_of_it(tmp_path):
    multiprocessing.spawn(train_on_a_rank, (2, str(tmp_path)), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for parallel, sharded in of_ranks:
        torch.testing.assert_close(sharded, parallel, rtol=1e-5, atol=1e-6)
    for first, second in zip(*of_ranks, strict=True):
        assert all(map(torch.equal, first[1:], second[1:]))

"""Features and relations of several teachers, by the loops of docs/recipes.md."""

import pytest
import torch
from exactness import assert_same
from inputs import DEVICE, normal
from meter import PeakMemory

import fastkd

SHARES = [0.7, 0.1, 0.2]


class Network(torch.nn.Module):
    """A layer that makes features, which counts how often a backward goes through it."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(5, width, dtype=torch.float64, device=DEVICE)
        self.n_backwards = 0

    def forward(self, x):
        features = self.layer(x)
        features.register_hook(self._count)
        return features

    def _count(self, gradient):
        self.n_backwards += 1


def losses():
    """Return a loss for each teacher, of features that a projector widens and of relations."""
    hints = [fastkd.HintLoss(4, width).double().to(DEVICE) for width in (6, 4, 7)]
    return {"hint": hints, "rkd": [fastkd.rkd] * 3}


@pytest.mark.parametrize("name", ["hint", "rkd"])
def test_both_loops_make_the_gradient_of_the_sum_once(name, engine):
    x, teachers = normal(9, 5), [normal(9, width, seed=width) for width in (6, 4, 7)]
    of_teachers = [*zip(SHARES, losses()[name], teachers, strict=True)]
    student = Network(4)
    weight = student.layer.weight
    apart = [
        torch.autograd.grad(share * loss(student(x), teacher), weight)[0]
        for share, loss, teacher in of_teachers
    ]
    expected, student.n_backwards = torch.stack(apart).sum(0), 0

    features = student(x)
    sum(share * loss(features, teacher) for share, loss, teacher in of_teachers).backward()
    assert student.n_backwards == 1
    assert_same([weight.grad], [expected])

    weight.grad, student.n_backwards = None, 0
    features = student(x)
    gathered = features.detach().requires_grad_()
    for share, loss, teacher in of_teachers:
        (share * loss(gathered, teacher)).backward()
    assert student.n_backwards == 0
    features.backward(gathered.grad)
    assert student.n_backwards == 1
    assert_same([weight.grad], [expected])


def test_the_loop_takes_as_much_memory_for_many_teachers_as_for_two():
    student = normal(400, 1000).requires_grad_()

    def peak(n_teachers, by_loop):
        teachers = [normal(400, 1000, seed=1 + i) for i in range(n_teachers)]
        with PeakMemory() as memory:
            if by_loop:
                gathered = student.detach().requires_grad_()
                for teacher in teachers:
                    fastkd.hint(gathered, teacher).backward()
            else:
                sum(fastkd.hint(student, teacher) for teacher in teachers).backward()
        return memory.peak_bytes / (student.numel() * student.element_size())

    assert peak(5, by_loop=True) == peak(2, by_loop=True)
    assert peak(5, by_loop=True) <= peak(5, by_loop=False)


def test_a_hint_from_the_mean_of_teachers_has_the_gradient_of_the_sum(engine):
    student, teachers = normal(9, 4).requires_grad_(), normal(3, 9, 4, seed=1)
    each = sum(
        share * fastkd.hint(student, teacher)
        for share, teacher in zip(SHARES, teachers, strict=True)
    )
    mean = sum(share * teacher for share, teacher in zip(SHARES, teachers, strict=True))
    of_mean = fastkd.hint(student, mean)
    assert_same(*(torch.autograd.grad(loss, student) for loss in (of_mean, each)))
    assert each > of_mean

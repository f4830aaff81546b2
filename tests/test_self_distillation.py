"""DINO: the loss over crops, and a module whose centre follows the teacher."""

import copy
import math

import pytest
import textbook
import torch
import torch._dynamo.testing
from cases import named
from choice import full
from exactness import assert_same, by_formula, results
from inputs import DEVICE, normal
from meter import PeakMemory

import fastkd

(DINO,) = named("dino")
SIZE = 0.3  # the temperatures of the paper are for outputs of this size


def crops(n_student, n_teacher, n_images, n_outputs, dtype=torch.float64, seed=0):
    student = SIZE * normal(n_student, n_images, n_outputs, seed=seed)
    teacher = SIZE * normal(n_teacher, n_images, n_outputs, seed=seed + 1)
    center = SIZE * normal(n_outputs, seed=seed + 2)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype), center]


def by_hand(student, teacher, center, t_s=0.1, t_t=0.04, skip_same_view=True):
    """Return the loss and the gradient of every crop of the student, in Python floats."""
    pairs = [
        (i, j)
        for i in range(len(teacher))
        for j in range(len(student))
        if not (skip_same_view and i == j)
    ]
    n_images, n_outputs = student.shape[1:]
    share, losses = 1 / (len(pairs) * n_images), []
    gradient = torch.zeros(student.shape, dtype=torch.float64)
    for i, j in pairs:
        for b in range(n_images):
            centred = (teacher[i, b].double() - center.double()).tolist()
            log_p = textbook.log_softmax(centred, t_t)
            log_q = textbook.log_softmax(student[j, b].tolist(), t_s)
            for k in range(n_outputs):
                p, q = math.exp(log_p[k]), math.exp(log_q[k])
                losses.append(-p * log_q[k])
                gradient[j, b, k] += share * (q - p) / t_s
    loss = torch.tensor(share * math.fsum(losses), dtype=torch.float64)
    return [loss.to(DEVICE), gradient.to(DEVICE)]


@pytest.mark.parametrize("skip_same_view", [True, False])
@pytest.mark.parametrize(
    "n_student, n_teacher",
    # as in the paper; global crops alone; one of either; more of the teacher's
    [
        pytest.param(10, 2, marks=full),
        (2, 2),
        (4, 1),
        (1, 2),
        pytest.param(3, 3, marks=full),
        (2, 4),
    ],
)
def test_the_loss_and_its_gradient(n_student, n_teacher, skip_same_view, engine):
    inputs = crops(n_student, n_teacher, 3, 17)
    student, teacher, center = inputs
    options = dict(student_temperature=0.2, teacher_temperature=0.07, skip_same_view=skip_same_view)
    expected = by_hand(*inputs, 0.2, 0.07, skip_same_view)
    loss = fastkd.dino(*inputs, **options)
    assert_same([loss, *torch.autograd.grad(3 * loss, student)], [expected[0], 3 * expected[1]])
    trained = [crop.requires_grad_() for crop in student.detach()]  # each with its gradient
    loss = fastkd.dino(trained, [*teacher], center, **options)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, trained, strict=True)]
    assert_same([loss, torch.stack(found)], expected)


def test_the_centre_is_a_constant_and_may_be_missing(engine):
    student, teacher, center = crops(3, 2, 4, 7)
    expected = [DINO.truth(student, teacher, 0 * center)]
    assert_same([fastkd.dino(student, teacher)], expected)
    fastkd._checks._warn_once.cache_clear()
    center.requires_grad_()
    with pytest.warns(UserWarning, match="center requires grad"):
        fastkd.dino(student, teacher, center).backward()
    assert center.grad is None


@pytest.mark.parametrize("n_student, n_teacher", [(4, 2), (3, 1)])
def test_no_images(n_student, n_teacher, engine):
    found = results(fastkd.dino, crops(n_student, n_teacher, 0, 5))
    assert_same(found, [torch.tensor(0.0), torch.zeros(n_student, 0, 5)])


def test_outputs_that_are_masked_in_both(engine):
    student, teacher, center = crops(4, 2, 3, 9)
    masked, kept = torch.tensor([2, 5], device=DEVICE), [i for i in range(9) if i not in (2, 5)]
    both = [x.detach().index_fill(-1, masked, -torch.inf) for x in (student, teacher)]
    found = results(fastkd.dino, [both[0].requires_grad_(), both[1], center])
    without = [x.detach()[..., kept] for x in (student, teacher, center)]
    expected = results(fastkd.dino, [without[0].requires_grad_(), *without[1:]])
    assert_same([found[0], found[1][..., kept]], expected)
    assert not found[1][..., [2, 5]].any()


def test_temperatures_in_tensors(engine):
    inputs = crops(4, 2, 3, 9)
    numbers = dict(student_temperature=0.15, teacher_temperature=0.05)
    tensors = {
        name: torch.tensor(x, dtype=torch.float64, device=DEVICE) for name, x in numbers.items()
    }
    found = results(lambda *x: fastkd.dino(*x, **tensors), inputs)
    assert_same(found, results(lambda *x: fastkd.dino(*x, **numbers), inputs))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what a CPU allocates")
def test_no_softmax_of_the_student_is_kept():
    """Beyond its gradient and that of its parts there are tensors of the teacher's size alone."""
    inputs = crops(10, 2, 64, 4096, torch.float32)
    inputs[2] = inputs[2].float()

    def peak():
        fastkd.dino(*inputs).backward()
        inputs[0].grad = None
        with PeakMemory() as memory:
            fastkd.dino(*inputs).backward()
        return memory.peak_bytes

    assert peak() <= 2 * inputs[0].nbytes + 3 * inputs[1].nbytes
    with fastkd.backend("formula"):  # so that the number above means something
        assert peak() >= 4.5 * inputs[0].nbytes


# --------------------------------------------------------------------------------------- module


@pytest.mark.parametrize("as_lists", [False, True])
def test_the_centre_follows_the_teacher(as_lists, engine):
    """A step has the centre of the steps before."""
    loss, center = fastkd.DINOLoss(7, center_momentum=0.8).to(DEVICE).double(), torch.zeros(7)
    center = center.to(DEVICE).double()
    for step in range(3):
        student, teacher, _ = crops(4, 2, 5, 7, seed=10 * step)
        given = ([*student], [*teacher]) if as_lists else (student, teacher)
        assert_same([loss(*given)], by_hand(student, teacher, center)[:1])
        center = 0.8 * center + 0.2 * sum(teacher.flatten(0, 1)) / 10
        assert_same([loss.center], [center])
        assert not loss.center.requires_grad
    loss.eval()
    loss(student, teacher)
    loss.train()(student[:, :0], teacher[:, :0])  # no images: no mean
    assert_same([loss.center], [center])


def test_the_centre_is_saved_with_the_state():
    loss = fastkd.DINOLoss(7).to(DEVICE)
    student, teacher, _ = crops(4, 2, 5, 7, torch.bfloat16)
    loss(student, teacher)
    assert loss.center.dtype == torch.float32 and loss.center.any()
    twin = fastkd.DINOLoss(7).to(DEVICE)
    twin.load_state_dict(loss.state_dict())
    assert torch.equal(twin.center, loss.center)
    assert torch.equal(twin.eval()(student, teacher), copy.deepcopy(loss).eval()(student, teacher))
    assert [*loss.state_dict()] == ["center"] and not [*loss.parameters()]
    assert "n_prototypes=7, center_momentum=0.9, student_temperature=0.1" in repr(loss)


def test_the_temperature_of_a_schedule():
    loss, (student, teacher, _) = fastkd.DINOLoss(7).to(DEVICE), crops(4, 2, 5, 7)
    for temperature in (0.04, 0.055, 0.07):
        loss.teacher_temperature = temperature
        expected = by_hand(student, teacher, loss.center, t_t=temperature)
        assert_same([loss(student, teacher)], expected[:1])


@pytest.mark.parametrize("number, graphs", [(float, 2), pytest.param(torch.tensor, 1, marks=full)])
def test_one_graph_moves_the_centre_too(number, graphs):
    """The second number of a schedule makes it vary."""
    torch._dynamo.reset()
    counting = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager, loss = fastkd.DINOLoss(9).to(DEVICE), fastkd.DINOLoss(9).to(DEVICE)
    compiled = torch.compile(loss, backend=counting, fullgraph=True)
    for step in range(4):
        inputs = crops(4, 2, 3, 9, torch.float32, seed=step)[:2]
        for module in (eager, loss):
            module.teacher_temperature = number(0.04 + 0.01 * step)
        assert_same(results(compiled, inputs), results(eager, inputs), 1e-5)
        assert_same([loss.center], [eager.center], 1e-6)
    assert counting.frame_count == graphs


@full
def test_many_outputs(engine):
    inputs = DINO.inputs((3,), 9001)
    assert_same(results(DINO, inputs), by_formula(DINO, inputs))

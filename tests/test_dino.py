"""DINO: the loss over crops by every engine, and a module whose centre follows the teacher."""

import copy
import math

import pytest
import textbook
import torch
import torch._dynamo.testing
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from losses import DEVICE, normal
from meter import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd

smoke = pytest.mark.smoke
# the temperatures of the paper are for outputs of this size
SIZE = 0.3


def crops(n_student, n_teacher, n_images, n_outputs, dtype=torch.float64, seed=0):
    student = SIZE * normal(n_student, n_images, n_outputs, seed=seed)
    teacher = SIZE * normal(n_teacher, n_images, n_outputs, seed=seed + 1)
    center = SIZE * normal(n_outputs, seed=seed + 2)
    return [student.to(dtype).requires_grad_(), teacher.to(dtype), center]


def by_hand(student, teacher, center, t_s=0.1, t_t=0.04, skip_same_view=True):
    """Row by row in Python floats: the loss and the gradient of every crop of the student."""
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
            moved = (teacher[i, b].double() - center.double()).tolist()
            log_p = textbook.log_softmax(moved, t_t)
            log_q = textbook.log_softmax(student[j, b].tolist(), t_s)
            for k in range(n_outputs):
                p, q = math.exp(log_p[k]), math.exp(log_q[k])
                losses.append(-p * log_q[k])
                gradient[j, b, k] += share * (q - p) / t_s
    loss = torch.tensor(share * math.fsum(losses), dtype=torch.float64)
    return [loss.to(DEVICE), gradient.to(DEVICE)]


def published(student, teacher, center, t_s=0.1, t_t=0.04):
    """As people write it: a softmax of each pair."""
    targets = ((teacher - center) / t_t).softmax(-1).detach()
    terms = [
        (-p * (z / t_s).log_softmax(-1)).sum(-1).mean()
        for i, p in enumerate(targets)
        for j, z in enumerate(student)
        if i != j
    ]
    return torch.stack(terms).mean()


# --------------------------------------------------------------------------------------- numbers


@smoke
@pytest.mark.parametrize("skip_same_view", [True, False])
@pytest.mark.parametrize(
    "n_student, n_teacher",
    # as in the paper; global crops alone; one of either; more of the teacher's
    [(10, 2), (2, 2), (4, 1), (1, 2), (3, 3), (2, 4)],
)
def test_the_loss_and_its_gradient(n_student, n_teacher, skip_same_view, engine):
    inputs = crops(n_student, n_teacher, 3, 17)
    student, teacher, center = inputs
    options = dict(student_temperature=0.2, teacher_temperature=0.07, skip_same_view=skip_same_view)
    expected = by_hand(*inputs, 0.2, 0.07, skip_same_view)
    loss = fastkd.dino(*inputs, **options)
    assert_same([loss, *torch.autograd.grad(3 * loss, student)], [expected[0], 3 * expected[1]])
    lists = [[*student.detach()], [*teacher]]  # of tensors with a gradient each
    trained = [crop.requires_grad_() for crop in lists[0]]
    loss = fastkd.dino(*lists, center, **options)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, trained, strict=True)]
    assert_same([loss, torch.stack(found)], expected)


@smoke
def test_the_defaults_are_those_of_the_paper(engine):
    inputs = crops(5, 2, 4, 33)
    assert_same(results(fastkd.dino, inputs), results(published, inputs))
    student, teacher, center = inputs
    assert_same([fastkd.dino(student, teacher)], [published(student, teacher, 0 * center)])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n_images, n_outputs", [(7, 65), (3, 9001)])
def test_every_dtype(n_images, n_outputs, dtype, engine):
    inputs = crops(4, 2, n_images, n_outputs, dtype)
    inputs[2] = inputs[2].to(torch.promote_types(dtype, torch.float32))
    truth = results(fastkd.dino.formula, exact(inputs))
    yardstick = results(published, in_dtype(inputs[2].dtype, inputs))
    yardstick[1] = yardstick[1].to(dtype)
    found = results(fastkd.dino, inputs)
    assert_as_exact(found, yardstick, truth)
    assert [x.dtype for x in found] == [inputs[2].dtype, dtype]


@smoke
def test_the_teacher_and_the_centre_are_constants(engine):
    student, teacher, center = crops(3, 2, 4, 7)
    expected = torch.autograd.grad(fastkd.dino(student, teacher, center), student)
    fastkd._checks._warn_once.cache_clear()
    teacher.requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires grad"):
        fastkd.dino(student, [*teacher], center).backward()
    assert_same([student.grad], expected)
    assert teacher.grad is None
    center.requires_grad_()
    with pytest.warns(UserWarning, match="center requires grad"):
        fastkd.dino(student, teacher.detach(), center).backward()
    assert center.grad is None


@smoke
@pytest.mark.parametrize("n_student, n_teacher", [(4, 2), (3, 1)])
def test_no_images(n_student, n_teacher, engine):
    found = results(fastkd.dino, crops(n_student, n_teacher, 0, 5))
    assert_same(found, [torch.tensor(0.0), torch.zeros(n_student, 0, 5)])


def test_outputs_that_are_masked_in_both(engine):
    student, teacher, center = crops(4, 2, 3, 9)
    masked = [x.detach().index_fill(-1, torch.tensor([2, 5], device=DEVICE), -torch.inf)
              for x in (student, teacher)]  # fmt: skip
    kept = [i for i in range(9) if i not in (2, 5)]
    found = results(fastkd.dino, [masked[0].requires_grad_(), masked[1], center])
    expected = results(fastkd.dino, [x.detach()[..., kept].requires_grad_(x.requires_grad)
                                     for x in (student, teacher, center)])  # fmt: skip
    assert_same([found[0], found[1][..., kept]], expected)
    assert not found[1][..., [2, 5]].any()


def test_a_nan_is_not_hidden(engine):
    for place in range(3):
        inputs = crops(4, 2, 3, 9)
        inputs[place].detach()[..., -1] = torch.nan
        assert fastkd.dino(*inputs).isnan()


def test_temperatures_in_tensors(engine):
    inputs = crops(4, 2, 3, 9)
    numbers = dict(student_temperature=0.15, teacher_temperature=0.05)
    tensors = {
        name: torch.tensor(x, dtype=torch.float64, device=DEVICE) for name, x in numbers.items()
    }
    found = results(lambda *x: fastkd.dino(*x, **tensors), inputs)
    assert_same(found, results(lambda *x: fastkd.dino(*x, **numbers), inputs))


# ---------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype, engine):
    inputs = crops(4, 2, 3, 9, torch.float32)
    expected = results(fastkd.dino, inputs)
    with torch.autocast(DEVICE.type, dtype):
        found = results(fastkd.dino, inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("tensors", ["fake", "meta"])
def test_no_step_waits_for_a_gpu(tensors, engine):
    """Looking at a value that is not there raises."""
    if engine == "triton":
        pytest.skip("there is nothing to interpret")
    with FakeTensorMode() if tensors == "fake" else torch.device("meta"):
        student = torch.empty(4, 3, 9, requires_grad=True)
        loss = fastkd.DINOLoss(9)
        loss(student, torch.empty(2, 3, 9)).backward()
    assert student.grad.shape == (4, 3, 9)


@pytest.mark.parametrize("number, graphs", [(float, 2), (torch.tensor, 1)])
def test_torch_compile(number, graphs, engine):
    """One graph moves the centre too; of a schedule's numbers the second makes it vary."""
    torch._dynamo.reset()
    counting = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager, loss = fastkd.DINOLoss(9).to(DEVICE), fastkd.DINOLoss(9).to(DEVICE)
    compiled = torch.compile(loss, backend=counting, fullgraph=True)
    for step in range(4):
        inputs = crops(4, 2, 3, 9, torch.float32, seed=step)[:2]
        for module in (eager, loss):
            module.options["teacher_temperature"] = number(0.04 + 0.01 * step)
        assert_same(results(compiled, inputs), results(eager, inputs), 1e-5)
        assert_same([loss.center], [eager.center], 1e-6)
    assert counting.frame_count == graphs


def test_double_backward_says_how(engine):
    student, teacher, center = crops(3, 2, 2, 5)
    if engine == "formula":
        assert torch.autograd.gradgradcheck(lambda x: fastkd.dino(x, teacher, center), student)
        return
    loss = fastkd.dino(student, teacher, center)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r'Double backward .* fastkd.backend\("formula"\)'):
        gradient.square().sum().backward()


def peak_of_a_step(inputs):
    fastkd.dino(*inputs).backward()
    inputs[0].grad = None
    with PeakMemory() as memory:
        fastkd.dino(*inputs).backward()
    return memory.peak_bytes


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what a CPU allocates")
def test_no_softmax_of_the_student_is_kept():
    """Beyond its gradient and that of its parts there are tensors of the teacher's size alone."""
    inputs = crops(10, 2, 64, 4096, torch.float32)
    inputs[2] = inputs[2].float()
    own, of_teacher = inputs[0].nbytes, inputs[1].nbytes
    assert peak_of_a_step(inputs) <= 2 * own + 3 * of_teacher
    with fastkd.backend("formula"):  # so that the number above means something
        assert peak_of_a_step(inputs) >= 4.5 * own


# --------------------------------------------------------------------------------------- module


@smoke
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


@smoke
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
        loss.options["teacher_temperature"] = temperature
        expected = by_hand(student, teacher, loss.center, t_t=temperature)
        assert_same([loss(student, teacher)], expected[:1])


# --------------------------------------------------------------------------------------- errors

S, T = torch.ones(4, 3, 5), torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: fastkd.dino(S.flatten(0, 1), T), ValueError, r"student needs .*\[12, 5\].*unfl"),
        (lambda: fastkd.dino(S, [T]), ValueError, r"teacher needs crops.* \[2, 3, 5\]"),
        (lambda: fastkd.dino(S, 3.0), TypeError, "teacher needs crops.* got float"),
        (lambda: fastkd.dino(S, [T[0], 1]), TypeError, "teacher needs crops.* got list"),
        (lambda: fastkd.dino([], T), ValueError, "student needs crops.* got no crop"),
        (lambda: fastkd.dino(S, T[:0]), ValueError, "teacher needs crops.* got no crop"),
        (lambda: fastkd.dino(S[..., :0], T), ValueError, r"K ≥ 1, got \[4, 3, 0\]"),
        (lambda: fastkd.dino(S.long(), T), TypeError, "student .*floating-point.*int64"),
        (lambda: fastkd.dino(S, T[:, :2]), ValueError, r"same B .*\[4, 3, 5\].*\[2, 2, 5\]"),
        (lambda: fastkd.dino([*S, S[0, :, :2]], T), ValueError, r"same B .*\[3, 2\] in student"),
        (lambda: fastkd.dino(S, T.to("meta")), ValueError, "student is on cpu, teacher on meta"),
        (lambda: fastkd.dino(S[:1], T[:1]), ValueError, "teacher's 1 and the student's 1 crops"),
        (lambda: fastkd.dino(S, T, T[:1, 0]), ValueError, r"center .* K = 5 .* \[1, 5\]"),
        (
            lambda: fastkd.dino(S, T, torch.ones(5).int()),
            ValueError,
            "center needs .* of torch.int32",
        ),
        (lambda: fastkd.dino(S, T, 0.0), TypeError, r"center must .* \[K\], got float"),
        (lambda: fastkd.dino(S, T, T[0, 0].to("meta")), ValueError, "center on meta"),
        (lambda: fastkd.dino(S, T, student_temperature=0), ValueError, "student_temp.* got 0"),
        (lambda: fastkd.dino(S, T, teacher_temperature=-1), ValueError, "teacher_temp.* got -1"),
        (lambda: fastkd.dino(S, T, temperature=1), TypeError, "dino has no option 'temperature'"),
        (lambda: fastkd.dino(S, T, group=3), RuntimeError, "init_process_group"),
        (lambda: fastkd.DINOLoss(6)(S, T), ValueError, r"K = 5 outputs, got \[6\]"),
        (lambda: fastkd.DINOLoss(0), ValueError, "n_prototypes .* got 0"),
        (lambda: fastkd.DINOLoss(5, center_momentum=2), ValueError, "center_momentum .* got 2"),
        (lambda: fastkd.DINOLoss(5, teacher_temperature=0), ValueError, "teacher_temp.* got 0"),
        (lambda: fastkd.DINOLoss(5, T=1), TypeError, "DINOLoss has no option 'T'"),
        (lambda: fastkd.DINOLoss(), TypeError, "n_prototypes"),
    ],
)
def test_wrong_inputs(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()

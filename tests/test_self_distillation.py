"""Losses of a network and its average: crops, masked patches, centres, and spread embeddings."""

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
from fastkd.problems import _patches

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


# ----------------------------------------------------------------------------------- Sinkhorn's


def swav(outputs, temperature, n_iterations):
    """Return the targets that the published code makes of outputs [B, K]."""
    Q = torch.exp(outputs / temperature).mT
    n_prototypes, n_outputs = Q.shape
    Q = Q / Q.sum()
    for _ in range(n_iterations):
        Q = Q / Q.sum(1, keepdim=True) / n_prototypes
        Q = Q / Q.sum(0, keepdim=True) / n_outputs
    return (Q * n_outputs).mT


@pytest.mark.parametrize("n_iterations", [1, 3, 300])
def test_the_centre_of_sinkhorn_gives_the_published_targets(n_iterations):
    outputs = SIZE * normal(2, 5, 7)
    options = dict(teacher_temperature=0.07, n_iterations=n_iterations)
    center = fastkd.sinkhorn_center(outputs, **options)
    found = ((outputs - center) / 0.07).softmax(-1).flatten(0, 1)
    assert_same([found], [swav(outputs.flatten(0, 1), 0.07, n_iterations)], 1e-10)
    if n_iterations == 300:  # prototypes are used alike
        torch.testing.assert_close(found.sum(0), torch.full_like(center, 10 / 7))
    kept = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]], device=DEVICE)
    masked = outputs.masked_fill(kept[..., None] == 0, torch.nan)
    expected = fastkd.sinkhorn_center(outputs[kept.bool()], **options)
    for mask in (kept, kept.bool()):
        assert_same([fastkd.sinkhorn_center(masked, mask, **options)], [expected])


def test_sinkhorn_never_overflows():
    """exp(t / T) would be infinite, and 0 for a prototype that is masked."""
    outputs = 300 * normal(9, 6, dtype=torch.float32)
    outputs[:, 2] = -torch.inf
    center = fastkd.sinkhorn_center(outputs.bfloat16())
    assert center.dtype == torch.float32 and center.isfinite().all()
    found = ((outputs.bfloat16() - center) / 0.04).softmax(-1)
    assert_same([found.sum(-1)], [torch.ones(9, device=DEVICE)], 1e-6)
    assert not found[:, 2].any()
    assert not fastkd.sinkhorn_center(outputs[:0]).any()
    one = fastkd.sinkhorn_center(outputs.double()[:1, :2], n_iterations=1)
    assert_same([one], [outputs.double()[0, :2]])


def test_a_module_with_the_centre_of_its_own_batch():
    loss = fastkd.DINOLoss(7, centering="sinkhorn", sinkhorn_iterations=2, teacher_temperature=0.07)
    loss.to(DEVICE).double()
    student, teacher, _ = crops(4, 2, 5, 7)
    center = fastkd.sinkhorn_center(teacher, teacher_temperature=0.07, n_iterations=2)
    for given in ((student, teacher), ([*student], [*teacher])):
        assert_same([loss(*given)], by_hand(student, teacher, center, t_t=0.07)[:1])
    assert_same([loss.center], [center])
    loss.eval()(student, teacher.square())
    assert_same([loss.center], [center])
    assert "centering='sinkhorn', sinkhorn_iterations=2" in repr(loss)
    with pytest.raises(TypeError, match="teacher needs crops"):
        loss(student, 1.0)
    loss.centering = "mean"
    assert_same([loss(student, teacher)], by_hand(student, teacher, center, t_t=0.07)[:1])


# ------------------------------------------------------------------------------- masked patches


def test_masked_patches_that_were_gathered_have_the_same_loss(engine):
    """A head that is applied to the masked patches alone gives rows, with a weight for each."""
    student, teacher, mask, center = (x.detach() for x in named("ibot")[0].inputs((6,), 9))
    student.requires_grad_()
    whole = fastkd.ibot(student, teacher, mask, center, student_temperature=0.2)
    rows = student[mask]
    weights = (1 / mask.double().sum(-1).clamp(min=1))[:, None].expand(mask.shape)[mask]
    gathered = fastkd.soft_cross_entropy(
        rows,
        teacher[mask] - center,
        student_temperature=0.2,
        teacher_temperature=0.04,
        scale_t2=False,
        weights=weights,
        normalizer=len(mask),
    )
    assert_same(
        [whole, *torch.autograd.grad(whole, student)],
        [gathered, *torch.autograd.grad(gathered, student)],
    )


def test_what_is_not_masked_reaches_nothing(engine):
    student, teacher, mask, center = (x.detach() for x in named("ibot")[0].inputs((6,), 9))
    expected = results(fastkd.ibot, [student.requires_grad_(), teacher, mask, center])
    student = student.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    teacher = teacher.masked_fill(~mask[..., None], torch.inf)
    found = results(fastkd.ibot, [student, teacher, mask.long(), center])
    assert_same(found, expected)
    assert not found[1][~mask].any() and not mask.any(-1).all()
    images = mask.any(-1)  # which leaves out those without a masked patch
    only = fastkd.ibot(student, teacher, mask, center, weights=images)
    assert_same([only], [expected[0] * len(images) / images.sum()])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what a CPU allocates")
def test_nothing_is_computed_of_patches_that_are_not_masked():
    student = normal(64, 64, 1024, dtype=torch.float32).requires_grad_()
    teacher, mask = student.detach().sin(), torch.zeros(64, 64, dtype=torch.bool)
    mask[:, ::32] = True

    def peak():
        with PeakMemory() as memory:
            fastkd.ibot(student, teacher, mask)
        return memory.peak_bytes

    assert peak() <= student.nbytes / 2
    with fastkd.backend("formula"):  # so that the number above means something
        assert peak() >= 2 * student.nbytes


def test_the_centre_follows_the_masked_patches(engine):
    loss, center = fastkd.IBOTLoss(9, center_momentum=0.8).to(DEVICE).double(), 0
    for step in range(3):
        student, teacher, mask, _ = named("ibot")[0].inputs((6,), 9, seed=10 * step)
        given = torch.zeros(9, device=DEVICE) + center
        assert_same([loss(student, teacher, mask)], [fastkd.ibot(student, teacher, mask, given)])
        center = 0.8 * center + 0.2 * teacher[mask].mean(0)
        assert_same([loss.center], [center])
    loss(student, teacher, torch.zeros_like(mask))  # no patches: no mean
    assert_same([loss.center], [center])
    loss.centering = "sinkhorn"
    own = fastkd.sinkhorn_center(teacher[mask])
    assert_same([loss(student, teacher, mask)], [fastkd.ibot(student, teacher, mask, own)])
    assert_same([loss.center], [own])


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(student_patches=torch.zeros(3)), r"student_patches needs the shape \[B, L, K\]"),
        (dict(teacher_patches=torch.zeros(2, 5, 4)), r"got \[2, 5, 7\] and \[2, 5, 4\]"),
        (dict(mask=torch.zeros(2, 5)), r"mask must be of bool, or of the integers"),
        (dict(mask=torch.zeros(2, 4).bool()), r"mask needs a bool .* \[2, 5\], got \[2, 4\]"),
        (dict(center=torch.zeros(5)), r"center needs one .* K = 7 outputs, got \[5\]"),
        (dict(teacher_temperature=0), r"teacher_temperature must be a finite number above 0"),
    ],
)
def test_patches_that_do_not_fit_are_refused(wrong, words):
    fitting = dict(
        student_patches=torch.zeros(2, 5, 7),
        teacher_patches=torch.zeros(2, 5, 7),
        mask=torch.ones(2, 5).bool(),
    )
    with pytest.raises((TypeError, ValueError), match=words):
        fastkd.ibot(**(fitting | wrong))


def test_centres_that_cannot_be_made_are_refused():
    outputs = torch.zeros(2, 5, 7)
    with pytest.raises(ValueError, match=r"teacher needs the shape \(..., K\)"):
        fastkd.sinkhorn_center(outputs[0, 0])
    with pytest.raises(ValueError, match="n_iterations must be a whole number of at least 1"):
        fastkd.sinkhorn_center(outputs, n_iterations=0)
    with pytest.raises(ValueError, match=r"mask needs a bool .* \[2, 5\], got \[5\]"):
        fastkd.sinkhorn_center(outputs, torch.ones(5).bool())
    for module in (fastkd.DINOLoss, fastkd.IBOTLoss):
        with pytest.raises(ValueError, match='centering must be "mean" or "sinkhorn", got'):
            module(7, centering="softmax")
        with pytest.raises(ValueError, match="sinkhorn_iterations must be a whole number"):
            module(7).sinkhorn_iterations = 0.5
    with pytest.raises(RuntimeError, match=r"group needs torch.distributed: call"):
        fastkd.IBOTLoss(7, group=3)


# ------------------------------------------------------------------------------- spread embeddings


def test_neighbours_are_found_by_chunks(monkeypatch):
    rows = normal(53, 4).requires_grad_()
    expected = results(fastkd.koleo, [rows])
    with PeakMemory() as memory:
        monkeypatch.setattr(_patches, "_AT_ONCE", 2 * 53)
        found = results(fastkd.koleo, [rows])
    assert all(map(torch.equal, found, expected))
    if DEVICE.type == "cpu":
        assert memory.peak_bytes < 53 * 53 * 8


def test_embeddings_without_a_direction_to_go_have_no_gradient():
    rows = normal(6, 4)
    rows[1], rows[2] = 2 * rows[0], 0
    rows.requires_grad_()
    loss, gradient = results(fastkd.koleo, [rows])
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[2].any()
    assert gradient.abs().max() < 10
    equal = rows.detach()[:1].expand(5, 4).clone().requires_grad_()
    loss, gradient = results(fastkd.koleo, [equal])
    assert_same([loss], [torch.tensor(8 * math.log(10), dtype=torch.float64, device=DEVICE)])
    assert not gradient.any()


def test_spreading_spreads():
    def unevenness():
        return torch.nn.functional.normalize(rows.detach()).mean(0).norm()

    rows = (1 + 0.1 * normal(16, 3)).requires_grad_()
    before, uneven = fastkd.koleo(rows), unevenness()
    optimizer = torch.optim.SGD([rows], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        fastkd.koleo(rows).backward()
        optimizer.step()
    assert fastkd.koleo(rows) < before - 1
    assert unevenness() < uneven - 0.2

"""Particulars of relations: penalties, weights of parts, duplicates, and accuracy."""

import pytest
import torch
import torch.nn.functional as F
from cases import of
from choice import full, quick_if
from exactness import assert_same, exact, results
from inputs import DEVICE, normal

import fastkd

RKD, *_ = of("relations")
each_relation = pytest.mark.parametrize("case", of("relations"), ids=str)


def with_options(case, **options):
    return lambda *inputs: case(*inputs, **options)


@each_relation
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 3.0])
def test_every_penalty(case, beta, engine):
    inputs = case.inputs((11,), 3)
    expected = results(lambda *x: case.truth(*x, smooth_l1_beta=beta), inputs)
    assert_same(results(with_options(case, smooth_l1_beta=beta), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_numbers_may_be_tensors_of_any_dtype(beta, dtype, engine):
    """They are numbers: the loss is not computed in their precision."""
    inputs = RKD.inputs((11,), 3)
    options = dict(smooth_l1_beta=beta, distance_weight=2.0, angle_weight=4.0)
    tensors = {name: torch.tensor(x, dtype=dtype, device=DEVICE) for name, x in options.items()}
    found = results(with_options(RKD, **tensors), inputs)
    assert_same(found, results(with_options(RKD, **options), inputs), tolerance=1e-7)


@each_relation
def test_normalized_embeddings(case, engine):
    inputs = case.inputs((9,), 5)
    expected = results(lambda s, t: case.truth(F.normalize(s), F.normalize(t)), inputs)
    assert_same(results(with_options(case, normalize=True), inputs), expected)
    halves = case.inputs((9,), 5, torch.bfloat16)  # not rounded in between
    expected = case(*exact(halves), normalize=True)
    assert_same([case(*halves, normalize=True)], [expected], tolerance=2e-6)
    inputs[0].detach()[[2, 4]] = 0  # no direction, and no gradient from one
    loss, gradient = results(with_options(case, normalize=True), inputs)
    assert loss.isfinite() and not gradient[[2, 4]].any()
    assert gradient[0].any() and gradient.abs().max() < 100


@each_relation
@pytest.mark.parametrize("size", [1e-3, 1e10])
def test_the_size_of_the_embeddings_does_not_matter(case, size, engine):
    student, teacher = case.inputs((9,), 5, torch.float32)
    scaled = (size * student.detach()).requires_grad_()
    (loss, gradient), expected = results(case, [scaled, teacher]), results(case, [student, teacher])
    assert_same([loss, size * gradient], expected, tolerance=2e-6)


def test_a_weight_of_0_leaves_a_part_out(engine):
    inputs = RKD.inputs((9,), 5)
    distances = results(with_options(RKD, distance_weight=2.0, angle_weight=0.0), inputs)
    assert_same(distances, [2 * x for x in results(fastkd.rkd_distance, inputs)])
    angles = results(with_options(RKD, distance_weight=0.0, angle_weight=3.0), inputs)
    assert_same(angles, [3 * x for x in results(fastkd.rkd_angle, inputs)])


@each_relation
@pytest.mark.parametrize("whose", [(0, 1), (1,), (0,)], ids=["both", "teacher", "student"])
def test_duplicates(case, whose, engine):
    """The published loss; where that is not differentiable, no gradient between the two."""
    inputs = [x.detach() for x in case.inputs((9,), 3)]
    for i in whose:
        inputs[i][7] = inputs[i][2]
    inputs[0].requires_grad_()
    loss, gradient = results(case, inputs)
    expected, published = results(case.truth, inputs)
    assert_same([loss], [expected])
    if whose != (0,):
        assert_same([gradient], [published])
    else:  # the published one is about 1e10 in the two rows
        assert_same([gradient[:2], gradient[3:7]], [published[:2], published[3:7]])
        assert gradient.abs().max() < 100 * published[:2].abs().max()
    collapsed = inputs[0].detach()[:1].repeat(9, 1).requires_grad_()
    loss, gradient = results(case, [collapsed, inputs[1]])
    assert_same([loss], [case.truth(collapsed, inputs[1])])
    assert not gradient.any()


@each_relation
@quick_if(lambda case, engine: engine != "triton" or case.name == "rkd_distance")
def test_half_precision_is_computed_in_float32(case, engine):
    """The loss is that of the rounded embeddings, whatever their offset."""
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = case.inputs((33,), 16, dtype)
        student = (student.detach() + 100).requires_grad_()
        found, truth = results(case, [student, teacher]), results(case, exact([student, teacher]))
        assert_same(found[:1], truth[:1], tolerance=1e-6)
        assert_same(found[1:], truth[1:], tolerance=torch.finfo(dtype).eps)


N = 40  # more than a tile of the kernels


def clusters(offset, spread, n_features=32):
    """Return eight of them on a unit sphere, far from the origin."""
    centres = F.normalize(normal(8, n_features, seed=3))
    points = centres.repeat(N // 8, 1) + spread * normal(N, n_features, seed=4)
    return (points + offset).float()


HOSTILE = {
    "normal": lambda: normal(N, 32, seed=5).float(),
    "on the sphere": lambda: F.normalize(normal(N, 32, seed=5)).float(),
    "one cluster far away": lambda: (100 + 1e-2 * normal(N, 32, seed=5)).float(),
    "eight clusters": lambda: clusters(0, 1e-2),
    "eight clusters far away": lambda: clusters(100, 1e-2),
}
hard = [pytest.param(x, marks=() if "eight" in x else full) for x in HOSTILE]


def next_numbers(x):
    """Return each number of x one step up or down."""
    step = torch.where(normal(*x.shape, seed=8) > 0, torch.inf, -torch.inf).to(x)
    return torch.nextafter(x, step)


@each_relation
@pytest.mark.parametrize("data", hard)
@quick_if(
    lambda case, data, engine: engine != "triton" or (case is RKD and data.endswith("far away"))
)
def test_as_accurate_as_the_embeddings_themselves(case, data, engine):
    """The error of float32 is that of embeddings off by one unit in the last place."""
    student, teacher = HOSTILE[data]().requires_grad_(), normal(N, 9, seed=6).float()
    truth = results(case, exact([student, teacher]))
    nearby = results(case, exact([next_numbers(student.detach()).requires_grad_(), teacher]))
    for x, y, true in zip(results(case, [student, teacher]), nearby, truth, strict=True):
        allowed = 3 * (y - true).norm() + 1e-6 * true.norm()
        assert (x.double() - true).norm() <= allowed
    found = results(with_options(case, precision="high"), [student, teacher])
    assert all(x.dtype == torch.float32 for x in found)
    for x, true in zip(found, truth, strict=True):
        assert (x.double() - true).norm() <= 1e-6 * true.norm()

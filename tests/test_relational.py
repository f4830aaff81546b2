"""The relational family: distances and angles by every engine equal the published ones."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from losses import DEVICE, INTERPRETED, RELATIONAL, each_relation, embeddings, normal

import fastkd
from fastkd import _checks

smoke = pytest.mark.smoke
RKD = RELATIONAL[2]
SHAPES = [(3, 2), (33, 2), (40, 33), (258, 7)]


def assert_exact(case, inputs, times=4, **options):
    """By the error of the definition in the same dtype, from the truth in float64.

    The law of cosines rounds about twice as much as the directions of the definition; the measure
    of float32 is what the embeddings' own last place does, which is tested below.
    """
    with fastkd.backend("formula"):
        truth = results(lambda *x: case(*x, **options), exact(inputs))
        yardstick = results(lambda *x: case(*x, **options), inputs)
    assert_as_exact(results(lambda *x: case(*x, **options), inputs), yardstick, truth, times)


@smoke
@each_relation
def test_losses_are_those_computed_by_hand(case, engine):
    inputs = case.inputs((7,), 3)
    assert_same([case(*inputs), case.eager(*inputs)], 2 * [case.by_hand(*inputs)])


@smoke
@each_relation
@pytest.mark.parametrize("n, n_features", SHAPES, ids=str)
def test_the_published_loss_and_gradient(case, n, n_features, engine):
    if engine == "triton" and INTERPRETED and n > 100:
        pytest.skip("takes long; blocks are the portable engine's")
    inputs = case.inputs((n,), n_features)
    assert_same(results(case, inputs), results(case.eager, inputs))


@each_relation
@pytest.mark.parametrize("n, n_features", [(2, 3), (5, 1)])
def test_relations_that_cannot_change(case, n, n_features, engine):
    """Two examples have one distance, and on a line all cosines are 1 or −1."""
    inputs = case.inputs((n,), n_features)
    found, expected = results(case, inputs), results(case.eager, inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@each_relation
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n, n_features", [(5, 37), (40, 33)], ids=str)
def test_every_dtype(case, n, n_features, dtype, engine):
    inputs = case.inputs((n,), n_features, dtype)
    assert_exact(case, inputs)
    loss, gradient = results(case, inputs)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


@smoke
@each_relation
def test_half_precision_is_computed_in_float32(case, engine):
    """The loss is that of the rounded embeddings, whatever their offset."""
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = case.inputs((33,), 16, dtype)
        student = (student.detach() + 100).requires_grad_()
        found, truth = results(case, [student, teacher]), results(case, exact([student, teacher]))
        assert_same(found[:1], truth[:1], tolerance=1e-6)
        assert_same(found[1:], truth[1:], tolerance=torch.finfo(dtype).eps)


@smoke
@each_relation
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 3.0])
def test_every_penalty(case, beta, engine):
    inputs = case.inputs((11,), 3)
    options = dict(smooth_l1_beta=beta)
    expected = results(lambda *x: case.eager(*x, **options), inputs)
    assert_same(results(lambda *x: case(*x, **options), inputs), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_penalty_given_as_a_tensor(beta, engine):
    inputs = RKD.inputs((11,), 3)
    options = dict(
        smooth_l1_beta=torch.tensor(beta, device=DEVICE),
        distance_weight=torch.tensor(2.0, device=DEVICE),
    )
    plain = {name: value.item() for name, value in options.items()}
    found = results(lambda *x: RKD(*x, **options), inputs)
    assert_same(found, results(lambda *x: RKD(*x, **plain), inputs), tolerance=1e-7)


@smoke
@each_relation
def test_normalized_embeddings(case, engine):
    inputs = case.inputs((9,), 5)
    expected = results(lambda s, t: case.eager(F.normalize(s), F.normalize(t)), inputs)
    assert_same(results(lambda *x: case(*x, normalize=True), inputs), expected)


@each_relation
def test_normalized_embeddings_without_a_length(case, engine):
    """They have no direction, and get no gradient from one."""
    student, teacher = (x.detach() for x in case.inputs((9,), 5))
    student[[2, 4]] = 0
    loss, gradient = results(
        lambda *x: case(*x, normalize=True), [student.requires_grad_(), teacher]
    )
    assert loss.isfinite() and not gradient[[2, 4]].any()
    assert gradient[0].any() and gradient.abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_given_as_half_precision_tensors(dtype, engine):
    """They are numbers: the loss is not computed in their precision."""
    inputs = RKD.inputs((40,), 5)
    options = dict(distance_weight=2.0, angle_weight=4.0, smooth_l1_beta=0.0)
    tensors = {name: torch.tensor(x, dtype=dtype, device=DEVICE) for name, x in options.items()}
    found = results(lambda *x: RKD(*x, **tensors), inputs)
    assert_same(found, results(lambda *x: RKD(*x, **options), inputs), tolerance=1e-6)


@each_relation
@pytest.mark.parametrize("size", [1e-3, 1e10])
def test_the_size_of_the_embeddings_does_not_matter(case, size, engine):
    student, teacher = case.inputs((9,), 5, torch.float32)
    scaled = (size * student.detach()).requires_grad_()
    (loss, gradient), expected = results(case, [scaled, teacher]), results(case, [student, teacher])
    assert_same([loss, size * gradient], expected, tolerance=2e-6)


@each_relation
def test_normalized_half_precision_is_not_rounded_in_between(case, engine):
    inputs = case.inputs((9,), 5, torch.bfloat16)
    found = case(*inputs, normalize=True)
    assert_same([found], [case(*exact(inputs), normalize=True)], tolerance=2e-6)


@each_relation
def test_a_weight_of_0_leaves_a_part_out(case, engine):
    inputs = case.inputs((9,), 5)
    of_distances = fastkd.rkd(*inputs, distance_weight=2.0, angle_weight=0.0)
    assert_same([of_distances], [2 * fastkd.rkd_distance(*inputs)])
    of_angles = fastkd.rkd(*inputs, distance_weight=0.0, angle_weight=3.0)
    assert_same([of_angles], [3 * fastkd.rkd_angle(*inputs)])


@each_relation
def test_gradcheck(case, engine):
    student, teacher = case.inputs((5,), 3)
    assert torch.autograd.gradcheck(lambda x: case(x, teacher), [student])


# ------------------------------------------------------------------------------------- batches


@smoke
@each_relation
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_examples_have_no_relations(case, n, engine):
    student, teacher = case.inputs((n,), 3, torch.bfloat16)
    loss = case(student, teacher)
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert not torch.autograd.grad(loss, student)[0].any()


@each_relation
def test_more_dimensions_are_flattened(case, engine):
    student, teacher = case.inputs((5, 2, 3), 4)
    maps = [student.detach().flatten(1).requires_grad_(), teacher.flatten(1)]
    loss, gradient = results(case, [student, teacher])
    expected, flat = results(case, maps)
    assert_same([loss, gradient.flatten(1)], [expected, flat])


@each_relation
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: F.pad(x, (0, 3), value=torch.nan)[:, :-3],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["transposed", "padded", "every other row", "every other feature"],
)
def test_every_layout(case, lay_out, engine):
    student, teacher = case.inputs((9,), 5)
    strided = [lay_out(student.detach()).requires_grad_(), lay_out(teacher)]
    assert_same(results(case, strided), results(case, [student, teacher]))


DUPLICATES = {"both": (0, 1), "teacher": (1,), "student": (0,)}


@smoke
@each_relation
@pytest.mark.parametrize("whose", DUPLICATES)
def test_duplicates(case, whose, engine):
    """The published loss; where that is not differentiable, no gradient between the two."""
    inputs = [x.detach() for x in case.inputs((9,), 3)]
    for i in DUPLICATES[whose]:
        inputs[i][7] = inputs[i][2]
    inputs[0].requires_grad_()
    loss, gradient = results(case, inputs)
    expected, published = results(case.eager, inputs)
    assert_same([loss], [expected])
    if whose != "student":
        assert_same([gradient], [published])
    else:  # the published one is about 1e10 in the two rows
        assert_same([gradient[:2], gradient[3:7]], [published[:2], published[3:7]])
        assert gradient.abs().max() < 100 * published[:2].abs().max()


@each_relation
def test_nothing_but_duplicates(case, engine):
    """A collapsed student: every relation is 0, and so is the gradient."""
    student, teacher = case.inputs((5,), 3)
    student = student.detach()[:1].repeat(5, 1).requires_grad_()
    loss, gradient = results(case, [student, teacher])
    assert_same([loss], [case.eager(student, teacher).detach()])
    assert not gradient.any()


@each_relation
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_nan_is_not_hidden(case, value, whose, engine):
    inputs = [x.detach() for x in case.inputs((5,), 3)]
    inputs[whose][2, 1] = value
    assert case(*inputs).isnan()


# ----------------------------------------------------------------------------------- accuracy


N = 40  # more than a tile of the kernels


def clusters(offset, spread, n_features=32):
    """Eight of them on a unit sphere, far from the origin."""
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


def next_numbers(x):
    """Each number of x one step up or down."""
    step = torch.where(normal(*x.shape, seed=8) > 0, torch.inf, -torch.inf).to(x)
    return torch.nextafter(x, step)


@each_relation
@pytest.mark.parametrize("data", HOSTILE)
def test_as_accurate_as_the_embeddings_themselves(case, data, engine):
    """The error of float32 is that of embeddings off by one unit in the last place."""
    student, teacher = HOSTILE[data]().requires_grad_(), normal(N, 9, seed=6).float()
    truth = results(case, exact([student, teacher]))
    moved = results(case, exact([next_numbers(student.detach()).requires_grad_(), teacher]))
    for x, y, true in zip(results(case, [student, teacher]), moved, truth, strict=True):
        allowed = 3 * (y - true).norm() + 1e-6 * true.norm()
        assert (x.double() - true).norm() <= allowed


@smoke
@each_relation
@pytest.mark.parametrize("data", HOSTILE)
def test_high_precision(case, data, engine):
    student, teacher = HOSTILE[data]().requires_grad_(), normal(N, 9, seed=6).float()
    truth = results(case, exact([student, teacher]))
    found = results(lambda *x: case(*x, precision="high"), [student, teacher])
    assert all(x.dtype == torch.float32 for x in found)
    for x, true in zip(found, truth, strict=True):
        assert (x.double() - true).norm() <= 1e-6 * true.norm()


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "student, teacher, error, words",
    [
        (torch.ones(3, 2), torch.ones(4, 2), ValueError, r"one N, got \[3, 2\] and \[4, 2\]"),
        (torch.ones(3), torch.ones(3, 2), ValueError, r"student needs the shape \[N, D\]"),
        (torch.ones(3, 2), torch.ones(3), ValueError, r"teacher needs the shape \[N, D\]"),
        (torch.ones(3, 0), torch.ones(3, 2), ValueError, "with D ≥ 1"),
        (torch.ones(3, 2).int(), torch.ones(3, 2), TypeError, "floating-point embeddings"),
        ([1.0], torch.ones(3, 2), TypeError, "student must be a tensor"),
        (torch.ones(3, 2), torch.ones(3, 2, device="meta"), ValueError, "move them together"),
    ],
)
@each_relation
def test_wrong_embeddings(case, student, teacher, error, words):
    with pytest.raises(error, match=words):
        case(student, teacher)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(smooth_l1_beta=-1.0), ValueError, "smooth_l1_beta must be a finite number of at"),
        (dict(angle_weight=float("inf")), ValueError, "angle_weight must be a finite number"),
        (dict(precision="best"), ValueError, '"default" or "high", got \'best\''),
        (dict(reduction="sum"), TypeError, "rkd has no option 'reduction'"),
        (dict(group="world"), RuntimeError, "init_process_group"),
    ],
)
def test_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        fastkd.rkd(torch.ones(3, 2), torch.ones(3, 2), **options)


@each_relation
def test_the_teacher_gets_no_gradient_and_that_is_said(case, engine):
    student, teacher = case.inputs((5,), 3)
    _checks._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"teacher\.detach\(\)"):
        loss = case(student, teacher.requires_grad_())
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_embeddings_of_a_smaller_layer_may_differ_in_width():
    student, teacher = embeddings((5,), 3)
    assert student.shape != teacher.shape
    fastkd.rkd(student, teacher).backward()
    assert student.grad.shape == student.shape


def test_a_dtype_for_each_network(engine):
    student, teacher = in_dtype(torch.bfloat16, RKD.inputs((9,), 5))
    wide = teacher.double()
    assert RKD(student, wide).dtype == torch.float64
    assert_same([RKD(student, teacher)], [RKD(student, wide)], tolerance=1e-6)

"""The modules that own projectors, regressors and variances."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd


def assert_same(found, expected, tolerance=1e-6):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- HintLoss and its projectors


def trained(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def value_and_gradients(loss, student, *parameters):
    return [loss, *torch.autograd.grad(loss, [student, *parameters])]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_linear_projector_is_a_convolution_of_maps_and_a_layer_of_tokens(kind):
    loss = fastkd.HintLoss(4, 6, kind=kind).double()
    weight, bias = loss.projector.weight, loss.projector.bias
    for shape, dim, options in (
        ((2, 4, 3, 5), 1, {}),
        ((2, 4, 3, 5, 2), 1, {}),
        ((2, 3, 4), 2, {}),
        ((2, 4, 3), 1, dict(feature_dim=1)),
        ((2, 3, 4, 5), 2, dict(feature_dim=2)),
        ((7, 4), 1, {}),
    ):
        loss.feature_dim = options.get("feature_dim")
        student = trained(*shape)
        teacher = trained(*(6 if i == dim else n for i, n in enumerate(shape)), seed=1).detach()
        projected = F.linear(student.movedim(dim, -1), weight, bias).movedim(-1, dim)
        expected = fastkd.hint(projected, teacher, kind=kind, **options)
        found = value_and_gradients(loss(student, teacher), student, weight, bias)
        assert_same(found, value_and_gradients(expected, student, weight, bias), 1e-12)


def test_projectors_by_name():
    student, teacher = trained(2, 4, 5, 5), trained(2, 6, 5, 5, seed=1).detach()
    for name, n_parameters in (
        ("linear", 2), ("conv1x1", 2), ("conv1x1-relu-conv1x1", 4), ("conv3x3-bn", 3)
    ):  # fmt: skip
        loss = fastkd.HintLoss(4, 6, projector=name).double()
        parameters = [*loss.parameters()]
        assert len(parameters) == n_parameters
        expected = F.mse_loss(
            loss.projector(student)
            if name != "linear"
            else F.conv2d(student, loss.projector.weight[:, :, None, None], loss.projector.bias),
            teacher,
        )
        found = value_and_gradients(loss(student, teacher), student, *parameters)
        assert_same(found, value_and_gradients(expected, student, *parameters), 1e-12)
    own = nn.Conv2d(4, 6, 3, padding=1)
    loss = fastkd.HintLoss(projector=own).double()
    assert loss.projector is own
    assert_same([loss(student, teacher)], [F.mse_loss(own(student), teacher)])


def test_there_is_a_projector_where_widths_differ_or_it_is_named():
    assert fastkd.HintLoss().projector is None
    assert fastkd.HintLoss(4, 4).projector is None
    assert fastkd.HintLoss(4, 4, projector="linear").projector.weight.shape == (4, 4)
    for wrong, message in (
        (dict(projector="conv"), "projector must be \"linear\", .* or None, got 'conv'"),
        (dict(projector=3), "projector must be"),
        (dict(side="left"), 'side must be "student" or "teacher"'),
        (dict(resize="crop"), 'resize must be "pool" or "interpolate"'),
        (dict(kind="l7"), "kind must be"),
    ):
        with pytest.raises(ValueError, match=message):
            fastkd.HintLoss(4, 6, **wrong)
    with pytest.raises(
        ValueError, match="needs student_channels and teacher_channels, got 4 and N"
    ):
        fastkd.HintLoss(4, projector="linear")
    with pytest.raises(ValueError, match="student_channels must be a whole number"):
        fastkd.HintLoss(0, 6)
    with pytest.raises(TypeError, match="takes its options by name"):
        fastkd.HintLoss(4, 6, "linear")


def test_features_of_another_width_than_named_are_told():
    loss, teacher = fastkd.HintLoss(4, 6), torch.zeros(2, 6, 5, 5)
    with pytest.raises(ValueError, match=r"student_channels=4, got 5 in dimension 1 of \[2, 5"):
        loss(torch.zeros(2, 5, 5, 5), teacher)
    with pytest.raises(ValueError, match=r"teacher_channels=6, got 3"):
        loss(torch.zeros(2, 4, 5, 5), teacher[:, :3])
    with pytest.raises(TypeError, match="student"):
        loss([1.0], teacher)


def test_convolutions_refuse_what_is_no_batch_of_maps():
    """They would take [B, L, C] with as many examples as channels for one map, and mix these."""
    convolution = fastkd.HintLoss(4, 4, projector="conv1x1")
    own = fastkd.HintLoss(4, 4, projector=nn.Sequential(nn.Conv2d(4, 4, 1)), side="teacher")
    for loss in (convolution, own):
        for shape in ((4, 5, 4), (7, 4), (2, 5, 4, 3, 4)):
            loss.feature_dim = -1
            with pytest.raises(
                ValueError, match=r"convolution of maps \[B, C, H, W\], got .*\[.*4\]"
            ):
                loss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"convolution of maps .* dimension 1 of \[4, 4, 5\]"):
        fastkd.VIDLoss(4, 4)(torch.zeros(4, 4, 5), torch.zeros(4, 4, 5))


@pytest.mark.parametrize("options", [{}, dict(resize="pool")], ids=str)
def test_what_is_no_pair_of_layers_is_told_before_it_is_projected(options):
    loss = fastkd.HintLoss(4, 6, **options)
    for student, teacher, message in (
        (torch.zeros(2, 5, 4), torch.zeros(2, 6), "need one shape.* both the same dimensions"),
        (torch.zeros(4), torch.zeros(6), "at least two dimensions"),
        (torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 6), "must hold floating-point"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(student, teacher)


def test_sizes_without_a_position_or_of_many_dimensions():
    loss = fastkd.HintLoss(4, 4, resize="pool")
    assert loss(torch.zeros(2, 4, 0, 3), torch.zeros(2, 4, 2, 2)) == 0
    loss = fastkd.HintLoss(4, 4, resize="interpolate")
    with pytest.raises(ValueError, match=r'not interpolated, got .* take resize="pool"'):
        loss(torch.zeros(2, 4, 5, 5, 5, 2), torch.zeros(2, 4, 3, 3, 3, 2))


def test_a_projector_of_the_teacher_is_fixed():
    student, teacher = trained(2, 4, 5, 5), trained(2, 6, 5, 5, seed=1).detach()
    for name in ("linear", "conv1x1", "conv3x3-bn"):
        loss = fastkd.HintLoss(4, 6, projector=name, side="teacher").double().train()
        assert not any(x.requires_grad for x in loss.parameters())
        state = copy.deepcopy(loss.state_dict())
        found = value_and_gradients(loss(student, teacher), student)
        target = (
            loss.projector(teacher) if name != "linear" else loss.projector(teacher, 1)
        ).detach()
        assert_same(found, value_and_gradients(F.mse_loss(student, target), student), 1e-12)
        assert all(torch.equal(x, state[key]) for key, x in loss.state_dict().items())
    weight = fastkd.HintLoss(4, 6, side="teacher").projector.weight
    assert_same([weight @ weight.T], [torch.eye(4)])
    own = nn.Linear(6, 4).double()  # of a user, who may train it elsewhere
    loss = fastkd.HintLoss(projector=own, side="teacher")
    loss(trained(3, 4), trained(3, 6).detach()).backward()
    assert own.weight.requires_grad and own.weight.grad is None


@pytest.mark.parametrize("feature_dim", [1, -1])
def test_resizing(feature_dim):
    small, large = trained(2, 3, 4, 5), trained(2, 3, 7, 10, seed=1)
    wide = trained(2, 3, 4, 10, seed=2)

    def moved(x):
        return x.movedim(1, feature_dim)

    for student, teacher in ((small, large), (large, small), (large, wide), (wide, large)):
        teacher = teacher.detach()
        sizes = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        pooled = [F.adaptive_avg_pool2d(x, sizes) for x in (student, teacher)]
        interpolated = F.interpolate(student, teacher.shape[2:], mode="bilinear"), teacher
        for way, pair in (("pool", pooled), ("interpolate", interpolated)):
            loss = fastkd.HintLoss(resize=way, feature_dim=feature_dim)
            found = value_and_gradients(loss(moved(student), moved(teacher)), student)
            assert_same(found, value_and_gradients(F.mse_loss(*pair), student), 1e-12)
    with pytest.raises(ValueError, match="one shape"):
        fastkd.HintLoss(feature_dim=feature_dim)(moved(small), moved(large))


def test_resizing_sequences():
    student, teacher = trained(2, 3, 7), trained(2, 3, 4, seed=1).detach()
    pooled = F.adaptive_avg_pool1d(student, 4), teacher
    interpolated = F.interpolate(student, 4, mode="linear"), teacher
    for way, pair in (("pool", pooled), ("interpolate", interpolated)):
        loss = fastkd.HintLoss(resize=way)  # tokens [B, L, C]
        assert_same([loss(student.mT, teacher.mT)], [F.mse_loss(*pair)], 1e-12)


# ------------------------------------------------------------------------------------------ VIDLoss


def test_vid_is_trained_with_its_regressor_and_variances():
    loss = fastkd.VIDLoss(4, 6, initial_variance=3.0, epsilon=0.1).double()
    student, teacher = trained(2, 4, 6, 6), trained(2, 6, 3, 3, seed=1).detach()
    names = [name for name, _ in loss.named_parameters()]
    assert names == ["variance_parameter", *(f"regressor.{i}.weight" for i in (0, 2, 4))]
    parameters = [*loss.parameters()]
    torch.testing.assert_close(
        F.softplus(loss.variance_parameter) + 0.1, torch.full((6,), 3.0, dtype=torch.float64)
    )
    mean = loss.regressor(F.avg_pool2d(student, 2))
    variance = torch.log1p(loss.variance_parameter.exp()).view(1, 6, 1, 1) + 0.1
    expected = (((mean - teacher) ** 2 / variance + variance.log()) / 2).mean()
    found = value_and_gradients(loss(student, teacher), student, *parameters)
    assert_same(found, value_and_gradients(expected, student, *parameters), 1e-12)
    weights = torch.tensor([0.0, 1.0])
    of_second = loss(student[1:], teacher[1:])
    assert_same([loss(student, teacher, weights=weights)], [of_second], 1e-12)


@pytest.mark.parametrize("variance", [1e-3, 5.0, 30.0, 1000.0])
def test_vid_begins_with_the_variance_that_is_asked_for(variance):
    loss = fastkd.VIDLoss(4, 6, initial_variance=variance)
    found = F.softplus(loss.variance_parameter.double()) + loss.epsilon
    torch.testing.assert_close(found, torch.full_like(found, variance), rtol=1e-6, atol=0)


def test_vid_takes_a_regressor_and_says_what_is_wrong():
    maps = torch.zeros(2, 6, 3, 3)
    assert fastkd.VIDLoss(6, 6, regressor=nn.Identity())(maps, maps).isfinite()
    for wrong, message in (
        (dict(initial_variance=1e-6), "initial_variance must be a finite number above 1e-05"),
        (dict(epsilon=0.0), "epsilon must be a finite number above 0"),
        (dict(student_channels=0), "student_channels must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            fastkd.VIDLoss(**dict(student_channels=4, teacher_channels=6) | wrong)
    with pytest.raises(ValueError, match=r"\[2, 4, 3, 3\] and \[2, 6, 3, 3\].* VIDLoss owns"):
        fastkd.vid(torch.zeros(2, 4, 3, 3), maps, torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"one number for each channel, the shape \[6\], got \[4\]"
    ):
        fastkd.vid(maps, maps, torch.zeros(4))


@pytest.mark.parametrize(
    "make", [lambda: fastkd.HintLoss(4, 6, resize="pool"), lambda: fastkd.VIDLoss(4, 6)]
)
def test_modules_with_parameters_are_copied_saved_and_compiled(make):
    torch._dynamo.reset()
    loss = make()
    student = torch.randn(2, 4, 6, 6, requires_grad=True)
    teacher = torch.randn(2, 6, 3, 3)
    expected = value_and_gradients(loss(student, teacher), student, *loss.parameters())
    fresh = make()
    fresh.load_state_dict(loss.state_dict())
    whole = torch.compile(copy.deepcopy(loss), backend="aot_eager", fullgraph=True)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh, whole):
        found = value_and_gradients(twin(student, teacher), student, *twin.parameters())
        assert_same(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(student, teacher).dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(student, teacher.requires_grad_(False)).requires_grad

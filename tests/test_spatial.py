"""Particulars of softmaxes over places: maps in any layout, weights of channels, edges of boxes."""

import pytest
import torch
import torch.nn.functional as F
from choice import quick_if
from exactness import assert_as_exact, assert_same, by_formula, in_dtype, results
from inputs import DEVICE, normal
from meter import PeakMemory

import fastkd


def maps(*shape, dtype=torch.float64):
    student, teacher = (normal(*shape, dtype=dtype, seed=seed) * 3 for seed in (1, 2))
    return [student.requires_grad_(), teacher]


def published(student, teacher, temperature=4.0):
    """Return the loss as TorchDistiller writes it."""
    n, n_channels = student.shape[:2]
    s, t = (x.reshape(n * n_channels, -1) / temperature for x in (student, teacher))
    p = t.softmax(1)
    return (p * t.log_softmax(1) - p * s.log_softmax(1)).sum() * temperature**2 / (n * n_channels)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cropped": lambda x: F.pad(x, (2, 1, 1, 3), value=torch.nan)[..., 1:-3, 2:-1],
    "every other image": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 5, 40, 33)], ids=str)
@quick_if(lambda shape, engine: engine != "triton" or shape[1] == 3)
def test_channel_wise_of_maps_in_any_layout(layout, shape, engine):
    inputs = [LAYOUTS[layout](x.detach()) for x in maps(*shape)]
    inputs[0].requires_grad_()
    plain = maps(*shape)
    assert_same(results(fastkd.channel_wise, inputs), results(published, plain))
    of_channels = fastkd.channel_wise(*inputs, reduction="none")
    assert of_channels.shape == shape[:2]
    assert_same([of_channels.mean()], [published(*plain)])


@pytest.mark.parametrize("shape", [(2, 6, 50), (2, 3, 4, 5, 6)], ids=str)
def test_channel_wise_of_sequences_and_volumes(shape, engine):
    assert_same(results(fastkd.channel_wise, maps(*shape)), results(published, maps(*shape)))


@pytest.mark.parametrize("n", [1 << 12, 1 << 19])
def test_gradients_have_the_layout_of_the_maps(n, engine):
    """Small and large ones; a gradient in another layout would be copied by what follows."""
    size = {1 << 12: 8, 1 << 19: 64}[n]
    if engine == "triton" and size == 64:
        return  # many programs, one for each channel
    student, teacher = (
        x.detach().float().contiguous(memory_format=torch.channels_last)
        for x in maps(2, n // size**2 // 2, size, size)
    )
    found = []
    leaf = student.clone(memory_format=torch.preserve_format).requires_grad_()
    maps_of_student = leaf * 1
    maps_of_student.register_hook(lambda x: found.append(x.stride()))
    fastkd.channel_wise(maps_of_student, teacher).backward()
    assert found == [student.stride()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_channel_wise_makes_no_copy(channels_last):
    """Exactly: the gradient, the scratch of a chunk, and less than 64 numbers a channel."""
    student, teacher = maps(8, 64, 64, 64, dtype=torch.float32)
    if channels_last:
        student, teacher = (
            x.detach().contiguous(memory_format=torch.channels_last) for x in (student, teacher)
        )
    scratch = (6 * 4 + 1) * (1 << 18)
    with fastkd.backend("portable"):
        loss = fastkd.channel_wise(student.requires_grad_(), teacher)
        with PeakMemory() as memory:
            (gradient,) = torch.autograd.grad(fastkd.channel_wise(student, teacher), student)
        assert gradient.stride() == student.stride()
    assert memory.peak_bytes <= student.nbytes + scratch + 256 * 8 * 64
    assert loss.isfinite()


def test_weights_of_channels(engine):
    """A channel of weight 0 may hold anything; the mean is over those that are left."""
    student, teacher = maps(3, 4, 5, 6)
    weights = normal(3, 4, seed=3).square()
    weights[0, 1] = weights[2] = 0
    rows = fastkd.forward_kl(
        *(x.detach().flatten(2) for x in (student, teacher)), temperature=4.0, reduction="none"
    )
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            student[0, 1, 2], teacher[2, 0] = bad, bad
        found = results(lambda *x: fastkd.channel_wise(*x, weights=weights), [student, teacher])
        assert_same(found[:1], [(weights * rows).nan_to_num().sum() / weights.sum()], 1e-9)
        assert not found[1][0, 1].any() and not found[1][2].any() and found[1].isfinite().all()
    for total in (7, torch.tensor(7.0)):
        loss = fastkd.channel_wise(student, teacher, weights=weights, normalizer=total)
        assert_same([loss], [(weights * rows).nan_to_num().sum() / 7], 1e-9)
    none = fastkd.channel_wise(student, teacher, weights=torch.zeros(3, 4, device=DEVICE))
    assert none == 0 and not torch.autograd.grad(none, student)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_channel_wise_is_as_exact_as_what_people_write(dtype, engine):
    inputs = in_dtype(dtype, maps(2, 3, 9, 11))
    truth = results(published, in_dtype(torch.float64, inputs))
    yardstick = by_formula(fastkd.channel_wise, inputs)
    assert_as_exact(results(fastkd.channel_wise, inputs), yardstick, truth)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        ((2, 3, 4, 4), (2, 3, 8, 8), r"maps of one size.*interpolate\(student, \(8, 8\)"),
        ((2, 3, 4, 4), (2, 5, 4, 4), r"one number of channels.*torch.nn.Conv2d\(3, 5, 1\)"),
        ((2, 3, 4, 4), (3, 3, 4, 4), r"the same examples: one N, got \[2, 3, 4, 4\] and \[3"),
        ((2, 9, 3), (2, 3, 3, 3), r"as many dimensions.*unflatten"),
        ((2, 3), (2, 3), r"student needs the shape \[B, C, H, W\].*got \[2, 3\]"),
        ((2, 3, 0, 4), (2, 3, 0, 4), r"student needs the shape .*got \[2, 3, 0, 4\]"),
    ],
)
def test_maps_that_do_not_fit_have_their_way(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        fastkd.channel_wise(torch.zeros(student), torch.zeros(teacher))


def test_what_is_no_map_is_told():
    maps = torch.zeros(2, 3, 4, 4)
    for wrong, message in (
        ([1.0], "student must be a tensor of shape .*got list"),
        (maps.long(), "student must hold floating-point features .*got torch.int64"),
        (torch.nested.nested_tensor([*maps], layout=torch.jagged), "nested.* maps of one size"),
    ):
        with pytest.raises(TypeError, match=message):
            fastkd.channel_wise(wrong, maps)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        fastkd.channel_wise(maps, maps, temperature=0)
    with pytest.raises(ValueError, match=r"for each example: the shape \[2, 3\], got \[2, 4, 4\]"):
        fastkd.channel_wise(maps, maps, weights=torch.ones(2, 4, 4))


# ------------------------------------------------------------------------------------ localization


def test_localization_is_that_of_mmdetection(engine):
    """Its loss of outputs [N, 4 (reg_max + 1)], with weights of boxes and an average factor."""
    n, n_bins = 6, 9
    student, teacher = (x.view(n, 4 * n_bins) for x in maps(n, 4, n_bins))
    of_boxes = normal(n, seed=5).square()
    of_boxes[2] = 0

    def theirs(student, teacher):
        s, t = (x.reshape(-1, n_bins) / 10 for x in (student, teacher))
        losses = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none").mean(1) * 10 * 10
        return (losses * of_boxes[:, None].expand(-1, 4).reshape(-1)).sum() / 4.0

    def ours(student, teacher):
        edges = (x.unflatten(-1, (4, n_bins)) for x in (student, teacher))
        weights = of_boxes[:, None].expand(-1, 4)
        return fastkd.localization(*edges, bins="mean", weights=weights, normalizer=4.0)

    inputs = [student.detach().requires_grad_(), teacher]
    assert_same(results(ours, inputs), results(theirs, inputs))


def test_bins_are_summed_or_averaged():
    student, teacher = maps(5, 4, 9)
    both = [fastkd.localization(student, teacher, bins=way) for way in ("sum", "mean")]
    assert_same([both[0]], [9 * both[1]])
    with pytest.raises(ValueError, match='bins must be "sum" or "mean", got \'max\''):
        fastkd.localization(student, teacher, bins="max")


@pytest.mark.parametrize("temperature", [torch.ones(5, 4), torch.ones((), requires_grad=True)])
def test_the_temperature_of_localization_is_one_number(temperature):
    with pytest.raises(ValueError, match="temperature must be a number or a 0-dim tensor"):
        fastkd.localization(*maps(5, 4, 9), temperature=temperature)

"""Every error says what was got, what is needed and what to do."""

import pytest
import torch
from losses import DEVICE, each_loss, logits

import fastkd


@pytest.fixture
def inputs():
    student, teacher = logits((4,), 7, torch.float32)
    return student, teacher, torch.tensor([0, 6, 2, -100], device=DEVICE)


def says(error, *sentences):
    """The error, whose message holds all of them."""
    return pytest.raises(error, match="".join(f"(?=.*{sentence})" for sentence in sentences))


@each_loss
def test_logits_of_two_shapes(case):
    student, teacher, *labels = case.inputs((4,), 7)
    with says(ValueError, r"\[4, 7\] and \[4, 6\]", "need one shape", "cut both to the vocabulary"):
        case(student, teacher[:, :6], *labels)
    with says(ValueError, r"\[4, 7\] and \[3, 7\]", "align the positions"):
        case(student, teacher[:3], *labels)


@each_loss
@pytest.mark.parametrize("place, name", [(0, "student_logits"), (1, "teacher_logits")])
def test_what_are_no_logits(case, place, name):
    inputs = case.inputs((4,), 7)

    def with_wrong(value):
        return case(*inputs[:place], value, *inputs[place + 1 :])

    with says(TypeError, f"{name} must be a tensor", "got list"):
        with_wrong([[0.0] * 7] * 4)
    with says(TypeError, f"{name} must hold floating-point", "got torch.int64", "labels"):
        with_wrong(torch.zeros(4, 7, dtype=torch.int64, device=DEVICE))
    with says(ValueError, rf"{name} needs the shape \(..., V\)", r"got \[\]"):
        with_wrong(torch.tensor(0.0, device=DEVICE))
    with says(ValueError, rf"{name} needs the shape \(..., V\)", r"got \[4, 0\]"):
        with_wrong(torch.zeros(4, 0, device=DEVICE))


def test_two_devices(inputs):
    student, teacher, labels = inputs
    meta = torch.device("meta")
    with says(ValueError, f"student_logits is on {DEVICE}", "teacher_logits on meta", "move them"):
        fastkd.forward_kl(student, teacher.to(meta))
    with says(ValueError, f"student_logits is on {DEVICE}", "labels on meta", "move them"):
        fastkd.kd(student, teacher, labels.to(meta))
    with says(ValueError, "weights are on meta", f"the losses on {DEVICE}", "move them"):
        fastkd.forward_kl(student, teacher, weights=torch.ones(4, device=meta))


@each_loss
@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan"), "warm"])
def test_temperature(case, temperature):
    with says(ValueError, "temperature must be a finite number above 0", f"got {temperature!r}"):
        case(*case.inputs((4,), 7), temperature=temperature)


def test_temperature_as_a_tensor(inputs):
    student, teacher, _ = inputs
    with says(ValueError, "0-dim tensor", r"got \[4, 1\]"):
        fastkd.forward_kl(student, teacher, temperature=torch.ones(4, 1))
    learned = torch.tensor(1.0, requires_grad=True)
    with says(ValueError, "without gradient", "requires_grad=True", "not differentiable"):
        fastkd.forward_kl(student, teacher, temperature=learned)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "half", None])
def test_fractions(value, inputs):
    student, teacher, labels = inputs
    for loss, option in (
        (fastkd.jensen_shannon, "beta"),
        (fastkd.skew_kl, "skew"),
        (fastkd.skew_reverse_kl, "skew"),
        (fastkd.symmetric_kl, "weight"),
    ):
        with says(ValueError, rf"{option} must be a number in \[0, 1\], got {value!r}"):
            loss(student, teacher, **{option: value})
    with says(ValueError, rf"alpha must be a number in \[0, 1\], got {value!r}"):
        fastkd.kd(student, teacher, labels, alpha=value)
    with says(ValueError, rf"beta must be a number in \[0, 1\], got {value!r}"):
        fastkd.kd(student, teacher, labels, divergence="jensen_shannon", beta=value)


def test_unknown_options(inputs):
    student, teacher, labels = inputs
    with says(TypeError, "forward_kl has no option 'tau'", "its options are temperature, scale_t2"):
        fastkd.forward_kl(student, teacher, tau=2.0)
    with says(TypeError, "reverse_kl has no option 'beta'"):
        fastkd.reverse_kl(student, teacher, beta=0.5)
    with pytest.raises(TypeError, match="tau"):
        fastkd.kd(student, teacher, labels, tau=2.0)
    with says(ValueError, "divergence must be one of forward_kl, reverse_kl", "got 'kl'"):
        fastkd.kd(student, teacher, labels, divergence="kl")


@each_loss
def test_missing_and_superfluous_tensors(case):
    inputs = case.inputs((4,), 7)
    with pytest.raises(TypeError, match="teacher_logits"):
        case.loss(inputs[0])
    with pytest.raises(TypeError):
        case.loss(*inputs, inputs[0])


def test_tensors_by_name(inputs):
    student, teacher, labels = inputs
    both = dict(teacher_logits=teacher, student_logits=student)
    assert fastkd.forward_kl(**both) == fastkd.forward_kl(student, teacher)
    assert fastkd.kd(labels=labels, **both) == fastkd.kd(student, teacher, labels)


@each_loss
def test_reduction_and_normalizer(case):
    inputs = case.inputs((4,), 7)
    with says(ValueError, 'reduction must be "mean", "sum" or "none", got \'batchmean\''):
        case(*inputs, reduction="batchmean")
    for reduction in ("sum", "none"):
        with says(ValueError, "normalizer replaces the divisor", f"got reduction='{reduction}'"):
            case(*inputs, reduction=reduction, normalizer=3)
    with says(ValueError, "a number or a 0-dim tensor", r"got \[1\]"):
        case(*inputs, reduction="mean", normalizer=torch.ones(1, device=DEVICE))


@each_loss
def test_weights(case):
    inputs = case.inputs((2, 2), 7)
    for weights in (torch.ones(4, device=DEVICE), torch.ones(2, 2, 1, device=DEVICE)):
        shape = str([*weights.shape]).replace("[", r"\[").replace("]", r"\]")
        with says(ValueError, "one real number or bool for each example", r"\[2, 2\]", shape):
            case(*inputs, weights=weights)
    with says(ValueError, "one real number", "complex64"):
        case(*inputs, weights=torch.ones(2, 2, dtype=torch.complex64, device=DEVICE))
    with says(TypeError, "weights must be a tensor, got list"):
        case(*inputs, weights=[[1.0, 1.0], [1.0, 1.0]])


def test_labels(inputs):
    student, teacher, labels = inputs
    with says(TypeError, "class indices", "got torch.float32"):
        fastkd.kd(student, teacher, labels.float())
    with says(TypeError, "class indices", "got torch.bool"):
        fastkd.kd(student, teacher, labels > 0)
    with says(TypeError, "class indices", "got list"):
        fastkd.kd(student, teacher, [0, 6, 2, -100])
    with says(ValueError, r"one class for each row: the shape \[4\]", r"got \[4, 1\]"):
        fastkd.kd(student, teacher, labels.unsqueeze(1))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looking at labels on a GPU would wait for it")
@pytest.mark.parametrize("wrong", [7, -1])
def test_labels_out_of_range(wrong, inputs):
    student, teacher, labels = inputs
    labels[1] = wrong
    with says(ValueError, rf"in \[0, 7\) or be ignore_index=-100, got {wrong}"):
        fastkd.kd(student, teacher, labels)


def test_backend():
    with says(ValueError, "got the backend 'cuda'", "need one of auto, triton, portable, formula"):
        fastkd.backend("cuda")


@pytest.mark.parametrize("loss, n", [(fastkd.forward_kl, 2), (fastkd.info_nce, 3)])
def test_an_option_by_its_place(loss, n):
    with pytest.raises(TypeError, match="too many positional arguments"):
        loss(*torch.ones(n, 4, 3, device=DEVICE), 2.0)

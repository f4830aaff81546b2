"""Gradients that the portable forward makes because it knows what the losses are multiplied by."""

import pytest
import torch
from cases import LOSSES
from exactness import assert_same, results
from force import in_chunks_of
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd

ROWS = (
    "forward_kl", "reverse_kl", "total_variation", "kd", "decoupled_kd", "nkd", "wsld", "mft",
    "uld",
)  # fmt: skip
FORESEEN = [x for x in LOSSES if x.name in ROWS]
FORESEEN_KD = next(x for x in FORESEEN if x.name == "kd")
each_case = pytest.mark.parametrize("case", FORESEEN, ids=str)
SHAPE = (20,), 30


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    in_chunks_of(200, monkeypatch)
    with fastkd.backend("portable"):
        yield


class Exponentials(TorchDispatchMode):
    """Counts the chunks of which exponentials are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.exp2, torch.ops.aten.exp2_)
        return func(*args, **(kwargs or {}))


def exponentials(case, **options):
    student, *others = case.inputs(*SHAPE)
    with Exponentials() as forward:
        loss = case(student, *others, **options)
    with Exponentials() as backward:
        loss.backward(torch.ones_like(loss))
    return forward.count, backward.count


@each_case
def test_the_backward_computes_nothing_anew(case):
    assert exponentials(case, reduction="none")[1] > 0
    assert exponentials(case, reduction="mean")[1] == 0


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_upstream_gradient_gets_its_own(case, dtype):
    """Also the second one of a graph, which finds none that is foreseen."""
    student, *others = case.inputs(*SHAPE, dtype)
    rows = case(student, *others, reduction="none")
    for reduction, unit in (("mean", 1 / 20), ("sum", 1.0)):
        loss = case(student, *others, reduction=reduction)
        for factor in (0.3, 1.0, 0.0, 1.0):  # the first of them finds what was foreseen
            upstream = torch.full_like(rows, factor * unit)
            (found,) = torch.autograd.grad(loss * factor, student, retain_graph=True)
            (expected,) = torch.autograd.grad(rows, student, upstream, retain_graph=True)
            assert_same([found], [expected], {2: 1e-2, 4: 2e-6, 8: 1e-12}[dtype.itemsize])


@pytest.mark.parametrize("options", [dict(class_weights=True), dict(label_smoothing=0.1), {}])
@pytest.mark.parametrize("are_soft", [False, True], ids=["classes", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_terms_of_kd_have_one_gradient(options, are_soft, reduction):
    """That of the parts, which are reduced one by one, each over its own divisor."""
    student, teacher, labels = FORESEEN_KD.inputs(*SHAPE, torch.float64)
    if are_soft:
        labels = torch.nn.functional.one_hot(labels, 30).double()
    if "class_weights" in options:
        options = dict(class_weights=torch.arange(30.0).double())  # that of a class is 0
    options = dict(alpha=0.3, reduction=reduction) | options

    def loss(z):
        return fastkd.kd(z, teacher, labels, **options)

    def of_parts(z):
        _, cross_entropy, divergence = fastkd.kd(z, teacher, labels, return_parts=True, **options)
        return 0.3 * cross_entropy + 0.7 * divergence

    assert_same(results(loss, [student]), results(of_parts, [student]), 1e-12)


def with_masks(case):
    """Return inputs, options that leave rows out, and which rows are left."""
    inputs, some = case.inputs(*SHAPE), torch.arange(20) % 3 > 0
    yield inputs, dict(weights=some), some
    if case.name in ("kd", "decoupled_kd", "nkd", "wsld") and not inputs[2].is_floating_point():
        inputs[2] = inputs[2].masked_fill(~some, -100)
        yield inputs, {}, some
        others = torch.arange(20) % 4 > 0
        yield inputs, dict(weights=others), some & others
    elif "labels" in case.parameters and case.parameters["labels"].default is None:
        yield inputs, dict(labels=torch.where(some, 1, -100)), some


@pytest.mark.parametrize("case", [x for x in FORESEEN if x.name != "mft"], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_that_do_not_count_leave_the_others_foreseen(case, reduction):
    """The same as without their rows, whatever they hold, and with nothing computed anew."""

    def solved(student, *others, **options):
        student = student.detach().requires_grad_()
        loss = case(student, *others, reduction=reduction, **options)
        with Exponentials() as backward:
            (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        (of_another,) = torch.autograd.grad(3 * loss, student)
        assert_same([of_another], [3 * gradient])
        return loss.detach(), gradient, backward.count

    for (student, teacher, *labels), options, counted in with_masks(case):
        known = [x[counted] if len(x) == 20 else x for x in (student, teacher, *labels)]
        expected, of_counted, _ = solved(*known)
        student, teacher = student.detach().clone(), teacher.clone()
        student[~counted], teacher[~counted] = torch.nan, torch.inf
        loss, gradient, n_exponentials = solved(student, teacher, *labels, **options)
        assert_same([loss, gradient[counted]], [expected, of_counted])
        assert not gradient[~counted].any() and n_exponentials == 0


@each_case
def test_no_row_is_left(case):
    """Zero, and a gradient of zeros, of a mean over nothing."""
    student, *others = case.inputs(*SHAPE)
    weights = torch.zeros(20, dtype=torch.bool)
    found = results(lambda x: case(x, *others, reduction="mean", weights=weights), [student])
    assert not any(x.any() for x in found)


@each_case
def test_strided_logits_get_their_gradient(case):
    student, *others = case.inputs((4, 6), 30)
    turned = student.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = [
        torch.autograd.grad(case(x, *others, reduction="mean"), x)[0] for x in (turned, student)
    ]
    assert_same(found[:1], found[1:])


@each_case
def test_a_row_that_is_nan_reaches_no_other(case):
    student, *others = case.inputs(*SHAPE)
    (clean,) = torch.autograd.grad(case(student, *others, reduction="mean"), student)
    others[0][3] = torch.nan
    (found,) = torch.autograd.grad(case(student, *others, reduction="mean"), student)
    kept = [i for i in range(20) if i != 3]
    assert_same([found[kept]], [clean[kept]])
    assert found[3].isnan().all()

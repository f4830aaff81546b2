"""The decorator carries losses that a user writes: labels, maps as examples, ranks and masks."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same
from inputs import normal
from torch import Tensor

import fastkd
from fastkd._loss import loss


def no_check(*batch, **options):
    pass


@loss(no_check, per_example=True)
def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha=1.0, beta=8.0,
    temperature=4.0, weights=None, normalizer=None, reduction="mean",
) -> Tensor:  # fmt: skip
    """Compute decoupled distillation, α TCKD + β NCKD: the target class apart from the others."""
    target = F.one_hot(labels, student_logits.shape[-1]).bool()

    def parts(logits):
        logits = logits / temperature
        p = logits.softmax(-1)[target].unflatten(0, labels.shape)
        return torch.stack([p, 1 - p], -1), logits.masked_fill(target, -1e9).log_softmax(-1)

    (binary_q, log_q), (binary_p, log_p) = parts(student_logits), parts(teacher_logits)
    tckd = (binary_p * (binary_p / binary_q).log()).sum(-1)
    nckd = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (alpha * tckd + beta * nckd)


@loss(no_check, per_example=1)
def hint(
    student: Tensor, teacher: Tensor, *, weights=None, normalizer=None, reduction="mean"
) -> Tensor:
    """Compute the mean squared difference of each example's feature maps, [N, C, H, W]."""
    return (student - teacher).square().flatten(1).mean(1)


def test_a_loss_with_labels_is_what_its_paper_says():
    student, teacher = 3 * normal(2, 6, 11)
    student.requires_grad_()
    labels = torch.tensor([3, 0, 10, 7, 3, 1])
    losses = dkd(student, teacher, labels, beta=2.0, reduction="none")
    for i, label in enumerate(labels):
        q, p = (x[i].div(4.0).softmax(-1) for x in (student, teacher))
        others = [k for k in range(11) if k != label]
        pairs = torch.stack([q[label], 1 - q[label]]), torch.stack([p[label], 1 - p[label]])
        tckd = (pairs[1] * (pairs[1] / pairs[0]).log()).sum()
        q_others, p_others = q[others] / q[others].sum(), p[others] / p[others].sum()
        nckd = (p_others * (p_others / q_others).log()).sum()
        assert_same([losses[i]], [16 * (tckd + 2 * nckd)])
    mean = dkd(student, teacher, labels, beta=2.0)
    assert_same([mean], [losses.mean()])
    assert_same(torch.autograd.grad(mean, student), torch.autograd.grad(losses.mean(), student))


@pytest.mark.parametrize("weights", [[1.0, 0.0, 2.0, 0.5], [True, False, True, True]], ids=str)
def test_losses_of_maps_have_weights_for_examples(weights):
    student, teacher = normal(2, 4, 3, 5, 2)
    student.requires_grad_()
    weights = torch.tensor(weights)
    kept = weights.double()
    expected = (F.mse_loss(student, teacher, reduction="none").mean((1, 2, 3)) * kept).sum()
    expected = expected / kept.sum()
    of_expected = torch.autograd.grad(expected, student)
    spoilt = student.detach().clone()
    spoilt[1] = torch.nan  # an example of weight 0 may hold anything
    spoilt.requires_grad_()
    found = hint(spoilt, teacher, weights=weights)
    assert_same([found, *torch.autograd.grad(found, spoilt)], [expected, *of_expected])
    assert hint(student, teacher, reduction="none").shape == (4,)
    with pytest.raises(ValueError, match=r"\[4\].*\[4, 3\]"):
        hint(student, teacher, weights=torch.ones(4, 3))


def test_what_the_decorator_does_for_every_formula():
    student, teacher = normal(2, 4, 11)
    labels = torch.tensor([1, 2, 3, 4])
    halves = [x.bfloat16() for x in (student, teacher)]
    halves[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = dkd(*halves, labels, reduction="none")
    assert losses.dtype == torch.float32
    assert torch.autograd.grad(losses.sum(), halves[0])[0].dtype == torch.bfloat16
    wide = dkd(*(x.double() for x in halves), labels, reduction="none")
    assert_same([losses], [wide], 1e-5)
    trained = [student.requires_grad_(), teacher.requires_grad_()]
    _, of_teacher = torch.autograd.grad(dkd(*trained, labels), trained, allow_unused=True)
    assert of_teacher is None
    with pytest.raises(TypeError, match=r"dkd has no option 'gamma'.* alpha, beta, temperature"):
        dkd(student, teacher, labels, gamma=1.0)
    by_name = dkd(labels=labels, teacher_logits=teacher, student_logits=student)
    assert_same([by_name], [dkd(student, teacher, labels)])
    assert dkd.__doc__.startswith("Compute decoupled distillation")


def test_public_losses_show_their_signatures_and_formulas():
    signature = inspect.signature(fastkd.forward_kl)
    assert [*signature.parameters][:4] == [
        *("student_logits", "teacher_logits", "temperature", "student_temperature")
    ]
    assert {"weights", "normalizer", "reduction"} < {*signature.parameters}
    assert "group" in inspect.signature(fastkd.rkd).parameters
    student, teacher = normal(2, 3, 5)
    rows = fastkd.forward_kl.formula(student, teacher, temperature=2.0, scale_t2=True)
    assert_same([rows], [fastkd.forward_kl(student, teacher, temperature=2.0, reduction="none")])

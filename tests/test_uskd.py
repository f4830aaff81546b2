"""Particulars of the loss whose soft labels the student makes: order, exclusion, masks, parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_same, by_formula, exact, results
from inputs import DEVICE, normal, with_weak_logits

import fastkd


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def test_soft_labels_of_the_other_classes_follow_their_ranks(engine):
    """The label, 2, has the second rank, so that the others have the first, third and fourth."""
    student = tensor([1.0, 4.0, 3.0, 2.0]).requires_grad_()
    label = torch.tensor([2], device=DEVICE)
    shares = tensor(1 / 4, 1.0, 1 / 3) / (1 / 4 + 1 + 1 / 3)
    _, target, others, weak = fastkd.uskd(student, label, return_parts=True)
    rest = F.log_softmax(student[:, [0, 1, 3]], -1)
    torch.testing.assert_close(others, -(shares * rest).sum())
    torch.testing.assert_close(target, F.cross_entropy(student, label))  # one row is its mean
    assert weak == 0
    # the weak logits lift class 0 above the others
    lifted = tensor([9.0, 0.0, 0.0, 0.0])
    shares = tensor(1.0, 1 / 2, 1 / 4) / (1 + 1 / 2 + 1 / 4)
    _, _, others, _ = fastkd.uskd(student, label, lifted, return_parts=True)
    torch.testing.assert_close(others, -(shares * rest).sum())


def test_the_soft_label_of_a_sure_row_is_above_1(engine):
    student = tensor([3.0, 0.0, 0.0], [0.0, 0.0, 0.0]).requires_grad_()
    labels = torch.tensor([0, 0], device=DEVICE)
    squares = student.detach().softmax(-1)[:, 0] ** 2
    soft = 1 + squares - squares.mean()
    options = dict(alpha=1.0, beta=0.0, reduction="none")
    found = results(lambda x: fastkd.uskd(x, labels, **options), [student])
    plain = results(lambda x: soft * F.cross_entropy(x, labels, reduction="none"), [student])
    assert_same(found, plain)


@pytest.mark.parametrize("ranking", ["probabilities", "log_probabilities"])
def test_logits_of_2000_are_finite_and_small_ones_keep_their_order(ranking, engine):
    student, labels, weak = with_weak_logits((6,), 9, torch.float32)
    large = [(1000 * x).detach().clamp(-2000, 2000).requires_grad_() for x in (student, weak)]

    def loss(a, b):
        return fastkd.uskd(a, labels, b, ranking=ranking)

    found = results(loss, large)
    assert all(x.isfinite().all() for x in found)
    assert_same(found, results(loss, exact(large)), 1e-5)


def test_ranks_of_classes_that_no_probability_tells_apart(engine):
    """exp(−800) is 0 even in float64, as is exp(−900); the label has the second rank."""
    student, weak = tensor([0.0, 5.0, -900.0, -800.0]), tensor([0.0, 5.0, -2000.0, -2000.0])
    label = torch.tensor([0], device=DEVICE)
    shares = tensor(1.0, 1 / 4, 1 / 3) / (1 + 1 / 4 + 1 / 3)
    _, _, others, _ = fastkd.uskd(student, label, weak, return_parts=True)
    torch.testing.assert_close(others, -(shares * student[:, 1:].log_softmax(-1)).sum())


def test_excluded_classes_have_no_soft_label(engine):
    student, labels, weak = with_weak_logits((6,), 9)
    labels = labels.clamp(max=6)
    with torch.no_grad():
        student[:, 7:] = weak[:, 7:] = -math.inf

    def loss(a, b):
        return fastkd.uskd(a, labels, b, label_smoothing=0.0)

    found = results(loss, [student, weak])
    fewer = results(loss, [x[:, :7].detach().requires_grad_() for x in (student, weak)])
    assert_same([found[0], *(x[:, :7] for x in found[1:])], fewer)
    assert not any(x[:, 7:].any() for x in found[1:])


def test_weak_logits_of_labels_smoothed_away(engine):
    """Nothing is left of the infinite cross-entropy with a label that they exclude."""
    student, weak = normal(4, 6), normal(4, 6, seed=1)
    weak[0, 2] = -torch.inf
    labels = torch.full((4,), 2, device=DEVICE)

    def loss(a, b):
        return fastkd.uskd(a, labels, b, label_smoothing=1.0, reduction="none")

    inputs = [student.requires_grad_(), weak.requires_grad_()]
    found, expected = results(loss, inputs), by_formula(loss, inputs)
    assert found[0].isposinf().tolist() == [True, False, False, False]
    assert all(x.isfinite().all() for x in found[1:])
    assert_same(found, expected)


def test_weak_logits_give_no_rank_to_what_the_student_excludes(engine):
    student, label = tensor([3.0, 2.0, 1.0, -math.inf]), torch.tensor([0], device=DEVICE)
    _, _, others, _ = fastkd.uskd(student, label, tensor([0.0, 0.0, 0.0, 9.0]), return_parts=True)
    log_q = student[:, 1:3].log_softmax(-1)[0]
    expected = -(log_q[0] / 2 + log_q[1] / 3) / (1 / 2 + 1 / 3)
    torch.testing.assert_close(others, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_take_no_part_in_the_mean(reduction, engine):
    """Rows without a label and rows of weight 0 may hold anything."""
    student, labels, weak = with_weak_logits((6,), 9)
    weights = tensor(1.0, 0.0, 2.0, 0.5, 1.0, 1.0)
    kept = [0, 2, 3, 5]
    labels[4] = -100
    with torch.no_grad():
        student[[1, 4]] = weak[[1, 4]] = math.nan

    def loss(a, b, rows):
        options = dict(weights=weights[rows], reduction=reduction)
        return fastkd.uskd(a, labels[rows], b, **options)

    found = results(lambda a, b: loss(a, b, slice(None)), [student, weak])
    fewer = [x[kept].detach().requires_grad_() for x in (student, weak)]
    expected = results(lambda a, b: loss(a, b, kept), fewer)
    if reduction == "none":  # under the same upstream gradients
        upstream = results(lambda x: x, [tensor(*range(6)).requires_grad_()])[1]
        of_kept = torch.autograd.grad(loss(*fewer, kept), fewer, upstream[kept])
        expected = [loss(*fewer, kept).detach(), *of_kept]
        assert not found[0][[1, 4]].any()
        found[0] = found[0][kept]
    for x in found[1:]:
        assert not x[[1, 4]].any()
    assert_same([found[0], *(x[kept] for x in found[1:])], expected)


def test_each_network_learns_what_is_its_own(engine):
    student, labels, weak = with_weak_logits((6,), 9)
    total, target, others, of_weak = fastkd.uskd(
        student, labels, weak, alpha=2.0, beta=3.0, mu=0.5, label_smoothing=0.2, return_parts=True
    )
    torch.testing.assert_close(total, 2 * target + 3 * others + 0.5 * of_weak)
    torch.testing.assert_close(of_weak, F.cross_entropy(weak, labels, label_smoothing=0.2))
    for part, trained, other in ((target + others, student, weak), (of_weak, weak, student)):
        both = torch.autograd.grad(part, (trained, other), retain_graph=True, allow_unused=True)
        assert both[0].any() and (both[1] is None or not both[1].any())


def test_classes_in_another_dimension(engine):
    student, labels, weak = with_weak_logits((2, 3), 5)
    moved = [x.detach().movedim(-1, 1).requires_grad_() for x in (student, weak)]
    found = results(lambda a, b: fastkd.uskd(a, labels, b, dim=1), moved)
    plain = results(lambda a, b: fastkd.uskd(a, labels, b), [student, weak])
    assert_same(found, [plain[0], *(x.movedim(-1, 1) for x in plain[1:])])


def test_errors_are_sentences():
    student, labels, weak = with_weak_logits((6,), 9)
    with pytest.raises(ValueError, match=r"student_logits and weak_logits need one shape, got"):
        fastkd.uskd(student, labels, weak[:, :8])
    with pytest.raises(TypeError, match="weak_logits must be a tensor"):
        fastkd.uskd(student, labels, [1.0])
    with pytest.raises(ValueError, match=r"ranking must be .*probabilities.*got 'rank'"):
        fastkd.uskd(student, labels, ranking="rank")
    with pytest.raises(ValueError, match="mu must be a finite number of at least 0"):
        fastkd.uskd(student, labels, mu=-1.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        fastkd.USKDLoss(label_smoothing=2.0)

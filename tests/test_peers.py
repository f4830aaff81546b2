"""Networks that teach each other: what holds of their divergences beyond the contracts."""

import pytest
import torch
from choice import quick_if
from exactness import assert_same
from inputs import DEVICE, INTERPRETED, peers
from meter import Meter, PeakMemory

import fastkd


def gradients(loss, logits):
    return [loss, *torch.autograd.grad(loss.sum(), logits)]


@pytest.mark.parametrize("n", [2, 3, 5])
@quick_if(lambda n, engine: engine != "triton" or n == 2)
def test_each_network_learns_from_the_mean_of_the_others(n, engine):
    logits = peers(n)((4, 3), 7)
    weights = torch.tensor([1, 0, 2], dtype=torch.float64, device=DEVICE).expand(4, 3)
    options = dict(temperature=2.0, weights=weights, normalizer=5)
    pairs = [
        fastkd.forward_kl(student, teacher.detach(), **options) / (n - 1)
        for student in logits
        for teacher in logits
        if student is not teacher
    ]
    found = fastkd.mutual_kl(logits, **options)
    assert_same(gradients(found, logits), gradients(torch.stack(pairs).sum(), logits))


def test_both_sides_learn_where_nothing_is_detached(engine):
    first, second = logits = peers(2)((5,), 7)
    found = fastkd.mutual_kl(logits, temperature=2.0, detach_peers=False, reduction="none")
    both_ways = [
        2 * fastkd.symmetric_kl(a, b.detach(), temperature=2.0, reduction="none")
        for a, b in ((first, second), (second, first))
    ]
    assert_same([found], both_ways[:1])
    assert_same(
        torch.autograd.grad(found.sum(), logits),
        torch.autograd.grad(sum(both_ways).sum(), logits),
    )


def test_networks_that_are_alike_keep_the_digits_of_their_distance(engine):
    """The Z of as many classes is large, and differs by next to nothing."""
    logits = [0.01 * x.detach().float() for x in peers(3)((4,), 1000)]
    exactly = fastkd.mutual_kl([x.double() for x in logits])
    assert abs(fastkd.mutual_kl(logits).double() / exactly - 1) < 3e-6


def test_a_module_has_the_option_of_gradients():
    """Its value is the same, which test_modules.py compares."""
    logits, loss = peers(2)((5,), 7), fastkd.MutualKLLoss()
    detached = torch.autograd.grad(loss(logits), logits)
    loss.detach_peers = False
    expected = torch.autograd.grad(fastkd.mutual_kl(logits, detach_peers=False), logits)
    assert_same(torch.autograd.grad(loss(logits), logits), expected)
    assert not torch.allclose(detached[0], expected[0])


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("detach_peers", [True, False])
@quick_if(lambda n, detach_peers, engine: engine != "triton" or (n, detach_peers) == (2, False))
def test_equal_networks_have_nothing_to_learn(n, detach_peers, engine):
    logits = [x.detach().float() for x in peers(1)((9,), 101)] * n
    logits = [x.clone().requires_grad_() for x in logits]
    loss = fastkd.mutual_kl(logits, detach_peers=detach_peers, reduction="none")
    assert (loss >= 0).all() and loss.max() < 1e-6
    for gradient in torch.autograd.grad(loss.sum(), logits):
        assert gradient.abs().max() < 1e-6
    close = [x.detach() + 1e-4 * i * x.detach().sin() for i, x in enumerate(logits)]
    assert (fastkd.mutual_kl(close, detach_peers=detach_peers, reduction="none") >= 0).all()


@pytest.mark.parametrize("n", [2, 4])
def test_classes_that_are_masked(n, engine):
    """Classes that all exclude contribute nothing; one network cannot learn what it excludes."""
    logits, masked, kept = peers(n)((3,), 6), [1, 4], [0, 2, 3, 5]
    both = [x.detach().clone() for x in logits]
    for x in both:
        x[:, masked] = -torch.inf
        x.requires_grad_()
    fewer = [x.detach()[:, kept].requires_grad_() for x in logits]
    for options in ({}, dict(detach_peers=False)):
        found = gradients(fastkd.mutual_kl(both, **options), both)
        expected = gradients(fastkd.mutual_kl(fewer, **options), fewer)
        assert_same([found[0], *(x[:, kept] for x in found[1:])], expected)
        assert not any(x[:, masked].any() for x in found[1:])
    one = [x.detach().clone() for x in logits]
    one[0][1, 2] = -torch.inf
    one = [x.requires_grad_() for x in one]
    losses = fastkd.mutual_kl(one, reduction="none")
    assert losses.isinf().tolist() == [False, True, False]
    p = [x.detach().softmax(-1) for x in one]
    expected = [p[i] - sum(p[j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
    assert_same(torch.autograd.grad(losses.sum(), one), expected)


@pytest.mark.parametrize("width", [7, 8999])
def test_an_infinite_distance_has_no_gradient_for_a_network_that_learns_from_it(width, engine):
    logits = peers(2)((3,), width)
    logits[0].detach()[1, 4] = -torch.inf
    loss = fastkd.mutual_kl(logits, detach_peers=False, reduction="none")
    of_first, of_second = torch.autograd.grad(loss.sum(), logits)
    assert loss.isposinf().tolist() == [False, True, False]
    assert of_second[1].isnan().all()
    assert of_first.isfinite().all() and of_second[[0, 2]].isfinite().all()


def test_a_row_that_does_not_count_may_hold_anything(engine):
    logits = peers(3)((4,), 6)
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0], device=DEVICE)
    labels = torch.tensor([2, 0, 1, -100], device=DEVICE)
    kept = [0, 2]
    expected = fastkd.mutual_kl([x[kept] for x in logits], weights=weights[kept])
    expected = gradients(expected, logits)
    wrong = [x.detach().clone() for x in logits]
    wrong[1][1, 3], wrong[2][3] = torch.nan, torch.inf
    wrong = [x.requires_grad_() for x in wrong]
    found = fastkd.mutual_kl(wrong, weights=weights, labels=labels)
    assert_same(gradients(found, wrong), expected)
    assert fastkd.mutual_kl(wrong, reduction="none").isnan().tolist() == [False, True, False, True]


def test_a_network_that_is_not_trained_teaches(engine):
    logits = peers(3)((4,), 6)
    _, *expected = gradients(fastkd.mutual_kl(logits), logits)
    logits[1] = logits[1].detach()
    found = torch.autograd.grad(fastkd.mutual_kl(logits), logits[::2])
    assert_same(found, expected[::2])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what a CPU allocates")
def test_no_softmax_and_no_pair_is_kept():
    logits = peers(4)((512,), 2048, torch.float32)

    def peak():
        with PeakMemory() as memory:
            torch.autograd.grad(fastkd.mutual_kl(logits), logits)
        return memory.peak_bytes / logits[0].nbytes

    assert peak() <= 4 + 3  # the gradients, and the buffers of a chunk for each of two threads
    with fastkd.backend("formula"):  # so that the number above means something
        assert peak() >= 20


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, TRITON_INTERPRET=1")
@pytest.mark.parametrize("width", [70, 8192 + 5])
def test_kernels_read_and_write_every_network_once(width):
    """Whatever their number is, and but for the one that learns nothing."""
    logits = [x.detach().bfloat16() for x in peers(3)((2,), width)]
    learning = [x.requires_grad_() for x in logits[::2]]
    weights = torch.tensor([1.0, 0.0])
    with fastkd.backend("triton"), Meter() as meter:
        torch.autograd.grad(fastkd.mutual_kl(logits, weights=weights), learning)
    of_one = logits[0].nbytes
    assert len(meter.launches) == 2 and not meter.races
    for launch in meter.launches:
        for k in range(3):
            assert launch.arguments[f"networks.{k}.ptr"].loaded == of_one // 2  # of one of two rows
    written = {name: x.stored for name, x in meter.launches[1].arguments.items() if x.stored}
    assert written == {"gradients.0.ptr": of_one, "gradients.1.ptr": of_one}


@pytest.mark.parametrize("detach_peers", [True, False])
@quick_if(lambda detach_peers, engine: engine == "triton")
def test_long_rows_of_a_certain_network(detach_peers, engine):
    """The gradient of the certain class is minus the sum of the others, to the last digit."""
    logits = [x.detach().float() for x in peers(2)((2,), 8192 + 5)]
    logits[0][0, 4100] = logits[1][1, 8196] = 60.0
    logits = [x.requires_grad_() for x in logits]
    found = gradients(fastkd.mutual_kl(logits, detach_peers=detach_peers), logits)
    with fastkd.backend("formula"):
        exact = [x.detach().double().requires_grad_() for x in logits]
        exact = gradients(fastkd.mutual_kl(exact, detach_peers=detach_peers), exact)
    assert_same(found, [x.float() for x in exact], 1e-5)


@pytest.mark.parametrize(
    "logits, error, words",
    [
        (torch.zeros(2, 3, 4), TypeError, r"got Tensor: one tensor of all networks is .unbind"),
        ([torch.zeros(3, 4)], ValueError, r"2 or more networks, got 1: one network has nobody"),
        ([torch.zeros(3, 4), [0.0]], TypeError, r"logits\[1\] must be a tensor .* got list"),
        ([torch.zeros(3, 4), torch.ones(3, 4).long()], TypeError, r"logits\[1\] must hold float"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], ValueError, r"\[3, 4\] in logits\[0\] and \[3, 5"),
        ([torch.zeros(()), torch.zeros(())], ValueError, r"logits\[0\] needs the shape \(..., V\)"),
    ],
)
def test_what_are_no_peers_is_refused(logits, error, words):
    with pytest.raises(error, match=words):
        fastkd.mutual_kl(logits)
    with pytest.raises(ValueError, match="labels need one class for each row"):
        fastkd.mutual_kl([torch.zeros(3, 4)] * 2, labels=torch.zeros(4).long())

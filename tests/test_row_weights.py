"""Gradients that the forward makes because it knows what the losses are multiplied by."""

import numpy as np
import pytest
import torch
from choice import quick_if
from inputs import DEVICE, INTERPRETED, normal
from torch.utils.checkpoint import checkpoint

import fastkd

if not INTERPRETED:
    pytest.skip("counted in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from meter import Meter

N, V = 6, 40
KNOWN = [dict(reduction="mean"), dict(reduction="sum"), dict(reduction="mean", normalizer=7)]
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]


@pytest.fixture(autouse=True)
def triton():
    with fastkd.backend("triton"):
        yield


def logits(dtype=torch.bfloat16, shape=(N, V)):
    # nobody is certain of a class, because the gradient of those that are is summed anew
    student, teacher = (normal(*shape, seed=seed) for seed in (0, 1))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def bytes_of(meter, n):
    """Return the bytes of logits and gradients for each of n entries."""
    moved = sum(
        argument.loaded + argument.stored
        for launch in meter.launches
        for name, argument in launch.arguments.items()
        if any(word in name for word in ("student", "teacher", "gradient"))
    )
    return moved / n


def moved_by(inputs, upstream=1.0, loss=fastkd.forward_kl, **options):
    """Return the bytes for each entry of the forward and of the backward."""
    n = inputs[0].numel()
    with Meter() as forward:
        found = loss(*inputs, **options)
    with Meter() as backward:
        torch.autograd.grad(found, inputs[0], torch.full_like(found, upstream))
    assert not forward.races and not backward.races
    return bytes_of(forward, n), bytes_of(backward, n)


def by_backward(name, student, teacher, upstream, **reduction):
    """Return the gradient of rows whose weight is not known beforehand."""
    losses = getattr(fastkd, name)(student, teacher, reduction="none")
    divisor = 1 if reduction["reduction"] == "sum" else reduction.get("normalizer", N)
    return torch.autograd.grad(losses, student, torch.full_like(losses, upstream / divisor))[0]


@pytest.mark.parametrize("options", KNOWN, ids=str)
def test_six_bytes_an_entry_where_the_upstream_is_1(options):
    assert moved_by(logits(), **options) == (6, 0)
    assert moved_by(logits(), 0.5, **options) == (6, 6)


def test_a_normalizer_of_numpy_is_a_number():
    assert moved_by(logits(), normalizer=np.int64(1)) == (6, 0)


def test_ten_bytes_where_the_weight_of_a_row_is_not_known():
    weights = torch.ones(N)
    normalizer = torch.tensor(3.0)
    for options in (
        dict(reduction="none"),
        dict(weights=weights),
        dict(reduction="mean", normalizer=normalizer),
    ):
        assert moved_by(logits(), **options) == (4, 6)
    assert moved_by(logits(torch.float16)) == (4, 6)  # its losses are scaled
    labels = torch.zeros(N, dtype=torch.int64)
    forward, backward = moved_by([*logits(), labels], loss=fastkd.kd)
    assert (round(forward), round(backward)) == (4, 6)  # and the logits of the labels


def test_a_forward_without_a_gradient_pays_for_none():
    student, teacher = logits()
    for needs_grad, mode in ((True, torch.no_grad), (False, torch.enable_grad)):
        with Meter() as meter, mode():
            fastkd.forward_kl(student.detach().requires_grad_(needs_grad), teacher)
        assert bytes_of(meter, student.numel()) == 4


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("options", KNOWN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@quick_if(
    lambda name, options, dtype: (
        dtype == torch.bfloat16 and (name == "forward_kl" or options == KNOWN[0])
    )
)
def test_every_upstream_gives_what_a_backward_gives(name, options, dtype):
    student, teacher = logits(dtype)
    for upstream in (1.0, 0.3, -2.0, 0.0):
        loss = getattr(fastkd, name)(student, teacher, **options)
        (found,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
        expected = by_backward(name, student, teacher, upstream, **options)
        epsilon = torch.finfo(dtype).eps if upstream != 1 else 0  # upstream / N is rounded
        torch.testing.assert_close(found, expected, rtol=epsilon, atol=0)


def test_every_backward_of_a_graph_has_a_gradient_of_its_own():
    student, teacher = logits(torch.float32)
    loss = fastkd.forward_kl(student, teacher)
    (expected,) = torch.autograd.grad(fastkd.forward_kl(student, teacher), student)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(first, expected)
    first.mul_(7)  # whoever has it may write over it
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, device=DEVICE))
    torch.testing.assert_close(student.grad, 3 * expected)
    torch.testing.assert_close(first, 7 * expected)


def test_several_losses_of_one_student():
    student, teacher = logits(torch.float32)
    loss = fastkd.forward_kl(student, teacher) + 0.5 * fastkd.reverse_kl(student, teacher)
    (found,) = torch.autograd.grad(loss, student)
    parts = [
        torch.autograd.grad(getattr(fastkd, name)(student, teacher), student)[0]
        for name in ("forward_kl", "reverse_kl")
    ]
    torch.testing.assert_close(found, parts[0] + 0.5 * parts[1])


def test_an_upstream_of_0_wins_over_a_nan():
    student, teacher = logits()
    student.detach()[2, 3] = torch.nan
    losses = fastkd.forward_kl(student, teacher, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, student, torch.zeros_like(losses))
    assert not gradient.any()


def test_any_layout_of_the_student():
    plain, teacher = logits(torch.float32, (2, 3, V))
    (expected,) = torch.autograd.grad(fastkd.forward_kl(plain, teacher), plain)
    room = torch.zeros(2, 4, V + 3)
    for student in (room[:, 1:, 2:-1], torch.zeros(V, 3, 2).permute(2, 1, 0)):
        student.copy_(plain.detach())
        student.requires_grad_()
        (found,) = torch.autograd.grad(fastkd.forward_kl(student, teacher), student)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_transforms_give_the_same():
    student, teacher = logits(torch.float32)
    (expected,) = torch.autograd.grad(fastkd.forward_kl(student, teacher), student)
    found = torch.func.grad(fastkd.forward_kl)(student.detach(), teacher)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()
    compiled = torch.compile(fastkd.forward_kl, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(found, expected)
    (found,) = torch.autograd.grad(fastkd.forward_kl(student, teacher), student, create_graph=True)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="Double backward"):
        torch.autograd.grad(found.sum(), student)


@pytest.mark.parametrize("saved", ["checkpointed", "offloaded"])
def test_no_gradient_is_kept_where_saved_tensors_go_elsewhere(saved):
    """The backward makes it then, so that chunks that are computed again keep nothing."""
    inputs = logits()

    def loss(student, teacher):
        with fastkd.backend("triton"):
            return fastkd.forward_kl(student, teacher)

    with Meter() as forward:
        if saved == "checkpointed":
            found = checkpoint(loss, *inputs, use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                found = loss(*inputs)
    assert bytes_of(forward, N * V) == 4
    expected = by_backward("forward_kl", *inputs, 1.0, reduction="mean")
    torch.testing.assert_close(torch.autograd.grad(found, inputs[0])[0], expected)

"""How results are compared: with the truth in float64, by the error of eager PyTorch."""

from collections.abc import Callable, Sequence

import torch
from cases import Case
from inputs import normal
from torch import Tensor

import fastkd

SUBNORMAL = 1e-37  # what is smaller may be flushed to 0
HALVES = (torch.bfloat16, torch.float16)


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the losses, and the gradients under a random upstream of order one."""
    losses = function(*inputs)
    trained = [x for x in inputs if x.requires_grad]
    upstream = normal(*losses.shape, dtype=losses.dtype, seed=99)
    return [losses.detach(), *torch.autograd.grad(losses, trained, upstream)]


def by_formula(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    with fastkd.backend("formula"):
        return results(function, inputs)


def in_dtype(dtype: torch.dtype, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    return in_dtype(torch.float64, inputs)


def assert_as_exact(
    found: Sequence[Tensor], yardstick: Sequence[Tensor], truth: Sequence[Tensor], times: float = 2
) -> None:
    """Allow at most twice the error of the yardstick, with a slack of 1e-6 of the largest truth.

    Rounding to half precision is compared element by element. The noise of float32 differs from
    one order of summation to the next: there each element may err as much as the worst one.
    """
    for x, eager, true in zip(found, yardstick, truth, strict=True):
        assert x.shape == true.shape
        if not x.numel():
            continue
        error, allowed = (x.double() - true).abs(), (eager.double() - true).abs()
        slack = (1e-12 if x.dtype == torch.float64 else 1e-6) * true.abs().max() + SUBNORMAL
        most = times * (allowed.max() if x.element_size() > 2 else allowed) + slack
        worst = (error - most).argmax()
        assert (error <= most).all(), (
            f"element {int(worst)} is {x.flatten()[worst]}, eager {eager.flatten()[worst]}, "
            f"truly {true.flatten()[worst]}"
        )
        assert error.norm() <= times * allowed.norm() + slack, (
            f"off by {error.norm():.1e}, eager by {allowed.norm():.1e} of {true.norm():.1e}"
        )


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance=1e-12) -> None:
    """Allow a part of the largest number: infinities and NaN must be in the same places."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        x, y = x.detach().double(), y.detach().double()
        size = y[y.isfinite()].abs().amax() if y.isfinite().any() else torch.tensor(0.0)
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(size), equal_nan=True)


def assert_exact(
    case: Case, inputs: Sequence[Tensor], times: float = 2, rounds_halves: bool = False, **options
) -> None:
    """Measure losses and gradients against float64 by the error of the formula in the same dtype.

    An engine that `rounds_halves` weighs embeddings in half precision, as attention does on a GPU:
    one more rounding of their gradients.
    """

    def found(*xs):
        return case(*xs, **options)

    if case.problem == "relations":  # whose law of cosines rounds about twice as much
        truth, times = by_formula(found, exact(inputs)), 2 * times
    else:
        truth = results(lambda *xs: case.truth(*xs, **options), exact(inputs))
    if case.name == "dino":  # which rounds elsewhere than its formula, as people do
        wide = in_dtype(inputs[2].dtype, inputs)
        yardstick = in_dtype(inputs[0].dtype, results(case.truth, wide))
        yardstick[0] = results(case.truth, wide)[0]
    else:
        yardstick = by_formula(found, inputs)
    if case.problem == "pairs":
        # how one number is rounded is luck: the worst of some orders of features and examples
        with fastkd.backend("formula"):
            losses = [found(*reordered(inputs, shift)).detach() for shift in range(8)]
        yardstick[0] = max(losses, key=lambda loss: float((loss.double() - truth[0]).abs()))
    losses, *gradients = results(found, inputs)
    if rounds_halves and case.problem in ("pairs", "tokens") and inputs[0].dtype in HALVES:
        assert_as_exact([losses], yardstick[:1], truth[:1], times)
        for x, true in zip(gradients, truth[1:], strict=True):
            # the smallest numbers of a dtype lie eps · tiny from each other
            info = torch.finfo(x.dtype)
            assert (x.double() - true).abs().max() <= info.eps * (true.abs().max() + info.tiny)
    else:
        assert_as_exact([losses, *gradients], yardstick, truth, times)


def reordered(inputs: Sequence[Tensor], shift: int) -> list[Tensor]:
    n = len(inputs[0])
    moved = [x.roll(shift, 1) if x.is_floating_point() else x for x in inputs]
    return [x.roll(5 * shift, 0) if len(x) == n else x for x in moved]

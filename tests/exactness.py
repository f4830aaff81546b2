"""How results are compared: with the truth in float64, by the error of eager PyTorch."""

from collections.abc import Callable, Sequence

import torch
from losses import normal
from torch import Tensor

SUBNORMAL = 1e-37  # what is smaller may be flushed to 0


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The losses, and the gradients under a random upstream of order one."""
    losses = function(*inputs)
    trained = [x for x in inputs if x.requires_grad]
    upstream = normal(*losses.shape, dtype=losses.dtype, seed=99)
    return [losses.detach(), *torch.autograd.grad(losses, trained, upstream)]


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
    """At most twice the error of the yardstick, with a slack of 1e-6 of the largest truth.

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
    """Equal to a part of the largest number: infinities and NaN in the same places."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        x, y = x.detach().double(), y.detach().double()
        size = y[y.isfinite()].abs().amax() if y.isfinite().any() else torch.tensor(0.0)
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(size), equal_nan=True)

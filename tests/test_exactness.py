"""The bounds of exactness.py admit what is rounded correctly, and nothing much worse."""

import pytest
import torch
from exactness import assert_exact
from inputs import normal

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Scaled:
    """The loss size · Σ x, whose gradient is rounded once."""

    problem, name = "pairs", "scaled"

    def __init__(self, size):
        self.size = size

    def __call__(self, x):
        return (x.double() * self.size).sum()

    truth = __call__


@HALVES
@pytest.mark.parametrize("size", [3.0, 7e-6, 3e-8, 1e-9])  # normal in float16, subnormal, and 0
def test_gradients_that_are_rounded_once_pass(dtype, size):
    assert_exact(Scaled(size), [normal(5, 4, dtype=dtype).requires_grad_()], rounds_halves=True)


@HALVES
@pytest.mark.parametrize("size", [3.0, 7e-4])
def test_gradients_that_are_wrong_by_more_fail(dtype, size):
    x = normal(5, 4, dtype=dtype).requires_grad_()
    x.register_hook(lambda gradient: gradient * 1.04)
    with pytest.raises(AssertionError):
        assert_exact(Scaled(size), [x], rounds_halves=True)

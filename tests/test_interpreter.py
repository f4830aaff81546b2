"""The interpreter, once corrected, agrees with torch."""

import math

import pytest
import torch
import triton
import triton.language as tl

EDGES = torch.tensor(
    [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.3e38, -3.4e38, 1e-40, math.inf, -math.inf, math.nan]
)
LARGEST_NANS = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)


@triton.jit
def _copy(source_ptr, target_ptr, n, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + i, mask=i < n)
    if ROUNDING is not None:
        x = x.to(target_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(target_ptr + i, x, mask=i < n)


@triton.jit
def _arithmetic(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, -x)
    tl.store(out_ptr + 4 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 5 * N + i, 1.5 * x)
    tl.store(out_ptr + 6 * N + i, tl.fma(x, y, tl.load(z_ptr + i)))


@triton.jit
def _dot(x_ptr, y_ptr, out_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    tile = i[:, None] * 32 + i[None, :]
    product = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile), input_precision=PRECISION)
    tl.store(out_ptr + tile, product)


@triton.jit
def _extremes(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, y))
    tl.store(out_ptr + N + i, tl.minimum(x, y))
    tl.store(out_ptr + 2 * N, tl.max(x, 0))
    tl.store(out_ptr + 2 * N + 1, tl.min(x, 0))


WIDE = torch.cat([EDGES, LARGEST_NANS, torch.randn(1000)])
FLOATS = [torch.float32, torch.float16, torch.float64]
CASTS = [(WIDE.to(source), torch.bfloat16) for source in FLOATS]
CASTS += [(torch.randn(1024).to(torch.float8_e5m2), torch.bfloat16)]
CASTS += [(100 * torch.randn(1024).bfloat16(), target) for target in (*FLOATS, torch.int32)]


@pytest.mark.parametrize("values, target", CASTS, ids=lambda x: str(getattr(x, "dtype", x)))
def test_casts_are_those_of_torch(values, target):
    result = torch.empty(values.numel(), dtype=target)
    _copy[(1,)](values, result, values.numel(), 1024, None)
    torch.testing.assert_close(result, values.to(target), rtol=0, atol=0, equal_nan=True)


def test_a_cast_that_asks_for_truncation_truncates():
    values, result = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
    _copy[(1,)](values, result, 1024, 1024, "rtz")
    cut = values.view(torch.int32) & -0x10000
    assert torch.equal(result.float(), cut.view(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOATS])
def test_arithmetic_is_that_of_torch_and_fma_rounds_once(dtype):
    x, y = torch.randn(2, 256).to(dtype)
    z = -(x * y)  # what is left is the error of the product: all lost if the product is rounded
    result = torch.empty(7, 256, dtype=dtype)
    _arithmetic[(1,)](x, y, z, result, N=256)
    expected = torch.stack([x + y, x - y, x * y, -x, torch.minimum(x, y), 1.5 * x])
    assert torch.equal(result[:-1], expected)
    error = x.double() * y.double() + z.double()
    assert torch.equal(result[-1], error.to(dtype))
    assert dtype == torch.float64 or error.count_nonzero() > 100


@pytest.mark.parametrize(
    "dtype, precision, least, most",
    [
        (torch.bfloat16, "ieee", 0, 1e-6),
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32", 5e-4, 1e-3),
    ],
)
def test_dots_have_the_precision_of_their_operands(dtype, precision, least, most):
    x, y = torch.randn(2, 32, 32).to(dtype)
    result = torch.empty(32, 32)
    _dot[(1,)](x, y, result, PRECISION=precision)
    truth = x.double() @ y.double()
    error = float((result - truth).norm() / truth.norm())
    assert least <= error <= most


def test_dots_round_once_wherever_an_element_stands():
    """BLAS rounds elements at the edge of its own tiles differently, on some machines."""
    x, y = torch.randint(-(2**24), 2**24, (2, 32, 32)).float()
    result = torch.empty(32, 32)
    _dot[(1,)](x, y, result, PRECISION="ieee")
    assert torch.equal(result, (x.double() @ y.double()).float())  # a sum that float64 holds


def test_maximum_and_minimum_return_the_number_beside_a_nan():
    x = torch.tensor([math.nan, 1.0, math.nan, -3.0])
    y = torch.tensor([2.0, math.nan, math.nan, -4.0])
    result = torch.empty(10)
    _extremes[(1,)](x, y, result, N=4)
    expected = [2.0, 1.0, math.nan, -3.0, 2.0, 1.0, math.nan, -4.0, 1.0, -3.0]
    torch.testing.assert_close(result, torch.tensor(expected), equal_nan=True)

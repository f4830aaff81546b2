"""Device code that reads rows: their numbers, where they lie, and their vectors.

A row is read in vectors of 16 bytes that lie on their boundary, whatever its start and length; what
remains at its two ends is read by elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.rows.terms import Units
from fastkd.kernels.tiles import (
    INFINITY,
    LOG2E,
    at_boundary,
    head_of,
    log2_units,
    number,
    row_offset,
)


class Numbers(NamedTuple):
    """The numbers of a problem: by value, or all of them as pointers to one element."""

    student_temperature: float | Tensor
    teacher_temperature: float | Tensor
    weight: float | Tensor
    scale: float | Tensor
    row_weight: float | Tensor
    label_smoothing: float | Tensor | None  # None where labels are not smooth


class Strides(NamedTuple):
    """Strides of logits and of upstream gradients, in elements; 0 for what is not there.

    They follow all pointers, because other orders of the parameters cost registers.
    """

    student_outer: int
    student_inner: int
    teacher_outer: int
    teacher_inner: int
    gradient_outer: int
    gradient_inner: int
    upstream: int
    ce_upstream: int


class Pointers(NamedTuple):
    """Pointers into the same row of both networks, to its first boundary."""

    student: tl.tensor
    teacher: tl.tensor
    apart: tl.tensor  # the column, counted from there, of the class that is set apart


class Span(NamedTuple):
    """The vectors [start, end) of a row of n_cols elements, of which `head` precede vector 0."""

    start: tl.tensor
    end: tl.tensor
    head: tl.tensor
    n_cols: tl.tensor


@triton.jit
def temperature_of(
    temperature, row, PER_ROW: tl.constexpr, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the temperature of a row, or PER_ROW of several that exist."""
    if PER_ROW:
        found = tl.load(temperature + row).to(DTYPE)
    else:
        found = number(temperature, ON_DEVICE, DTYPE)
    return found


@triton.jit
def units_of(
    numbers, row, PER_ROW: tl.constexpr, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    student = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    teacher = temperature_of(numbers.teacher_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    return Units(log2_units(student, DTYPE), log2_units(teacher, DTYPE), tl.full([], LOG2E, DTYPE))


@triton.jit
def smoothing_of(numbers, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr):
    """Return what labels are smoothed with, None if they are not."""
    found = None
    if numbers.label_smoothing is not None:
        found = number(numbers.label_smoothing, ON_DEVICE, DTYPE)
    return found


@triton.jit
def load_logits(
    rows, columns, mask, DIVERGENCE: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return the logits of both networks, −∞ outside the mask and of the class set APART."""
    fill = None if mask is None else -INFINITY
    x = tl.load(rows.student + columns, mask=mask, other=fill).to(DTYPE)
    y = x
    if DIVERGENCE != "":
        y = tl.load(rows.teacher + columns, mask=mask, other=fill).to(DTYPE)
    return without_apart(x, y, rows, columns, APART)


@triton.jit
def without_apart(x, y, rows, columns, APART: tl.constexpr):
    """Return logits that are −∞ of the class set APART."""
    if APART:
        x = tl.where(columns == rows.apart, -INFINITY, x)
        y = tl.where(columns == rows.apart, -INFINITY, y)
    return x, y


@triton.jit
def vectors(start, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] of the vectors from `start`, relative to the first boundary."""
    return (start + tl.arange(0, THREADS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def edges(head, n_cols, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns [R, K] before the first and after the last boundary, and their mask."""
    thread, k = tl.arange(0, THREADS)[:, None], tl.arange(0, WIDTH)[None, :]
    end = (n_cols - head) // WIDTH * WIDTH
    columns = tl.where(thread == 0, k - head, end + k)
    before, after = (thread == 0) & (k < head), (thread == 1) & (end + k < n_cols - head)
    return columns, before | after


@triton.jit
def has_edges(span, WIDTH: tl.constexpr):
    """Return whether the span starts its row, which then has edges to be read with it."""
    return (span.start == 0) & (span.n_cols % WIDTH + span.head > 0)


@triton.jit
def pointers_of(
    row, student, teacher, apart_ptr, n_cols, inner, CONGRUENT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the Pointers to a row, and how many of its elements precede its first boundary."""
    student_row = student.ptr + row_offset(row, inner, student)
    head = head_of(student_row, n_cols, WIDTH)
    apart = tl.load(apart_ptr + row).to(tl.int64) if apart_ptr is not None else -1
    rows = Pointers(
        at_boundary(student_row, head, True),
        at_boundary(teacher.ptr, row_offset(row, inner, teacher) + head, CONGRUENT),
        apart - head,
    )
    return rows, head

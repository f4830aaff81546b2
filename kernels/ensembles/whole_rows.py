"""The kernel of rows that stay on chip, with all their teachers.

A program reads its rows of the student and, one after the other, of the K teachers, and makes of
them the losses, the gradient or both. Bytes for each (row, entry) of bfloat16: 2 K + 2 read and,
with the gradient, 2 written; of chosen rows 4 read, whatever K is.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.ensembles.tiles import (
    Committee,
    join,
    teacher_tile,
    weights_of_rows,
)
from fastkd.kernels.rows.on_chip import with_certain
from fastkd.kernels.rows.reading import Pointers
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    add_products,
    is_certain,
    kl_value,
    mixture,
    mixture_value,
    slope,
)
from fastkd.kernels.tiles import INFINITY, log2, log2_units, number, row_offset, rows_of_each


class Strides(NamedTuple):
    """Strides in elements of what the kernels take by pointer, 0 for what is not there."""

    gradient_outer: int
    gradient_inner: int
    upstream: int
    weights: int  # from row to row
    weights_of_teacher: int


@triton.jit
def _mixture_of_rows(
    of, columns, inside, LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return log2 Σ w p of whole rows of a Committee, whose softmaxes are not known yet."""
    for k in tl.static_range(len(of.rows)):
        z = tl.load(of.rows[k] + columns, inside & (of.shares[k] != 0), -INFINITY).to(DTYPE)
        above = (z - tl.maximum(tl.max(z, 1), LOWEST)[:, None]) * of.unit
        e = tl.exp2(above)
        # selected, because a teacher that is not read has no Z
        each = tl.where(of.shares[k] == 0, 0.0, of.shares[k] / tl.sum(e, 1)[:, None])
        part = above + log2(each, FAST) if LOGS else e * each
        if k == 0:
            found = part
        else:
            found = join(found, part, LOGS, FAST)
    return found if LOGS else log2(found, FAST)


@triton.jit
def _of_teacher(
    y, unit, ds, zs, weight, DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return dt of a teacher's rows, their value in nats, Z, and Σ q·v."""
    dt = (y - tl.maximum(tl.max(y, 1), LOWEST)[:, None]) * unit
    et = tl.exp2(dt)
    zt = tl.sum(et, 1)
    if IS_MIXTURE:
        summand, q, v = mixture(ds, dt, zs[:, None], zt[:, None], weight, DIVERGENCE, FAST)
        value, slope_sum = mixture_value(
            tl.sum(summand, 1), tl.sum(q * v, 1), zs, zt, weight, DIVERGENCE
        )
    else:
        a, b = add_products(
            tl.zeros_like(zs), tl.zeros_like(zs), ds, dt, tl.exp2(ds), et, DIVERGENCE
        )
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
    return dt, value, zt, slope_sum


@triton.jit(do_not_specialize=["n_rows", "inner"])
def whole_ensembles(
    student,  # Strided (n_rows, n_cols)
    teachers,  # K of Strided (n_rows, n_cols)
    weights_ptr,  # (n_rows, K), of the teachers, or None for 1 / K
    index_ptr,  # (n_rows,), of the chosen teachers, or None
    row_mask_ptr,  # (n_rows,) or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    losses_ptr,  # (n_rows,); None: the gradient alone
    gradient_ptr,  # (n_rows, n_cols), written; None: the losses alone
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # rows.sweeps.Numbers
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, IS_MIXTURE: tl.constexpr,
    LOGS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Compute the losses, the gradient or both of ROWS rows: program (block of rows).

    Rows that do not count are not read. A gradient without upstream gradients is that for the row
    weight; WEIGHED, it is there already, and rows with this upstream gradient are left alone.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    row_weight = number(numbers.row_weight, ON_DEVICE, DTYPE)
    if WEIGHED:
        places = upstream_ptr + rows.to(tl.int64) * strides.upstream
        differs = exists & (tl.load(places, exists, 0.0).to(DTYPE) != row_weight)
        if tl.sum(differs.to(tl.int32), 0) == 0:
            return
    counts = exists
    if row_mask_ptr is not None:
        counts = tl.load(row_mask_ptr + rows, exists, 0) != 0
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    of_student = number(numbers.student_temperature, ON_DEVICE, DTYPE)
    of_teacher = number(numbers.teacher_temperature, ON_DEVICE, DTYPE)
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = counts[:, None] & (columns < n_cols)
    column = rows[:, None]
    teacher_rows = rows_of_each(teachers, column, inner, 0, ALIGNMENT)
    shares = weights_of_rows(
        weights_ptr, column, counts[:, None], strides.weights, strides.weights_of_teacher,
        len(teachers), COMBINE == "mixture", DTYPE,
    )  # fmt: skip
    index = -1
    if index_ptr is not None:
        index = tl.load(index_ptr + column, counts[:, None], -1).to(tl.int64)
    unit = log2_units(of_teacher, DTYPE)
    of = Committee(teacher_rows, shares, shares, shares, index, unit)
    if COMBINE == "mixture":
        y = _mixture_of_rows(of, columns, inside, LOGS, DTYPE, FAST)
        unit = tl.full([], 1, DTYPE)

    student_rows = student.ptr + row_offset(rows, inner, student)[:, None] // ALIGNMENT * ALIGNMENT
    x = tl.load(student_rows + columns, inside, -INFINITY).to(DTYPE)
    ms = tl.maximum(tl.max(x, 1), LOWEST)
    ds = (x - ms[:, None]) * log2_units(of_student, DTYPE)
    zs = tl.sum(tl.exp2(ds), 1)
    certain = is_certain(zs, zs, zs, False)
    for k in tl.static_range(len(teachers) if COMBINE == "sum" else 1):
        if COMBINE != "mixture":
            y = teacher_tile(of, columns, inside, k, COMBINE, DTYPE)
        dt, of_term, zt, slope_sum = _of_teacher(
            y, unit, ds, zs, weight, DIVERGENCE, IS_MIXTURE, FAST
        )
        row = Statistics(
            ms[:, None], zs[:, None], zs[:, None], zt[:, None], slope_sum[:, None], zs[:, None],
            zs[:, None],
        )  # fmt: skip
        if gradient_ptr is not None:
            by_log_q = slope(ds, dt, row, weight, DIVERGENCE, FAST)
        if COMBINE == "sum":
            share = tl.max(shares[k], 1)  # the column's one
            of_term = tl.where(share == 0, 0.0, share * of_term)
            certain &= (share == 0) | (zt > 0)
            if gradient_ptr is not None:
                by_log_q = tl.where(shares[k] == 0, 0.0, shares[k] * by_log_q)
        else:
            certain &= zt > 0
        if k == 0:
            value = of_term
            if gradient_ptr is not None:
                slopes = by_log_q
        else:
            value += of_term
            if gradient_ptr is not None:
                slopes += by_log_q

    if losses_ptr is not None:
        tl.store(losses_ptr + rows, tl.where(counts, value * scale, 0.0), exists)
    if gradient_ptr is not None:
        factor = tl.zeros([ROWS], DTYPE) + scale / of_student
        if upstream_ptr is None:
            factor *= row_weight
        else:
            places = upstream_ptr + rows.to(tl.int64) * strides.upstream
            factor *= tl.load(places, exists, 0.0).to(DTYPE)
        factor = tl.where(counts, factor, 0.0)[:, None]
        slopes = tl.where(factor == 0, 0.0, slopes * factor)  # a factor of 0 wins over a NaN
        pointers = Pointers(student_rows, student_rows, -1)
        slopes = with_certain(slopes, pointers, columns, inside, certain, ms, False)
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_rows = row_offset(rows, inner, gradient) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_ptr + gradient_rows[:, None] + columns,
            slopes.to(gradient_ptr.dtype.element_ty),
            mask=exists[:, None] & (columns < n_cols),
        )

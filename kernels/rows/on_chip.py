"""The kernel of rows that stay on chip: their losses, their gradient or both, by whole rows.

The gradient in a logit is factor · (h − q Σ h), with sums of its own. For each entry of bf16 logits
it moves 6 bytes.
"""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided
from fastkd.kernels.rows.gradients import Factors, row_factors, slopes_of
from fastkd.kernels.rows.labels import (
    Spread,
    Target,
    cross_entropy,
    label_of,
    label_slopes,
    load_shares,
    own_of,
    spread_of,
)
from fastkd.kernels.rows.reading import (
    Pointers,
    load_logits,
    smoothing_of,
    temperature_of,
    units_of,
)
from fastkd.kernels.rows.standardized import (
    EPSILON,
    moments_of_whole,
    slopes_of_whole,
    standardized,
)
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    add_products,
    among_others,
    decoupled,
    entry_of,
    is_certain,
    kl_value,
    log2_odds,
    mixture,
    mixture_value,
    without_others,
)
from fastkd.kernels.tiles import INFINITY, number, row_offset


@triton.jit
def _is_top(rows, columns, mask, pivots, APART: tl.constexpr):
    """Return where the student's logits are these pivots; they are read anew, from the cache.

    Kept from where they were read first, they would take registers of rows that need no look.
    """
    logits = tl.load(rows.student + columns, mask, -INFINITY)
    is_top = logits == pivots.to(logits.dtype)
    return is_top & (columns != rows.apart) if APART else is_top


@triton.jit
def with_certain(slopes, rows, columns, mask, certain, ms, APART: tl.constexpr):
    """Return the slopes of rows, in which a certain class has minus the sum of the others."""
    if tl.max(certain.to(tl.int32), 0) != 0:
        # a row of −∞ has no top, but its pivot would be −∞ in float16
        pivots = tl.where(certain & (ms > LOWEST), ms, INFINITY)[:, None]
        is_top = _is_top(rows, columns, mask, pivots, APART)
        others = tl.sum(tl.where(is_top, 0.0, slopes), 1)
        slopes = tl.where(is_top, -others[:, None], slopes)
    return slopes


@triton.jit
def _others_of_rows(
    rows, certain, exists, n_cols, units, row, weight, factors,
    DIVERGENCE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the sums of the gradients of rows without their tops, and these, −1 if uncertain.

    They are read anew in narrow tiles, which take few registers.
    """
    # without min and max, which make a tensor of constants in Triton 3.4
    QUARTER: tl.constexpr = COLUMNS // 4 if COLUMNS >= 4 else 1
    NARROW: tl.constexpr = QUARTER if QUARTER < 1024 else 1024
    sums, tops = tl.zeros([ROWS, NARROW], DTYPE), tl.full([ROWS, NARROW], -1, tl.int32)
    for start in range(0, n_cols, NARROW):
        columns = start + tl.arange(0, NARROW)[None, :]
        x, y = load_logits(rows, columns, exists & (columns < n_cols), DIVERGENCE, False, DTYPE)
        gradient = slopes_of(
            x, y, columns < 0, units, row, weight, factors, DIVERGENCE, False, FAST
        )
        sums += tl.where(x == row.ms, 0.0, gradient)
        tops = tl.where(x == row.ms, columns, tops)
    return tl.sum(sums, 1), tl.max(tl.where(certain, tops, -1), 1)


@triton.jit(do_not_specialize=["n_rows", "inner"])
def whole_rows(
    student_ptr,  # (n_rows, n_cols)
    teacher_ptr,  # (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    upstream_ptr,  # (n_rows,) of the losses, or None
    ce_upstream_ptr,  # (n_rows,) of the cross-entropies, or None
    losses_ptr,  # (n_rows,); None: the gradient alone
    cross_entropies_ptr,  # (n_rows,); None without losses_ptr or without labels
    gradient_ptr,  # (n_rows, n_cols), written; None: the losses alone
    n_rows,
    n_cols,
    inner,  # size of the logits' last dimension but one
    strides,  # Strides
    numbers,  # Numbers
    soft,  # Strided (n_rows, n_cols), soft labels, or None
    class_weights,  # Strided (n_rows, n_cols), whose rows are one, or None
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    IS_STANDARDIZED: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, IN_PLACE: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Compute the losses, the gradient or both of ROWS rows, which are read once and stay on chip.

    ALIGNMENT divides n_cols and the start of every row. A gradient without upstream gradients is
    that for the row weight; WEIGHED, it is there already, and rows with this upstream gradient are
    left alone. IN_PLACE it is written over the student.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    row_weight = number(numbers.row_weight, ON_DEVICE, DTYPE)
    if WEIGHED:
        places = upstream_ptr + rows.to(tl.int64) * strides.upstream
        differs = exists & (tl.load(places, exists, 0.0).to(DTYPE) != row_weight)
        if tl.sum(differs.to(tl.int32), 0) == 0:
            return
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    # a column where each row has its own, so that it divides a tile of logits
    own = tl.where(exists, rows, 0)[:, None] if PER_ROW else 0
    temperature = temperature_of(numbers.student_temperature, own, PER_ROW, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    units = units_of(numbers, own, PER_ROW, ON_DEVICE, DTYPE)
    LABELS: tl.constexpr = (labels_ptr is not None) or (soft is not None)
    APART: tl.constexpr = apart_ptr is not None
    n_cols = n_cols // ALIGNMENT * ALIGNMENT  # unchanged; tells the compiler what divides it
    columns = tl.arange(0, COLUMNS)[None, :]
    student = Strided(student_ptr, strides.student_outer, strides.student_inner)
    teacher = Strided(teacher_ptr, strides.teacher_outer, strides.teacher_inner)
    student_rows = row_offset(rows, inner, student) // ALIGNMENT * ALIGNMENT
    teacher_rows = row_offset(rows, inner, teacher) // ALIGNMENT * ALIGNMENT
    inside = exists[:, None] & (columns < n_cols)
    apart = tl.load(apart_ptr + rows, exists, 0).to(tl.int64)[:, None] if APART else -1
    pointers = Pointers(
        student_ptr + student_rows[:, None], teacher_ptr + teacher_rows[:, None], apart
    )
    if IS_STANDARDIZED:
        x, y = load_logits(pointers, columns, inside, DIVERGENCE, False, DTYPE)
        moments = moments_of_whole(x)
        temperature *= moments.deviation + EPSILON
        units = standardized(units, moments.deviation, moments_of_whole(y).deviation)
    x, y = load_logits(pointers, columns, inside, DIVERGENCE, APART, DTYPE)

    ms, mt = tl.maximum(tl.max(x, 1), LOWEST), tl.maximum(tl.max(y, 1), LOWEST)
    above = x - ms[:, None]
    ds, dt = above * units.cs, (y - mt[:, None]) * units.ct
    es, et = tl.exp2(ds), tl.exp2(dt)
    zs, zt = tl.sum(es, 1), tl.sum(et, 1)
    if IS_MIXTURE:
        summand, q, v = mixture(ds, dt, zs[:, None], zt[:, None], weight, DIVERGENCE, FAST)
        value, slope_sum = mixture_value(
            tl.sum(summand, 1), tl.sum(q * v, 1), zs, zt, weight, DIVERGENCE
        )
    else:
        zeros = tl.zeros([ROWS], DTYPE)
        a, b = add_products(zeros, zeros, ds, dt, es, et, DIVERGENCE)
        value, slope_sum = kl_value(zs, zt, a, b, weight, DIVERGENCE)
    if APART:
        value = among_others(value, zs, zt)
    z1, left = zs, zs
    if LABELS:
        z1 = tl.sum(tl.exp2(above * units.c1), 1)
    smoothing = smoothing_of(numbers, ON_DEVICE, DTYPE)
    soft_rows = None
    if soft is not None:
        soft_starts = row_offset(rows, inner, soft) // ALIGNMENT * ALIGNMENT
        soft_rows = soft.ptr + soft_starts[:, None]
    weights = class_weights.ptr if class_weights is not None else None
    target = Target(soft_rows, weights, smoothing)
    shares = load_shares(target, columns, inside, n_cols, DTYPE)
    HAS_SHARES: tl.constexpr = shares is not None
    spread = spread_of(above, shares) if HAS_SHARES else Spread(zs, zs)
    if IS_DECOUPLED:
        of_q = log2_odds(
            entry_of(pointers.student, apart, n_cols, DTYPE), ms[:, None], zs[:, None], units.cs
        )
        of_p = log2_odds(
            entry_of(pointers.teacher, apart, n_cols, DTYPE), mt[:, None], zt[:, None], units.ct
        )
        value, slope_sum = decoupled(value[:, None], of_p, of_q, weight)
        value, slope_sum = tl.max(value, 1), tl.max(slope_sum, 1)

    unmasked = tl.load(row_mask_ptr + rows, exists, 0) != 0 if row_mask_ptr is not None else exists
    if losses_ptr is not None:
        tl.store(losses_ptr + rows, tl.where(unmasked, value * scale, 0.0), exists)
    IS_WEIGHTED: tl.constexpr = (soft is not None) or (class_weights is not None)
    if LABELS and (APART or IS_WEIGHTED or losses_ptr is not None):
        label = label_of(rows, exists, unmasked, labels_ptr, soft)
        of_label = own_of(label, soft, class_weights, smoothing, n_cols, DTYPE)
        ce, left = cross_entropy(
            student_ptr + student_rows, label, of_label, spread, n_cols, units.c1, ms, z1,
            HAS_SHARES, APART, DTYPE,
        )  # fmt: skip
        if losses_ptr is not None:
            tl.store(cross_entropies_ptr + rows, ce, exists)
    if gradient_ptr is not None:
        if APART:
            zs, zt = without_others(zs, zt, IS_DECOUPLED)
            z1 = tl.where(z1 == 0, INFINITY, z1)
        unit = scale / temperature
        if (upstream_ptr is None) and (ce_upstream_ptr is None):
            unit *= row_weight
        if IS_STANDARDIZED or PER_ROW:
            unit = tl.max(unit, 1)  # the column's one
        factors = row_factors(
            rows, exists, n_cols, upstream_ptr, ce_upstream_ptr, strides, row_mask_ptr, labels_ptr,
            soft, class_weights, smoothing, unit, DTYPE,
        )  # fmt: skip
        row = Statistics(
            ms[:, None], zs[:, None], mt[:, None], zt[:, None], slope_sum[:, None],
            left[:, None], z1[:, None],
        )  # fmt: skip
        of_class = factors.own
        if (class_weights is not None) and not (HAS_SHARES or APART):
            of_class = left  # the same number, which takes no registers twice
        factors = Factors(
            factors.divergence[:, None], factors.cross_entropy[:, None], factors.label[:, None],
            of_class[:, None],
        )  # fmt: skip
        slopes = slopes_of(
            x, y, columns == apart, units, row, weight, factors, DIVERGENCE, IS_DECOUPLED, FAST
        )
        certain = is_certain(zs, zt, z1, ce_upstream_ptr is not None)
        if IS_STANDARDIZED:
            slopes = with_certain(slopes, pointers, columns, inside, certain, ms, APART)
            if APART:
                x, y = load_logits(pointers, columns, inside, DIVERGENCE, False, DTYPE)
            of_deviation = slopes_of_whole(slopes, x, moments)
            # a row that does not count may hold a NaN
            slopes += tl.where(factors.divergence != 0, of_deviation, 0.0)
            if APART:
                x, y = load_logits(pointers, columns, inside, DIVERGENCE, APART, DTYPE)
        if ce_upstream_ptr is not None:
            slopes += label_slopes(x, shares, columns, units, row, factors, target, APART)
        # the gradient of a KL alone takes few registers, which a tile of logits would add to
        IS_LEAN: tl.constexpr = not (
            losses_ptr is not None or LABELS or IS_MIXTURE or IS_STANDARDIZED or APART
        )
        if not IS_LEAN:
            slopes = with_certain(slopes, pointers, columns, inside, certain, ms, APART)
        if IN_PLACE and LABELS:
            tl.debug_barrier()  # so that the label's logit has been read before it is overwritten
        gradient = Strided(gradient_ptr, strides.gradient_outer, strides.gradient_inner)
        gradient_rows = row_offset(rows, inner, gradient) // ALIGNMENT * ALIGNMENT
        tl.store(
            gradient_ptr + gradient_rows[:, None] + columns,
            slopes.to(gradient_ptr.dtype.element_ty),
            mask=inside,
        )
        if IS_LEAN:
            if tl.max(certain.to(tl.int32), 0) != 0:
                others, tops = _others_of_rows(
                    pointers, certain[:, None], exists[:, None], n_cols, units, row, weight,
                    factors, DIVERGENCE, DTYPE, FAST, ROWS, COLUMNS,
                )  # fmt: skip
                tl.debug_barrier()  # so that this is stored after what the tile has there
                tl.store(
                    gradient_ptr + gradient_rows + tops,
                    (-others).to(gradient_ptr.dtype.element_ty),
                    mask=tops >= 0,
                )

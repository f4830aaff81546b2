"""Kernels that sum over rows; `gradients.py` and `on_chip.py` have those that write a gradient.

With h = ∂d/∂log q a divergence D = Σ d(log p, log q) has the slope (h − q Σ h) / T, so that a row
needs a sweep for its sums and one for its gradient. For each entry of bf16 logits `row_statistics`
reads 4 bytes, or 8 in two sweeps where both Z must be known before d is summed, and 4 more where a
deviation must.
"""

import triton
import triton.language as tl

from fastkd.kernels.rows.labels import (
    Spread,
    Target,
    cross_entropy,
    from_boundary,
    label_of,
    own_of,
)
from fastkd.kernels.rows.reading import (
    Span,
    pointers_of,
    smoothing_of,
    temperature_of,
    units_of,
)
from fastkd.kernels.rows.standardized import (
    N_STANDARD,
    Levels,
    decoupled_level,
    kl_level,
    level_of,
    load_moments,
    load_standard,
    merged_moments,
    mixture_level,
    moments_of,
    pull_of,
    standard_of,
    standardized,
    store_standard,
)
from fastkd.kernels.rows.sums import Mixed, merged, mixture_sums, online_sums
from fastkd.kernels.rows.terms import (
    LOWEST,
    Statistics,
    Sums,
    among_others,
    decoupled,
    entry_of,
    kl_value,
    log2_odds,
    mixture_unit,
    mixture_value,
    without_others,
)
from fastkd.kernels.tiles import INFINITY, number, row_offset

N_STATISTICS = tl.constexpr(7)  # numbers of a row or split in memory, in the order of Sums
N_MORE = tl.constexpr(5)  # numbers of a split besides, in the order of Levels and Spread


@triton.jit
def statistics_of(pointer, row, IS_STANDARDIZED: tl.constexpr):
    """Return where the statistics of a row are, which its Standard follows."""
    n = N_STATISTICS + N_STANDARD if IS_STANDARDIZED else N_STATISTICS
    return pointer + row.to(tl.int64) * n


@triton.jit
def _sums_of(pointer, row, n_splits, split, HAS_MORE: tl.constexpr):
    """Return where the sums of a split of a row are, which N_MORE others may follow."""
    n = N_STATISTICS + N_MORE if HAS_MORE else N_STATISTICS
    return pointer + (row.to(tl.int64) * n_splits + split) * n


@triton.jit
def store_numbers(pointer, numbers, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(pointer + i, numbers[i])


@triton.jit
def _store_statistics(
    pointer, sums, slope_sum, left, IS_DECOUPLED: tl.constexpr, APART: tl.constexpr
):  # fmt: skip
    """Store the Statistics of a row: a's place is the slope sum's, and b's what is left, or Σ t.

    Where BOTH networks learn no class leaves anything, and the teacher's Σ p·u is in that place.
    """
    zs, zt, z1 = sums.zs, sums.zt, sums.z1
    if APART:
        zs, zt = without_others(zs, zt, IS_DECOUPLED)
        z1 = tl.where(z1 == 0, INFINITY, z1)
    of_row = Sums(sums.ms, zs, sums.mt, zt, slope_sum, left, z1)
    store_numbers(pointer, of_row, N_STATISTICS)


@triton.jit
def load_statistics(pointer):
    return Statistics(
        tl.load(pointer),
        tl.load(pointer + 1),
        tl.load(pointer + 2),
        tl.load(pointer + 3),
        tl.load(pointer + 4),
        tl.load(pointer + 5),
        tl.load(pointer + 6),
    )


@triton.jit
def _of_kl(
    sums, levels, student_row, teacher_row, apart_ptr, row, n_cols, units, standard, temperature,
    weight, DIVERGENCE: tl.constexpr, IS_DECOUPLED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the value of a row that is no mixture, its slope sum and its pull."""
    value, slope_sum = kl_value(sums.zs, sums.zt, sums.a, sums.b, weight, DIVERGENCE)
    if apart_ptr is not None:
        value = among_others(value, sums.zs, sums.zt)
    pull = tl.zeros_like(value)
    if standard is not None:
        level = kl_level(sums, levels, slope_sum, weight, DIVERGENCE)
    if IS_DECOUPLED:
        apart = tl.load(apart_ptr + row).to(tl.int64)
        x = entry_of(student_row, apart, n_cols, DTYPE)
        of_q = log2_odds(x, sums.ms, sums.zs, units.cs)
        of_p = log2_odds(entry_of(teacher_row, apart, n_cols, DTYPE), sums.mt, sums.zt, units.ct)
        value, slope_sum = decoupled(value, of_p, of_q, weight)
        if standard is not None:
            level = decoupled_level(
                level, level_of(x, sums.ms, standard, units), levels.of_q / sums.zs, slope_sum,
                weight,
            )  # fmt: skip
    if standard is not None:
        pull = pull_of(level, temperature, standard)
    return value, slope_sum, pull


@triton.jit
def _of_mixture(mixed, zs, zt, standard, temperature, weight, DIVERGENCE: tl.constexpr):
    """Return the value of a mixture's row, its slope sum and its pull."""
    value, slope_sum = mixture_value(mixed.value, mixed.slopes, zs, zt, weight, DIVERGENCE)
    pull = tl.zeros_like(value)
    if standard is not None:
        level = mixture_level(mixed.of_slopes, mixed.of_q, slope_sum, zs, zt, weight, DIVERGENCE)
        pull = pull_of(level, temperature, standard)
    return value, slope_sum, pull


# numbers that vary with the batch stay unspecialised, so that every batch runs the same code
@triton.jit(do_not_specialize=["inner", "vectors_per_split"])
def row_statistics(
    student,  # Strided (n_rows, n_cols)
    teacher,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS), and N_STANDARD more if IS_STANDARDIZED
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS or N_MORE more) or None, with SWEEP 0
    numbers,  # Numbers
    soft,  # Strided (n_rows, n_cols), soft labels, or None
    class_weights,  # Strided (n_rows, n_cols), whose rows are one, or None
    n_cols,
    inner,  # size of the logits' last dimension but one
    vectors_per_split,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    IS_STANDARDIZED: tl.constexpr, BOTH: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    FAST: tl.constexpr, ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, CONGRUENT: tl.constexpr,
    TARGET_CONGRUENT: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the losses and statistics of a row, or a split's part of them: program (row, split).

    SWEEP 0 does all of a row. SWEEP 1 sums over a split, SWEEP 2 sums what needs the Z of the row.
    Before them SWEEP 3 sums for the deviation.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    unmasked = tl.load(row_mask_ptr + row) != 0 if row_mask_ptr is not None else row >= 0
    label = label_of(row, None, unmasked, labels_ptr, soft)
    LABELS: tl.constexpr = (labels_ptr is not None) or (soft is not None)
    HAS_SHARES: tl.constexpr = (numbers.label_smoothing is not None) or (soft is not None)
    statistics_row = statistics_of(statistics_ptr, row, IS_STANDARDIZED)
    if (unmasked == 0) & (label < 0):  # returns, so that no logits of a masked row are read
        if SWEEP == 0:
            tl.store(losses_ptr + row, 0.0)
            if LABELS:
                tl.store(cross_entropies_ptr + row, 0.0)
            zeros = Statistics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            store_numbers(statistics_row, zeros, N_STATISTICS)
            if IS_STANDARDIZED:
                store_numbers(statistics_row + N_STATISTICS, zeros, N_STANDARD)
        return
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
    temperature = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    smoothing = smoothing_of(numbers, ON_DEVICE, DTYPE)
    APART: tl.constexpr = apart_ptr is not None
    rows, head = pointers_of(row, student, teacher, apart_ptr, n_cols, inner, CONGRUENT, WIDTH)
    start = split * vectors_per_split
    end = tl.maximum(start, tl.minimum(start + vectors_per_split, (n_cols - head) // WIDTH))
    span = Span(start, end, head, n_cols)
    sums_row = partial_ptr
    if SWEEP != 0:
        sums_row = _sums_of(
            partial_ptr, row, tl.num_programs(1), split, IS_STANDARDIZED or HAS_SHARES
        )

    standard = None
    if SWEEP == 3:
        of_student, of_teacher = moments_of(rows, span, DIVERGENCE, DTYPE, THREADS, WIDTH)
        store_numbers(sums_row, of_student, 4)
        store_numbers(sums_row + 4, of_teacher, 4)
        return
    if IS_STANDARDIZED:
        if SWEEP == 0:
            of_student, of_teacher = moments_of(rows, span, DIVERGENCE, DTYPE, THREADS, WIDTH)
            standard = standard_of(of_student, of_teacher)
        else:
            standard = load_standard(statistics_row + N_STATISTICS)
        units = standardized(units, standard.deviation, standard.teacher_deviation)

    if SWEEP < 2:
        target = Target(
            from_boundary(row, soft, inner, head, TARGET_CONGRUENT),
            from_boundary(row, class_weights, inner, head, TARGET_CONGRUENT),
            smoothing,
        )
        sums, levels, spread = online_sums(
            rows, target, span, units, standard, DIVERGENCE, LABELS, APART, DTYPE, THREADS, WIDTH
        )
        ms, zs, mt, zt = sums.ms, sums.zs, sums.mt, sums.zt
    else:
        ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)
        mt, zt = tl.load(statistics_row + 2), tl.load(statistics_row + 3)
    if IS_MIXTURE and SWEEP != 1:
        mixed = mixture_sums(
            rows, span, units, standard, ms, zs, mt, zt, weight, DIVERGENCE, APART, BOTH, DTYPE,
            FAST, THREADS, WIDTH,
        )  # fmt: skip

    if SWEEP == 0:
        student_row = student.ptr + row_offset(row, inner, student)
        teacher_row = teacher.ptr + row_offset(row, inner, teacher)
        if IS_MIXTURE:
            value, slope_sum, pull = _of_mixture(
                mixed, zs, zt, standard, temperature, weight, DIVERGENCE
            )
            teacher_sum = mixed.teacher_slopes * mixture_unit(zs, zt, DIVERGENCE)
        else:
            value, slope_sum, pull = _of_kl(
                sums, levels, student_row, teacher_row, apart_ptr, row, n_cols, units, standard,
                temperature, weight, DIVERGENCE, IS_DECOUPLED, DTYPE,
            )  # fmt: skip
            teacher_sum = sums.a / zt
        scale = number(numbers.scale, ON_DEVICE, DTYPE)
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))
        left = teacher_sum if BOTH else tl.zeros_like(sums.z1)
        if LABELS:
            own = own_of(label, soft, class_weights, smoothing, n_cols, DTYPE)
            ce, left = cross_entropy(
                student_row, label, own, spread, n_cols, units.c1, sums.ms, sums.z1, HAS_SHARES,
                APART, DTYPE,
            )  # fmt: skip
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, sums, slope_sum, left, IS_DECOUPLED, APART)
        if IS_STANDARDIZED:
            store_standard(statistics_row + N_STATISTICS, standard, pull)
    elif SWEEP == 1:
        store_numbers(sums_row, sums, N_STATISTICS)
        if IS_STANDARDIZED or HAS_SHARES:
            store_numbers(sums_row + N_STATISTICS, levels, 3)
            store_numbers(sums_row + N_STATISTICS + 3, spread, 2)
    elif SWEEP == 2:  # no else, because Triton compiles what follows a return of SWEEP 3
        store_numbers(sums_row, mixed, 4 if IS_STANDARDIZED else 2)
        if BOTH:
            tl.store(sums_row + 2, mixed.teacher_slopes)


@triton.jit
def _load_mixed(pointer, inside, IS_STANDARDIZED: tl.constexpr, BOTH: tl.constexpr):
    """Return the Mixed sums of a row from those of its splits."""
    value, slopes = tl.load(pointer, inside, 0.0), tl.load(pointer + 1, inside, 0.0)
    of_slopes, of_q, teacher_slopes = value, value, value
    if BOTH:
        teacher_slopes = tl.load(pointer + 2, inside, 0.0)
    if IS_STANDARDIZED:
        of_slopes, of_q = tl.load(pointer + 2, inside, 0.0), tl.load(pointer + 3, inside, 0.0)
    return Mixed(
        tl.sum(value, 0), tl.sum(slopes, 0), tl.sum(of_slopes, 0), tl.sum(of_q, 0),
        tl.sum(teacher_slopes, 0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "n_splits"])
def combine(
    student,  # Strided (n_rows, n_cols)
    teacher,  # Strided (n_rows, n_cols)
    labels_ptr,  # (n_rows,) or None
    row_mask_ptr,  # (n_rows,) or None
    apart_ptr,  # (n_rows,), classes that are set apart, or None
    losses_ptr,  # (n_rows,)
    cross_entropies_ptr,  # (n_rows,) or None, without labels
    statistics_ptr,  # (n_rows, N_STATISTICS), and N_STANDARD more if IS_STANDARDIZED
    partial_ptr,  # (n_rows, n_splits, N_STATISTICS or N_MORE more)
    numbers,  # Numbers
    soft,  # Strided (n_rows, n_cols), soft labels, or None
    class_weights,  # Strided (n_rows, n_cols), whose rows are one, or None
    n_cols,
    inner,  # size of the logits' last dimension but one
    n_splits,
    DIVERGENCE: tl.constexpr, IS_MIXTURE: tl.constexpr, IS_DECOUPLED: tl.constexpr,
    IS_STANDARDIZED: tl.constexpr, BOTH: tl.constexpr, SWEEP: tl.constexpr, DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr, PER_ROW: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine what the splits of a row summed, always in the same order: program (row)."""
    row = tl.program_id(0)
    unmasked = tl.load(row_mask_ptr + row) != 0 if row_mask_ptr is not None else row >= 0
    label = label_of(row, None, unmasked, labels_ptr, soft)
    LABELS: tl.constexpr = (labels_ptr is not None) or (soft is not None)
    HAS_SHARES: tl.constexpr = (numbers.label_smoothing is not None) or (soft is not None)
    APART: tl.constexpr = apart_ptr is not None
    weight = number(numbers.weight, ON_DEVICE, DTYPE)
    scale = number(numbers.scale, ON_DEVICE, DTYPE)
    temperature = temperature_of(numbers.student_temperature, row, PER_ROW, ON_DEVICE, DTYPE)
    statistics_row = statistics_of(statistics_ptr, row, IS_STANDARDIZED)
    smoothing = smoothing_of(numbers, ON_DEVICE, DTYPE)
    split = tl.arange(0, SPLITS)
    inside = (split < n_splits) & (unmasked | (label >= 0))
    place = _sums_of(partial_ptr, row, n_splits, split, IS_STANDARDIZED or HAS_SHARES)
    if SWEEP == 3:
        of_student = merged_moments(load_moments(place, inside))
        of_teacher = merged_moments(load_moments(place + 4, inside))
        standard = standard_of(of_student, of_teacher)
        store_standard(statistics_row + N_STATISTICS, standard, standard.pull)
        return
    standard = None
    if IS_STANDARDIZED:
        standard = load_standard(statistics_row + N_STATISTICS)
    if SWEEP == 1:
        sums = Sums(
            tl.load(place, inside, LOWEST),
            tl.load(place + 1, inside, 0.0),
            tl.load(place + 2, inside, LOWEST),
            tl.load(place + 3, inside, 0.0),
            tl.load(place + 4, inside, 0.0),
            tl.load(place + 5, inside, 0.0),
            tl.load(place + 6, inside, 0.0),
        )
        zeros = tl.zeros_like(sums.zs)
        levels, spread = Levels(zeros, zeros, zeros), Spread(zeros, zeros)
        if IS_STANDARDIZED or HAS_SHARES:
            more = place + N_STATISTICS
            levels = Levels(
                tl.load(more, inside, 0.0),
                tl.load(more + 1, inside, 0.0),
                tl.load(more + 2, inside, 0.0),
            )
            spread = Spread(tl.load(more + 3, inside, 0.0), tl.load(more + 4, inside, 0.0))
        units = units_of(numbers, row, PER_ROW, ON_DEVICE, DTYPE)
        if IS_STANDARDIZED:
            units = standardized(units, standard.deviation, standard.teacher_deviation)
        sums, levels, spread = merged(sums, levels, spread, units, DIVERGENCE)
        student_row = student.ptr + row_offset(row, inner, student)
        teacher_row = teacher.ptr + row_offset(row, inner, teacher)
        value, slope_sum, pull = _of_kl(
            sums, levels, student_row, teacher_row, apart_ptr, row, n_cols, units, standard,
            temperature, weight, DIVERGENCE, IS_DECOUPLED, DTYPE,
        )  # fmt: skip
        left = sums.a / sums.zt if BOTH else tl.zeros_like(sums.z1)
        if LABELS:
            own = own_of(label, soft, class_weights, smoothing, n_cols, DTYPE)
            ce, left = cross_entropy(
                student_row, label, own, spread, n_cols, units.c1, sums.ms, sums.z1, HAS_SHARES,
                APART, DTYPE,
            )  # fmt: skip
            tl.store(cross_entropies_ptr + row, ce)
        _store_statistics(statistics_row, sums, slope_sum, left, IS_DECOUPLED, APART)
    else:
        mixed = _load_mixed(place, inside, IS_STANDARDIZED, BOTH)
        zs, zt = tl.load(statistics_row + 1), tl.load(statistics_row + 3)
        value, slope_sum, pull = _of_mixture(
            mixed, zs, zt, standard, temperature, weight, DIVERGENCE
        )
        tl.store(statistics_row + 4, slope_sum)
        if BOTH:
            of_teacher = mixed.teacher_slopes * mixture_unit(zs, zt, DIVERGENCE)
            tl.store(statistics_row + 5, of_teacher)
    if SWEEP == 2 or not IS_MIXTURE:
        tl.store(losses_ptr + row, tl.where(unmasked, value * scale, 0.0))
        if IS_STANDARDIZED:
            store_standard(statistics_row + N_STATISTICS, standard, pull)

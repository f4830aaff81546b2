"""Rows of softmax probabilities against rows, solved on a GPU.

Every D = Σ d(log p, log q) has ∂D/∂student = (h − q Σ h) / T with h = ∂d/∂log q, known up to a
multiple of q. All is in log2 units: p = exp2((z − pivot)·log2(e)/T) / Z, the pivot a row's largest
logit. Pivot and Z are kept apart, because one number for both would lose what a large pivot rounds
away.

Bytes for each (row, entry) of bf16 logits, forward + backward. V ≤ ON_CHIP: 4 + 6, each one sweep
and one launch; 6 + 0 with the row weight known beforehand, or 6 + 6 where another upstream comes.
Above: the KLs 4 + 6; mixtures and total variation, which need both Z before they can sum, 8 + 6;
4 more of standardized logits, whose deviation must be known before. Smoothed labels and weights of
classes move no more, soft labels once their own bytes each way. `value_and_gradients` moves as
much, or 6 in its one sweep where V ≤ ON_CHIP. Rows of which the student is nearly certain of a
class are read once more for the gradient of that class, 4 above ON_CHIP, and from the cache below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._op import Number
from fastkd._precision import compute_dtype
from fastkd.kernels.device import (
    Strided,
    alignment,
    congruent,
    device_of,
    on_device,
    rows_of,
    written_like,
)
from fastkd.kernels.rows import gradients, on_chip, reading, sweeps
from fastkd.kernels.rows.standardized import N_STANDARD
from fastkd.problems.rows import Rows, is_exactly

ON_CHIP = 8192  # columns of the longest rows that are read once, a quarter of it in float64
_MIXTURES = ("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")
_SHORTEST_SPLIT = 8192  # columns that pay for a program
# entries of whole rows that a warp keeps: as many as its registers hold, because what a row costs
# besides its entries, shuffles and barriers, is then shared by most
_PER_WARP = {torch.float32: 1024, torch.float64: 256}

Losses = tuple[Tensor, Tensor | None]  # divergences · scale, and cross-entropies with labels


def n_statistics(problem: Rows) -> int:
    """Return how many numbers a row saves for `backward`: none if it fits on chip."""
    # numbers of float64 take two registers, and more to compute with
    longest = ON_CHIP // 4 if _dtype(problem) == torch.float64 else ON_CHIP
    if problem.student.shape[-1] <= longest:
        return 0
    return sweeps.N_STATISTICS.value + problem.standardized * N_STANDARD.value


def forward(problem: Rows, needs_grad: Sequence[bool]) -> tuple[Losses, tuple[Tensor, ...]]:
    """Compute the losses of the rows, and what `backward` needs besides the problem.

    Args:
        problem: Logits (..., V) and what is asked about them.
        needs_grad: Whether the student needs a gradient.

    Returns:
        ((losses, cross_entropies), (statistics,)): the divergences · scale, shape (...), the
        cross-entropies at T = 1, shape (...), None without labels, and
        (..., n_statistics(problem)) numbers, all in the compute dtype. Where rows stay on chip and
        their weight is known, the gradient for that weight follows the statistics.
    """
    losses, statistics = _allocate(problem, n_statistics(problem))
    if needs_grad[0] and _foresees_weight(problem):
        gradient = torch.empty_like(problem.student)
        if losses[0].numel() and gradient.is_contiguous():
            _launch_whole_rows(problem, losses, gradient)
            return losses, (statistics, gradient)
    if not losses[0].numel():
        pass
    elif statistics.numel():
        _launch_statistics(problem, losses, statistics)
    else:
        _launch_whole_rows(problem, losses)
    return losses, (statistics,)


def backward(
    problem: Rows,
    statistics: Tensor,
    upstream: Sequence[Tensor | None],
    foreseen: Tensor | None = None,
) -> Tensor:
    """Compute Σ upstream · ∂losses/∂student over both kinds of losses.

    Args:
        problem: The problem that `forward` solved.
        statistics: The tensor that `forward` saved.
        upstream: Upstream gradients (...) of the losses and of the cross-entropies; None for 0.
        foreseen: The gradient for the problem's row weight that `forward` saved, if it is still
            there. It becomes the result: rows with another upstream gradient are computed again.

    Returns:
        The gradient with respect to the student, in its shape and dtype, and in the order of its
        strides, for which one that the kernels write contiguously is copied.
    """
    if foreseen is not None:
        _launch_whole_rows(problem, None, foreseen, upstream, is_foreseen=True)
        return foreseen

    def write(gradient: Tensor) -> None:
        if statistics.numel():
            _launch_gradient(problem, statistics, gradient, upstream)
        else:
            _launch_whole_rows(problem, None, gradient, upstream)

    return written_like(problem.student, write)


def value_and_gradients(
    problem: Rows,
    needs_grad: Sequence[bool],
    *,
    row_weights: Tensor | None = None,
    ce_weights: Tensor | None = None,
    in_place: bool = False,
    is_wide: bool = False,
) -> tuple[Losses, tuple[Tensor | None]]:
    """Compute the losses of the rows, and the gradient of Σ w·losses + Σ w_ce·cross_entropies.

    A caller that knows the weights beforehand saves a sweep over logits that fit on chip, and on
    chunks of logits that are thrown away afterwards the memory of the gradient.

    Args:
        problem: Logits (..., V) and what is asked about them.
        needs_grad: Whether the student needs a gradient.
        row_weights: w, shape (...); None for 1.
        ce_weights: w_ce, shape (...); None for 0.
        in_place: Write the gradient over the student, which must be contiguous.
        is_wide: Return the gradient in the compute dtype.

    Returns:
        ((losses, cross_entropies), (gradient,)): as `forward` and `backward` return them, with
        None for a gradient that is not needed.
    """
    if not needs_grad[0]:
        return forward(problem, needs_grad)[0], (None,)
    student, n = problem.student, n_statistics(problem)
    losses, statistics = _allocate(problem, n)
    gradient = student
    if not in_place:
        dtype = losses[0].dtype if is_wide else student.dtype
        gradient = torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)
    if row_weights is None:
        row_weights = losses[0].new_ones(()).expand(losses[0].shape)
    upstream = row_weights, ce_weights
    if not losses[0].numel():
        pass
    elif not n:
        _launch_whole_rows(problem, losses, gradient, upstream)
    else:
        _launch_statistics(problem, losses, statistics)
        _launch_gradient(problem, statistics, gradient, upstream)
    return losses, (gradient,)


def _foresees_weight(problem: Rows) -> bool:
    """Return whether the forward may make the gradient, for the weight that the caller knows.

    It would be in vain in float16, where a loss is scaled so that its gradient does not vanish, and
    with labels, whose losses have an upstream gradient of their own.
    """
    is_known = isinstance(problem.row_weight, Tensor) or problem.row_weight != 0
    narrow, on_chip = problem.student.dtype == torch.float16, not n_statistics(problem)
    return is_known and on_chip and not narrow and problem.labels is None


def _allocate(problem: Rows, n_numbers: int) -> tuple[Losses, Tensor]:
    """Return empty losses, and empty statistics of n_numbers a row."""
    examples, dtype, new = problem.student.shape[:-1], _dtype(problem), problem.student.new_empty
    cross_entropies = None if problem.labels is None else new(examples, dtype=dtype)
    return (new(examples, dtype=dtype), cross_entropies), new((*examples, n_numbers), dtype=dtype)


def _launch_whole_rows(
    problem: Rows,
    losses: Losses | None,
    gradient: Tensor | None = None,
    upstream: Sequence[Tensor | None] = (None, None),
    *,
    is_foreseen: bool = False,
) -> None:
    n_rows, n_cols = _shape(problem)
    student, teacher = rows_of(problem.student), rows_of(problem.teacher)
    arguments = _arguments(problem)
    gradient_rows = None if gradient is None else rows_of(gradient)
    aligned = [x for x in (student, teacher, gradient_rows, arguments["soft"]) if x is not None]
    reads_shares = _is_soft(problem) or (_is_smooth(problem) and problem.class_weights is not None)
    block, columns, num_warps = _tile(problem, 1 + reads_shares)
    with on_device(problem.student):
        on_chip.whole_rows[(triton.cdiv(n_rows, block),)](
            **arguments,
            **_operands(student, teacher, gradient_rows, upstream),
            losses_ptr=None if losses is None else losses[0],
            cross_entropies_ptr=None if losses is None else losses[1],
            n_rows=n_rows,
            IS_MIXTURE=problem.divergence in _MIXTURES,
            FAST=_has_fast_log2(problem),
            ALIGNMENT=alignment(aligned, n_cols),
            ROWS=block,
            COLUMNS=columns,
            IN_PLACE=gradient is problem.student,
            WEIGHED=is_foreseen,
            num_warps=num_warps,
        )


def _tile(problem: Rows, n_tiles: int = 1) -> tuple[int, int, int]:
    """Return the rows and columns of a program that takes whole rows, and its warps.

    A warp takes many short rows where that leaves a program for every multiprocessor, and otherwise
    one: numbers in between would compile a kernel anew for other batches. It keeps a part of that
    where there are `n_tiles` besides the logits, of gradients and of the shares of labels.
    """
    n_rows, n_cols = _shape(problem)
    columns = triton.next_power_of_2(n_cols)
    per_warp = _PER_WARP[_dtype(problem)] // n_tiles
    block = max(1, per_warp // 2 // columns)  # half as many, because each row has sums besides
    if n_rows < block * device_of(problem.student).multiprocessors:
        block = 1
    return block, columns, max(1, block * columns // per_warp)


def _splits(problem: Rows) -> tuple[int, int, int]:
    """Return how many programs share a row, the vectors of each, and its warps.

    Several share one where there are fewer rows than multiprocessors.
    """
    n_rows, n_cols = _shape(problem)
    multiprocessors = device_of(problem.student).multiprocessors
    n_vectors = n_cols // _width(problem)
    num_warps = 8 if n_rows >= 2 * multiprocessors else 16
    splits = 1
    if n_rows < multiprocessors:
        most = triton.cdiv(n_cols, _SHORTEST_SPLIT)
        splits = min(triton.cdiv(2 * multiprocessors, n_rows), most)
    per_split = triton.cdiv(triton.cdiv(n_vectors, splits), 32 * num_warps) * 32 * num_warps
    return triton.cdiv(n_vectors, per_split), per_split, num_warps


def _launch_statistics(
    problem: Rows, losses: Losses, statistics: Tensor, *, both: bool = False
) -> None:
    n_rows, _ = _shape(problem)
    student, teacher = rows_of(problem.student), rows_of(problem.teacher)
    is_mixture, width = problem.divergence in _MIXTURES, _width(problem)
    splits, per_split, num_warps = _splits(problem)
    threads = 32 * num_warps
    partial = None
    if splits > 1:
        n_sums = sweeps.N_STATISTICS.value
        if problem.standardized or _is_smooth(problem) or _is_soft(problem):
            n_sums += sweeps.N_MORE.value
        partial = statistics.new_empty((n_rows, splits, n_sums))
    in_turn = [3] * problem.standardized + [1] + [2] * is_mixture
    shared = dict(
        **_arguments(problem),
        student=student,
        teacher=teacher,
        losses_ptr=losses[0],
        cross_entropies_ptr=losses[1],
        statistics_ptr=statistics,
        partial_ptr=partial,
        IS_MIXTURE=is_mixture,
        BOTH=both,
    )
    with on_device(problem.student):
        for sweep in [0] if splits == 1 else in_turn:
            sweeps.row_statistics[(n_rows, splits)](
                **shared,
                vectors_per_split=per_split,
                SWEEP=sweep,
                FAST=_has_fast_log2(problem),
                CONGRUENT=congruent(student, teacher, width),
                TARGET_CONGRUENT=_is_congruent_target(student, shared, width),
                THREADS=threads,
                WIDTH=width,
                num_warps=num_warps,
            )
            if sweep:
                sweeps.combine[(n_rows,)](
                    **shared,
                    n_splits=splits,
                    SWEEP=sweep,
                    SPLITS=triton.next_power_of_2(splits),
                    num_warps=1,
                )


def _launch_gradient(
    problem: Rows, statistics: Tensor, gradient: Tensor, upstream: Sequence[Tensor | None]
) -> None:
    n_rows, n_cols = _shape(problem)
    student, teacher = rows_of(problem.student), rows_of(problem.teacher)
    gradient_rows, width = rows_of(gradient), _width(problem)
    # numbers of float64 take two registers, and more to compute with: a thread has 8 of them;
    # standardized logits stay in registers until the slope of a mixture is there
    vectors = 256 if problem.standardized and problem.divergence in _MIXTURES else 512
    if _dtype(problem) == torch.float64:
        vectors = 1024 // width
    n_blocks = triton.cdiv(n_cols, vectors * width)
    arguments = _arguments(problem)
    shared = dict(
        **arguments,
        **_operands(student, teacher, gradient_rows, upstream),
        statistics_ptr=statistics.contiguous(),  # mapped upstreams have one of all, expanded
        FAST=_has_fast_log2(problem),
        CONGRUENT=congruent(student, teacher, width),
        TARGET_CONGRUENT=_is_congruent_target(student, arguments, width),
        WIDTH=width,
    )
    tops = of_tops = None
    if gradient is problem.student:  # found beforehand, because they are overwritten
        of_tops = statistics.new_empty(n_rows)
        tops = torch.empty_like(of_tops, dtype=torch.int32)
    found: dict[str, Any] = dict(tops_ptr=tops, of_tops_ptr=of_tops)
    with on_device(problem.student):
        if tops is not None:
            gradients.certain_classes[(n_rows,)](
                **{**shared, "gradient_ptr": None}, **found, THREADS=256, num_warps=8
            )
        gradients.gradient[(n_rows * n_blocks,)](
            **shared,
            **found,
            n_blocks=n_blocks,
            GRADIENT_CONGRUENT=congruent(student, gradient_rows, width),
            VECTORS=vectors,
            num_warps=4,
        )
        if tops is None:
            gradients.certain_classes[(n_rows,)](**shared, **found, THREADS=256, num_warps=8)


def _arguments(problem: Rows) -> dict[str, Any]:
    """Return what all kernels take, by the names of their parameters."""
    dtype, device = _dtype(problem), problem.student.device
    is_decoupled = problem.divergence == "decoupled_kl"
    numbers = reading.Numbers(
        problem.student_temperature,
        problem.teacher_temperature,
        problem.weight,
        problem.scale,
        problem.row_weight,
        problem.label_smoothing if _is_smooth(problem) else None,
    )
    # a temperature of each row, where one of the networks has it
    is_per_row = any(isinstance(x, Tensor) and x.ndim for x in numbers[:2])
    if is_per_row:
        examples = problem.student.shape[:-1]
        of_student, of_teacher = (
            _on_device(x, device).expand(examples).reshape(-1).contiguous() for x in numbers[:2]
        )
        numbers = numbers._replace(student_temperature=of_student, teacher_temperature=of_teacher)
    own, shared = (numbers[:2], numbers[2:]) if is_per_row else ((), numbers)
    # float64 goes by pointer too, because a Python float reaches a kernel as float32
    by_pointer = dtype == torch.float64 or any(isinstance(x, Tensor) for x in shared)
    given = (
        None if x is None else _on_device(x, device) if by_pointer else float(x) for x in shared
    )
    numbers = reading.Numbers(*own, *given)
    soft, weights = problem.labels if _is_soft(problem) else None, problem.class_weights
    return dict(
        labels_ptr=_flat(problem.labels) if soft is None else None,
        soft=None if soft is None else rows_of(soft),
        class_weights=None if weights is None else Strided(weights.contiguous(), 0, 0),
        row_mask_ptr=_flat(problem.row_mask),
        apart_ptr=_flat(problem.apart),
        numbers=numbers,
        n_cols=problem.student.shape[-1],
        inner=problem.student.shape[-2] if problem.student.ndim > 1 else 1,
        # the KL of all other classes, and what is added to it
        DIVERGENCE="forward_kl" if is_decoupled else problem.divergence,
        IS_DECOUPLED=is_decoupled,
        IS_STANDARDIZED=problem.standardized,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        ON_DEVICE=by_pointer,
        PER_ROW=is_per_row,
    )


def _is_smooth(problem: Rows) -> bool:
    """Return whether labels are smooth; the label of a class that is set apart never is."""
    is_sharp = problem.labels is None or problem.apart is not None
    return not is_sharp and not is_exactly(problem.label_smoothing, 0)


def _is_soft(problem: Rows) -> bool:
    """Return whether labels are numbers of all classes."""
    return problem.labels is not None and problem.labels.is_floating_point()


def _is_congruent_target(student: Strided, arguments: dict[str, Any], width: int) -> bool:
    """Return whether what a target is read from starts as far from a boundary as the student."""
    read = (arguments["soft"], arguments["class_weights"])
    return all(x is None or congruent(student, x, width) for x in read)


def _shape(problem: Rows) -> tuple[int, int]:
    """Return the numbers of rows and of columns."""
    return problem.student.shape[:-1].numel(), problem.student.shape[-1]


def _dtype(problem: Rows) -> torch.dtype:
    return compute_dtype(problem.student, problem.teacher)


def _has_fast_log2(problem: Rows) -> bool:
    """Return whether the device computes log2 of the compute dtype in one instruction."""
    return _dtype(problem) == torch.float32 and device_of(problem.student).nvidia


def _width(problem: Rows) -> int:
    """Return the elements of a vector, which has 16 bytes of the narrower network."""
    return 16 // min(problem.student.element_size(), problem.teacher.element_size())


def _operands(
    student: Strided, teacher: Strided, gradient: Strided | None, upstream: Sequence[Tensor | None]
) -> dict[str, Any]:
    """Return the pointers of a kernel that writes a gradient, and their strides."""
    of_losses, of_labels = (None if x is None else x.reshape(-1) for x in upstream)
    outer, inner = (0, 0) if gradient is None else (gradient.outer_stride, gradient.inner_stride)
    return dict(
        student_ptr=student.ptr,
        teacher_ptr=teacher.ptr,
        upstream_ptr=of_losses,
        ce_upstream_ptr=of_labels,
        gradient_ptr=None if gradient is None else gradient.ptr,
        strides=reading.Strides(
            *(student.outer_stride, student.inner_stride),
            *(teacher.outer_stride, teacher.inner_stride),
            *(outer, inner),
            0 if of_losses is None else of_losses.stride(0),
            0 if of_labels is None else of_labels.stride(0),
        ),
    )


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1).contiguous()


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)

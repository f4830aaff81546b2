"""Self-distillation: the moving average of a network teaches it, by crops and masked patches.

`fastkd.EMATeacher` is such a moving average. A teacher that gives all images the same output is
avoided by a centre, which is subtracted from its outputs, and `koleo` spreads embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _option_checks
from fastkd._loss import loss
from fastkd._op import Number
from fastkd._ranks import Ranks, log_sum_exp
from fastkd._reduction import selected
from fastkd.divergence import soft_cross_entropy
from fastkd.problems import _crops as crops
from fastkd.problems import _patches as patches
from fastkd.problems.pairs import directions
from fastkd.problems.tokens import as_bool

Crops = Tensor | Sequence[Tensor]


@loss(crops.check, crops.against_means, is_mean=True)
def dino(
    student: Crops,
    teacher: Crops,
    center: Tensor | None = None,
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    skip_same_view: bool = True,
    group: Any = None,
) -> Tensor:
    """Compute mean_tv H(softmax((t − c) / T_t), softmax(s_v / T_s)) with H(p, q) = −Σ p log q.

    The mean is over the B images and the pairs of a crop t of the teacher and a crop v of the
    student. The global crops, which both networks see, come first in both.

    Args:
        student: Outputs of the student for its crops: a tensor [n_crops, B, K] or a sequence of
            tensors [B, K]. An output [n_crops · B, K] is `.unflatten(0, (n_crops, B))`.
        teacher: Outputs of the teacher for its crops, as above. They get no gradient.
        center: The centre c [K], which is subtracted from the teacher's outputs. A constant.
        student_temperature: T_s > 0. A number or a 0-dim tensor.
        teacher_temperature: T_t > 0. A number or a 0-dim tensor.
        skip_same_view: Whether pairs of one index, which are the same crop, are no pairs.
        group: A torch.distributed process group, or "world" for all ranks, whose ranks hold parts
            of the B images, of any sizes. Each rank gets the loss of the whole batch, and
            DistributedDataParallel averages the gradients to that of the whole batch.

    Returns:
        A scalar.

    Raises:
        TypeError: Student, teacher or centre are no floating-point tensors.
        ValueError: The crops do not fit together, have no pair, or a temperature is not above 0.

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
        arXiv:2104.14294
    """
    centred = [t if center is None else t - center.detach() for t in teacher]
    losses = [
        soft_cross_entropy.formula(s / student_temperature, t / teacher_temperature)
        for i, t in enumerate(centred)
        for j, s in enumerate(student)
        if not (skip_same_view and i == j)
    ]
    of_pairs = torch.stack(losses)
    return of_pairs.mean() if of_pairs.numel() else of_pairs.sum()


@loss(patches.check, patches.masked, per_example=-2, same_on_ranks=("center",))
def ibot(
    student_patches: Tensor,
    teacher_patches: Tensor,
    mask: Tensor,
    center: Tensor | None = None,
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    weights: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute mean_i (1/|M_i|) Σ_{l∈M_i} H(softmax((t_il − c) / T_t), softmax(s_il / T_s)).

    M_i are the masked patches of image i, which the student did not see and the teacher did. An
    image without one has the loss 0 and counts in the mean, as in DINOv2: weights=mask.any(-1)
    leaves it out. iBOT++ adds the visible patches, which is another call, with ~mask.

    Args:
        student_patches: Outputs of the student for the patches, [B, L, K], or [L, K] of one image,
            or with more dimensions of images, such as crops.
        teacher_patches: Outputs of the teacher for the same patches. They get no gradient.
        mask: The masked patches, [B, L], bool or 1 and 0. Other outputs reach nothing.
        center: The centre c [K], which is subtracted from the teacher's outputs. A constant.
        student_temperature: T_s > 0. A number or a 0-dim tensor.
        teacher_temperature: T_t > 0. A number or a 0-dim tensor.
        weights: One number or bool for each image, [B]. An image of weight 0 contributes exactly 0
            to loss and gradient, whatever it holds.
        normalizer: Replaces the divisor Σ weights of the mean. A number or a tensor of one element.
        reduction: "mean" (Σ w·l / Σ w over the images), "sum" (Σ w·l) or "none" (w·l).

    Returns:
        A scalar or, with reduction "none", one loss for each image [B]; float64 if an input is,
        else float32.

    Raises:
        TypeError: Student, teacher or centre are no floating-point tensors, or the mask is of
            floats.
        ValueError: The patches do not fit together, or an option is out of range.

    Reference:
        Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, 2022. arXiv:2111.07832
    """
    is_masked = as_bool(mask)
    student, teacher = (selected(x, is_masked) for x in (student_patches, teacher_patches))
    if center is not None:
        teacher = teacher - center.detach()
    losses = soft_cross_entropy.formula(
        student / student_temperature, teacher / teacher_temperature
    )
    return patches.mean_of_masked(selected(losses, is_masked), is_masked)


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_temperature: Number = 0.04,
    n_iterations: int = 3,
    group: Any = None,
) -> Tensor:
    """Return the centre c with which the prototypes of softmax((t − c) / T_t) are used alike.

    Sinkhorn and Knopp's iteration divides exp(t / T_t), a row for each output and a column for each
    prototype, by the sums of its columns and by the sums of its rows, in turn. What it ends with is
    softmax((t − c) / T_t) of each row with one number c_k for each prototype, so that it is a
    centre for `dino` and `ibot`. SwAV, DINOv2 and DINOv3 have this loss. It is computed from
    logarithms and never overflows.

    Args:
        teacher: Outputs of the teacher, (..., K), for example of all crops, [n_crops, B, K].
        mask: The outputs that count, (...), bool or 1 and 0.
        teacher_temperature: T_t > 0, that of the loss. A number or a 0-dim tensor.
        n_iterations: How often columns and rows are divided, at least once; 3 in these papers.
        group: A torch.distributed process group, or "world" for all ranks, whose ranks hold parts
            of the outputs.

    Returns:
        The centre [K] without gradient; float64 if the outputs are, else float32.

    Raises:
        TypeError: The outputs are no floating-point tensor, or the mask is of floats.
        ValueError: The outputs and the mask do not fit together, or an option is out of range.

    Reference:
        Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments,
        2020. arXiv:2006.09882
    """
    patches.check_outputs(teacher, mask)
    _option_checks.temperature(teacher_temperature, "teacher_temperature")
    _option_checks.at_least_1(n_iterations=n_iterations)
    ranks = Ranks.of(group)
    outputs = teacher.to(torch.promote_types(teacher.dtype, torch.float32)) / teacher_temperature
    if mask is not None:
        outputs = torch.where(as_bool(mask).unsqueeze(-1), outputs, -torch.inf)
    outputs = outputs.flatten(0, -2)
    of_prototypes = of_outputs = outputs.new_zeros(())
    for i in range(n_iterations):
        if i:
            of_outputs = _finite((outputs - of_prototypes).logsumexp(-1, keepdim=True))
        of_prototypes = (outputs - of_outputs).logsumexp(0)
        if ranks:
            of_prototypes = log_sum_exp(of_prototypes, ranks.name)
        of_prototypes = _finite(of_prototypes)
    return of_prototypes * teacher_temperature


def _finite(logarithms: Tensor) -> Tensor:
    """Return the logarithms of sums, 0 in place of −∞, since −∞ − (−∞) would be NaN."""
    return logarithms.masked_fill(logarithms == -torch.inf, 0)


@loss(patches.check_embeddings)
def koleo(embeddings: Tensor, *, epsilon: Number = 1e-8, group: Any = None) -> Tensor:
    """Compute −mean_i log(min_{j≠i} ‖x_i − x_j‖ + ε) of unit vectors: Kozachenko and Leonenko's.

    It spreads embeddings over the sphere. Which embedding is the nearest one is found by chunks of
    products, so that no matrix of N² numbers is kept, and the gradient goes through the pair of
    each embedding and its nearest one.

    An embedding that has an equal one has the distance 0 and no direction to go: its gradient is 0,
    as is that of an embedding of zeros. DINOv2 and lightly add ε to each difference of coordinates
    besides, ‖x_i − x_j + ε‖, so that three equal embeddings get huge gradients of one direction.

    Args:
        embeddings: Embeddings [N, D], which are divided by their lengths.
        epsilon: ε ≥ 0, which keeps the logarithm finite.
        group: A torch.distributed process group, or "world" for all ranks, whose ranks hold parts
            of the batch, of any sizes. Each rank gets the loss of the whole batch, and
            DistributedDataParallel averages the gradients to that of the whole batch.

    Returns:
        A scalar, 0 for fewer than two embeddings; float64 if the embeddings are, else float32.

    Raises:
        TypeError: The embeddings are no floating-point tensor.
        ValueError: They have not the shape [N, D], or epsilon is out of range.

    Reference:
        Sablayrolles et al., Spreading Vectors for Similarity Search, 2019. arXiv:1806.03198
    """
    units = directions(embeddings)
    if len(units) < 2:
        return units.sum() * 0
    others = patches.rows_at(patches.nearest(units.detach()), units)
    distances = torch.linalg.vector_norm(units - others, dim=-1)
    return -(distances + epsilon).log().mean()

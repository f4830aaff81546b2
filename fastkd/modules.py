"""The losses as modules: options at construction, tensors at the call.

``fastkd.KDLoss(temperature=2.0)(student_logits, teacher_logits, labels)`` is
``fastkd.kd(student_logits, teacher_logits, labels, temperature=2.0)``. A module has the options of
its function and takes at the call what belongs to a batch: the tensors, `weights`, `normalizer`.

Options are attributes, which may be set later: ``loss.temperature = 1.0`` anneals it. One that is
an `nn.Parameter` is a parameter of the module; another tensor without gradient is a buffer, which
moves with the module and is not saved with its state. `group="world"` means all ranks and may be
given before torch.distributed.init_process_group, where torch.distributed.group.WORLD is None.
Copies share a group; a pickle has its name, which is looked up at the next call.

A module has no state but the queue of `InfoNCELoss` and the centre of `DINOLoss` and `IBOTLoss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd import (
    _centers,
    _option_checks,
    contrastive,
    correlation,
    cross_tokenizer,
    decoupled,
    divergence,
    ensemble,
    label_aware,
    likelihoods,
    linear,
    multi_level,
    online,
    relational,
    self_distillation,
    vanilla,
)
from fastkd._module import LossModule
from fastkd._queue import Queue
from fastkd._ranks import Ranks
from fastkd.problems import _crops as crops
from fastkd.problems.tokens import as_bool


class ForwardKLLoss(LossModule, function=divergence.forward_kl):
    """T² KL(p ‖ q), the module of `fastkd.forward_kl`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """


class ReverseKLLoss(LossModule, function=divergence.reverse_kl):
    """T² KL(q ‖ p), the module of `fastkd.reverse_kl`.

    Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2024. arXiv:2306.08543
    """


class JensenShannonLoss(LossModule, function=divergence.jensen_shannon):
    """T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)], the module of `fastkd.jensen_shannon`.

    Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """


class SkewKLLoss(LossModule, function=divergence.skew_kl):
    """T² KL(p ‖ α p + (1 − α) q), the module of `fastkd.skew_kl`.

    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """


class SkewReverseKLLoss(LossModule, function=divergence.skew_reverse_kl):
    """T² KL(q ‖ (1 − α) p + α q), the module of `fastkd.skew_reverse_kl`.

    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """


class SymmetricKLLoss(LossModule, function=divergence.symmetric_kl):
    """T² [w KL(p ‖ q) + (1 − w) KL(q ‖ p)], the module of `fastkd.symmetric_kl`.

    Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946
    """


class TotalVariationLoss(LossModule, function=divergence.total_variation):
    """T² ½ Σ |p − q|, the module of `fastkd.total_variation`.

    Wen et al., f-Divergence Minimization for Knowledge Distillation, 2023. arXiv:2307.15190
    """


class SoftCrossEntropyLoss(LossModule, function=divergence.soft_cross_entropy):
    """−T² Σ p log q, the module of `fastkd.soft_cross_entropy`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """


class LogitMSELoss(LossModule, function=divergence.logit_mse):
    """T² (1/V) Σ ((z_s − z_t) / T)², the module of `fastkd.logit_mse`.

    Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014. arXiv:1312.6184
    """


class KDLoss(LossModule, function=vanilla.kd):
    """α CE(q at T = 1, labels) + (1 − α) T² D(p, q), the module of `fastkd.kd`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        """Return logits of as many classes as have weights."""
        weights = options["class_weights"]
        if name == "labels" or not isinstance(weights, Tensor) or weights.ndim != 1:
            return super()._of_empty_batch(name, empty, options)
        return empty.new_empty(0, len(weights))


class WSLDLoss(LossModule, function=label_aware.wsld):
    """T² w H(p, q) with w = 1 − exp(−CE_s / CE_t), the module of `fastkd.wsld`.

    Zhou et al., Rethinking Soft Labels for Knowledge Distillation, 2021. arXiv:2102.00650
    """


class MFTLoss(LossModule, function=label_aware.mft):
    """T² KL(p′ ‖ q) with a teacher that the label corrects, the module of `fastkd.mft`.

    Belcak et al., Minifinetuning, 2025. arXiv:2506.15702
    """


class TeacherFreeKDLoss(LossModule, function=label_aware.teacher_free_kd):
    """T² KL(p ‖ q) from a virtual teacher p, the module of `fastkd.teacher_free_kd`.

    Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, 2020.
    arXiv:1909.11723
    """


class DecoupledKDLoss(LossModule, function=decoupled.decoupled_kd):
    """T² [α KL(b_p ‖ b_q) + β KL(p̂ ‖ q̂)], the module of `fastkd.decoupled_kd`.

    Zhao et al., Decoupled Knowledge Distillation, 2022. arXiv:2203.08679
    """


class NKDLoss(LossModule, function=decoupled.nkd):
    """−p_y log q_y − γ T² Σ p̂ log q̂, the module of `fastkd.nkd`.

    Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels, 2023. arXiv:2303.13005
    """


class USKDLoss(LossModule, function=decoupled.uskd):
    """−α (1 + q_y² − mean q_y²) log q_y − β Σ ẑ log q̂ + μ H(u, w), the module of `fastkd.uskd`.

    The layer that makes the weak logits of features belongs to the student.

    Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels, 2023. arXiv:2303.13005
    """


class LinearKDLoss(LossModule, function=linear.linear_kd):
    """α CE(q at T = 1, labels) + (1 − α) T² D(p, q) of two heads, the module of `fastkd.linear_kd`.

    The heads belong to the networks and come with each call.

    Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """

    of_a_batch = (
        *LossModule.of_a_batch, "student_bias", "teacher_bias", "teacher_logits",
        "teacher_weights", "num_valid",
    )  # fmt: skip

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        """Return no positions, and heads of as many entries as the options speak of."""
        if not name.endswith("_weight"):
            return super()._of_empty_batch(name, empty, options)
        vocab = options["vocab"]
        is_ids = isinstance(vocab, Tensor) and vocab.numel() > 0
        return empty.new_empty(int(vocab.max()) + 1 if is_ids else 1, 1)

    def _is_in_empty_batch(self, parameter: inspect.Parameter, options: Mapping[str, Any]) -> bool:
        """Return whether it is one of the tensors, a teacher's too."""
        return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


class MutualKLLoss(LossModule, function=online.mutual_kl):
    """Σ_i 1/(K − 1) Σ_{j≠i} T² KL(p_j ‖ p_i), the module of `fastkd.mutual_kl`.

    Zhang et al., Deep Mutual Learning, 2018. arXiv:1706.00384
    """

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        return [empty, empty]


class ULDLoss(LossModule, function=cross_tokenizer.uld):
    """Σ_k |q_(k) − p_(k)| of sorted probabilities, the module of `fastkd.uld`.

    Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
    LLMs, 2024. arXiv:2402.12030
    """


class MatchedKLLoss(LossModule, function=cross_tokenizer.matched_kl):
    """T² D(p, q) over the strings of two vocabularies, the module of `fastkd.matched_kl`.

    The ids come with each call.

    Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD), 2025
    """


class ProjectedKLLoss(LossModule, function=cross_tokenizer.projected_kl):
    """T² D(p, q̂) with q̂ = the student's mass by a map, the module of `fastkd.projected_kl`.

    The map comes with each call.

    Sreenivas et al., X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation, 2026.
    arXiv:2605.21699
    """


class ALMLoss(LossModule, function=likelihoods.alm):
    """f(p, q) + f(1 − p, 1 − q) of likelihoods of groups, the module of `fastkd.alm`.

    Minixhofer et al., Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2025.
    arXiv:2503.20083
    """


class MultiTeacherLoss(LossModule, function=ensemble.multi_teacher):
    """T² D(Σ w_k p_k, q) of several teachers, the module of `fastkd.multi_teacher`.

    You et al., Learning from Multiple Teacher Networks, 2017.
    """

    of_a_batch = (*LossModule.of_a_batch, "teacher_weights", "teacher_index")

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        """Return no rows, and one teacher of them."""
        found = super()._of_empty_batch(name, empty, options)
        return [found] if name == "teachers" else found


class RKDDistanceLoss(LossModule, function=relational.rkd_distance):
    """(1/N²) Σ_ij H(d_ij / mean d − t_ij / mean t), the module of `fastkd.rkd_distance`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class RKDAngleLoss(LossModule, function=relational.rkd_angle):
    """(1/N³) Σ_ijk H(cos ∠s_ijk − cos ∠t_ijk), the module of `fastkd.rkd_angle`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class RKDLoss(LossModule, function=relational.rkd):
    """distance_weight · rkd_distance + angle_weight · rkd_angle, the module of `fastkd.rkd`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class SimilarityPreservingLoss(LossModule, function=correlation.similarity_preserving):
    """(1/N²) Σ_ij (G_ij / ‖G_i‖ − T_ij / ‖T_i‖)², the module of `fastkd.similarity_preserving`.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019. arXiv:1907.09682
    """


class PKTLoss(LossModule, function=correlation.pkt):
    """(1/N²) Σ_ij p_ij log((p_ij + ε) / (q_ij + ε)), the module of `fastkd.pkt`.

    Passalis and Tefas, Probabilistic Knowledge Transfer, 2018. arXiv:1803.10837
    """


class CorrelationCongruenceLoss(LossModule, function=correlation.correlation_congruence):
    """Σ_i |s_i − t_i| · |s_i+1 − t_i+1| / (N−1), the module of `fastkd.correlation_congruence`.

    Peng et al., Correlation Congruence for Knowledge Distillation, 2019. arXiv:1904.01802
    """


class DISTLoss(LossModule, function=correlation.dist_kd):
    """T² [β (1 − mean ρ(q_i, p_i)) + γ (1 − mean ρ(q_·v, p_·v))], the module of `fastkd.dist_kd`.

    Huang et al., Knowledge Distillation from A Stronger Teacher, 2022. arXiv:2205.10536
    """


class MLKDLoss(LossModule, function=multi_level.mlkd):
    """KL of examples, and Gram matrices of examples and classes, the module of `fastkd.mlkd`.

    Jin et al., Multi-Level Logit Distillation, 2023
    """


class InfoNCELoss(LossModule, function=contrastive.info_nce):
    """(1/N) Σ_i −log e^{s₊} / (e^{s₊} + λ Σ e^{s₋}), the module of `fastkd.info_nce`.

    Args:
        queue_size: How many keys of the batches before are negatives too. The oldest leave first.
            `queue` has [queue_size, D] from the first step on, which tells D, and the dtype of the
            keys; only what is filled is used. It is saved with the state and copied with the
            module, and it is no buffer: nothing averages it, and DistributedDataParallel leaves
            each rank its own. In training a call adds its keys, with a `group` those of all ranks.
            Activation checkpointing around the module would see them already: recompute the
            embeddings, not the loss. While it fills, torch.compile compiles each step anew: fill it
            before.
        options: Those of `fastkd.info_nce`.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.
        arXiv:1807.03748. The queue: He et al., Momentum Contrast, 2020. arXiv:1911.05722
    """

    def __init__(self, *misplaced: Any, queue_size: int = 0, **options: Any) -> None:
        if not isinstance(queue_size, int) or isinstance(queue_size, bool) or queue_size < 0:
            raise ValueError(
                f"queue_size must be a whole number of keys, at least 0, got {queue_size!r}"
            )
        self._queue_size = queue_size
        super().__init__(*misplaced, **options)
        if queue_size:
            self.memory = Queue(queue_size)

    @property
    def queue_size(self) -> int:
        """Return the number of keys that the queue has room for."""
        return self._queue_size

    @property
    def queue(self) -> Tensor:
        """Return the keys of the queue [queue_size, D], 0 where none is filled in yet."""
        return self.memory.keys if self._queue_size else torch.empty(0, 0)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        false_negatives: Tensor | None = None,
        **of_a_batch: Any,
    ) -> Tensor:
        """Return the loss with the queue among the negatives, none of which is a false one."""
        if not self._queue_size or not isinstance(key, Tensor) or key.ndim != 2:
            return super().forward(query, key, negatives, false_negatives, **of_a_batch)
        queue = self.memory.like(key)
        bank: Any = queue if negatives is None else negatives
        if isinstance(negatives, Tensor):
            if negatives.ndim == 3:
                raise ValueError(
                    f"a queue has negatives of all queries, got negatives {[*negatives.shape]} of "
                    "each query: pass a bank [M, D], or take an InfoNCELoss without a queue"
                )
            if negatives.shape[1:] == queue.shape[1:]:  # otherwise the function says what is wrong
                bank = torch.cat([negatives, queue])
        if isinstance(false_negatives, Tensor) and false_negatives.ndim == 2:
            none = false_negatives.new_zeros(len(false_negatives), len(queue))
            false_negatives = torch.cat([false_negatives, none], 1)
        loss = super().forward(query, key, bank, false_negatives, **of_a_batch)
        if self.training:
            with torch.no_grad():
                (keys,), _ = Ranks.of(self.group).gather(key.detach())
                self.memory.add(keys)
        return loss

    def _is_in_empty_batch(self, parameter: inspect.Parameter, options: Mapping[str, Any]) -> bool:
        if parameter.name == "negatives":
            return self._queue_size > 0 and not options["in_batch_negatives"]
        return super()._is_in_empty_batch(parameter, options)

    def extra_repr(self) -> str:
        return f"queue_size={self._queue_size}, {super().extra_repr()}"


class ClipLoss(LossModule, function=contrastive.clip_contrastive):
    """½ (CE of the rows + CE of the columns), the module of `fastkd.clip_contrastive`.

    Radford et al., Learning Transferable Visual Models, 2021. arXiv:2103.00020
    """


class SigLipLoss(LossModule, function=contrastive.siglip):
    """(1/N) Σ_ij softplus(−y_ij (scale · ⟨image_i, text_j⟩ + bias)), the module of `fastkd.siglip`.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """


class NTXentLoss(LossModule, function=contrastive.nt_xent):
    """(1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij}, the module of `fastkd.nt_xent`.

    Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020. arXiv:2002.05709
    """


class SupConLoss(LossModule, function=contrastive.sup_con):
    """mean_i (1/|P_i|) Σ_{p∈P_i} −log e^{s_ip} / Σ_{j≠i} e^{s_ij}, the module of `fastkd.sup_con`.

    Khosla et al., Supervised Contrastive Learning, 2020. arXiv:2004.11362
    """


class SimilarityKLLoss(LossModule, function=contrastive.similarity_kl):
    """(1/N) Σ_i KL(softmax_j t_ij ‖ softmax_j s_ij), the module of `fastkd.similarity_kl`.

    Fang et al., SEED, 2021, arXiv:2101.04731; Yang et al., CLIP-KD, 2024, arXiv:2307.12732
    """


class DINOLoss(_centers.CentredLoss, function=self_distillation.dino):
    """mean_tv H(softmax((t − c) / T_t), softmax(s_v / T_s)), the module of `fastkd.dino`.

    A call in training has the loss of the centre that the calls before left, and then moves it to
    m c + (1 − m) mean t, the mean over all crops of the teacher and all images, with a `group`
    those of all ranks. With centering="sinkhorn" it has the loss of its own centre, which
    `fastkd.sinkhorn_center` makes of all crops of the teacher, as in DINOv2.

    Args:
        n_prototypes: K, the length of the centre c: a buffer that is saved with the state.
        center_momentum: m in [0, 1].
        centering: "mean" or "sinkhorn".
        sinkhorn_iterations: Those of "sinkhorn".
        options: Those of `fastkd.dino`.

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
        arXiv:2104.14294
    """

    empty_shape = (2, 0, 1)

    def forward(  # type: ignore[override]
        self,
        student: self_distillation.Crops,
        teacher: self_distillation.Crops,
        **of_a_batch: Any,
    ) -> Tensor:
        """Return the loss with the present centre, which in training moves afterwards."""
        center = self.center
        if self.centering == "sinkhorn":
            self._check_batch(student=student, teacher=teacher)
            center = self._sinkhorn_center(crops.constant(teacher))
        loss = super().forward(student, teacher, center, **of_a_batch)
        if self.training:
            self._follow(crops.constant(teacher), center)
        return loss


class IBOTLoss(_centers.CentredLoss, function=self_distillation.ibot):
    """mean of H(softmax((t − c) / T_t), softmax(s / T_s)), the module of `fastkd.ibot`.

    The mean is over the masked patches of an image, and then over the images. The centre follows
    as that of `DINOLoss`, with the mean of the teacher's outputs for masked patches, as in DINOv2.

    Args:
        n_prototypes: K, the length of the centre c: a buffer that is saved with the state.
        center_momentum: m in [0, 1].
        centering: "mean" or "sinkhorn".
        sinkhorn_iterations: Those of "sinkhorn".
        group: A torch.distributed process group, or "world" for all ranks, from whose patches the
            centre is made.
        options: Those of `fastkd.ibot`.

    Reference:
        Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, 2022. arXiv:2111.07832
    """

    empty_shape = (0, 1, 1)

    def __init__(self, n_prototypes: int, *misplaced: Any, group: Any = None, **options: Any):
        if not isinstance(group, str):  # a name is looked up at the call
            _option_checks.process_group(group)
        super().__init__(n_prototypes, *misplaced, **options)
        self.group = group

    def forward(  # type: ignore[override]
        self, student_patches: Tensor, teacher_patches: Tensor, mask: Tensor, **of_a_batch: Any
    ) -> Tensor:
        """Return the loss with the present centre, which in training moves afterwards."""
        batch, center = (student_patches, teacher_patches, mask), self.center
        if self.centering == "sinkhorn":
            self._check_batch(
                student_patches=student_patches, teacher_patches=teacher_patches, mask=mask
            )
            center = self._sinkhorn_center(teacher_patches, mask)
        loss = super().forward(*batch, center, **of_a_batch)
        if self.training:
            self._follow(teacher_patches, center, as_bool(mask))
        return loss

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        if name == "mask":
            return torch.empty_like(empty[..., 0], dtype=torch.bool)
        return super()._of_empty_batch(name, empty, options)


class KoLeoLoss(LossModule, function=self_distillation.koleo):
    """−mean_i log(min_{j≠i} ‖x_i − x_j‖ + ε) of unit vectors, the module of `fastkd.koleo`.

    Sablayrolles et al., Spreading Vectors for Similarity Search, 2019. arXiv:1806.03198
    """

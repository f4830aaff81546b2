"""The losses as modules: options at construction, tensors at the call.

``fastkd.KDLoss(temperature=2.0)(student_logits, teacher_logits, labels)`` is
``fastkd.kd(student_logits, teacher_logits, labels, temperature=2.0)``. A module has the options of
its function and takes at the call what belongs to a batch: the tensors, `weights`, `normalizer`.
It has no parameters, and no state but the queue of `InfoNCELoss` and the centre of `DINOLoss`. Its
`options` may be changed later, for example to anneal the temperature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import (
    _checks,
    contrastive,
    correlation,
    divergence,
    relational,
    self_distillation,
    vanilla,
)
from fastkd._backend import backend
from fastkd._precision import compute_dtype
from fastkd._ranks import Ranks
from fastkd.problems import _crops as crops

_OF_A_BATCH = ("labels", "weights", "normalizer")  # keyword parameters that belong to a batch
_OF_A_MODULE = ("center",)  # parameters that a module keeps as its state


class _Loss(nn.Module):
    """A loss as a module; the subclass names its function: ``class KDLoss(_Loss, function=kd)``."""

    function: Callable[..., Any]
    defaults: dict[str, Any]
    empty_shape: tuple[int, ...] = (0, 1)  # of a tensor of no examples

    def __init_subclass__(cls, function: Callable[..., Any] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if function is None:  # a user's subclass of a loss
            return
        parameters = inspect.signature(function).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_A_BATCH]
        cls.function = staticmethod(function)
        cls.defaults = {p.name: p.default for p in options}
        batch = [p for p in parameters if p not in options and p.name not in _OF_A_MODULE]
        _, *own = inspect.signature(cls.__init__).parameters.values()
        own = [p for p in own if p.kind is not p.VAR_KEYWORD]
        at_construction = sorted(options + own, key=lambda p: p.kind)  # positional ones first
        cls.__init__ = _with_signature(cls.__init__, at_construction)  # type: ignore[method-assign]
        cls.forward = _with_signature(cls.forward, batch)  # type: ignore[method-assign]

    def __init__(self, **options: Any) -> None:
        """Keep the options of the function, which raises TypeError or ValueError for wrong ones."""
        super().__init__()
        _checks.options(options, self.defaults, type(self).__name__)
        self.options = self.defaults | options
        self._check_options()

    def forward(self, *tensors: Tensor, **of_a_batch: Any) -> Any:
        """Return the loss of the function with these options."""
        return self.function(*tensors, **of_a_batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _check_options(self) -> None:
        """Let the function check the options now, on an empty batch, not in the first step."""
        numbers = [option for option in self.options.values() if isinstance(option, Tensor)]
        device = numbers[0].device if numbers else "cpu"
        other: dict[str, Any] = {"labels": torch.empty(0, dtype=torch.int64, device=device)}
        other |= dict.fromkeys(("logit_scale", "logit_bias"), 1.0)
        needed = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "labels")
        ]
        batch = [other.get(name, torch.empty(self.empty_shape, device=device)) for name in needed]
        with backend("formula"):  # because an engine may be unable to run on an empty batch
            self.function(*batch, **self.options)


def _with_signature(method: Callable, parameters: Iterable[inspect.Parameter]) -> Callable:
    """Return the method with a signature of these parameters, for help() and inspect."""

    @functools.wraps(method)
    def same(self: _Loss, *arguments: Any, **options: Any) -> Any:
        return method(self, *arguments, **options)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    same.__signature__ = inspect.Signature([me, *parameters])  # type: ignore[attr-defined]
    return same


class ForwardKLLoss(_Loss, function=divergence.forward_kl):
    """T² KL(p ‖ q), the module of `fastkd.forward_kl`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """


class ReverseKLLoss(_Loss, function=divergence.reverse_kl):
    """T² KL(q ‖ p), the module of `fastkd.reverse_kl`.

    Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2024. arXiv:2306.08543
    """


class JensenShannonLoss(_Loss, function=divergence.jensen_shannon):
    """T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)], the module of `fastkd.jensen_shannon`.

    Agarwal et al., On-Policy Distillation of Language Models, 2024. arXiv:2306.13649
    """


class SkewKLLoss(_Loss, function=divergence.skew_kl):
    """T² KL(p ‖ α p + (1 − α) q), the module of `fastkd.skew_kl`.

    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """


class SkewReverseKLLoss(_Loss, function=divergence.skew_reverse_kl):
    """T² KL(q ‖ (1 − α) p + α q), the module of `fastkd.skew_reverse_kl`.

    Ko et al., DistiLLM: Towards Streamlined Distillation, 2024. arXiv:2402.03898
    """


class SymmetricKLLoss(_Loss, function=divergence.symmetric_kl):
    """T² [w KL(p ‖ q) + (1 − w) KL(q ‖ p)], the module of `fastkd.symmetric_kl`.

    Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946
    """


class TotalVariationLoss(_Loss, function=divergence.total_variation):
    """T² ½ Σ |p − q|, the module of `fastkd.total_variation`.

    Wen et al., f-Divergence Minimization for Knowledge Distillation, 2023. arXiv:2307.15190
    """


class SoftCrossEntropyLoss(_Loss, function=divergence.soft_cross_entropy):
    """−T² Σ p log q, the module of `fastkd.soft_cross_entropy`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """


class LogitMSELoss(_Loss, function=divergence.logit_mse):
    """T² (1/V) Σ ((z_s − z_t) / T)², the module of `fastkd.logit_mse`.

    Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014. arXiv:1312.6184
    """


class KDLoss(_Loss, function=vanilla.kd):
    """α CE(q at T = 1, labels) + (1 − α) T² D(p, q), the module of `fastkd.kd`.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
    """


class RKDDistanceLoss(_Loss, function=relational.rkd_distance):
    """(1/N²) Σ_ij H(d_ij / mean d − t_ij / mean t), the module of `fastkd.rkd_distance`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class RKDAngleLoss(_Loss, function=relational.rkd_angle):
    """(1/N³) Σ_ijk H(cos ∠s_ijk − cos ∠t_ijk), the module of `fastkd.rkd_angle`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class RKDLoss(_Loss, function=relational.rkd):
    """distance_weight · rkd_distance + angle_weight · rkd_angle, the module of `fastkd.rkd`.

    Park et al., Relational Knowledge Distillation, 2019. arXiv:1904.05068
    """


class SimilarityPreservingLoss(_Loss, function=correlation.similarity_preserving):
    """(1/N²) Σ_ij (G_ij / ‖G_i‖ − T_ij / ‖T_i‖)², the module of `fastkd.similarity_preserving`.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019. arXiv:1907.09682
    """


class PKTLoss(_Loss, function=correlation.pkt):
    """(1/N²) Σ_ij p_ij log((p_ij + ε) / (q_ij + ε)), the module of `fastkd.pkt`.

    Passalis and Tefas, Probabilistic Knowledge Transfer, 2018. arXiv:1803.10837
    """


class CorrelationCongruenceLoss(_Loss, function=correlation.correlation_congruence):
    """Σ_i |s_i − t_i| · |s_i+1 − t_i+1| / (N−1), the module of `fastkd.correlation_congruence`.

    Peng et al., Correlation Congruence for Knowledge Distillation, 2019. arXiv:1904.01802
    """


class DISTLoss(_Loss, function=correlation.dist_kd):
    """T² [β (1 − mean ρ(q_i, p_i)) + γ (1 − mean ρ(q_·v, p_·v))], the module of `fastkd.dist_kd`.

    Huang et al., Knowledge Distillation from A Stronger Teacher, 2022. arXiv:2205.10536
    """


class InfoNCELoss(_Loss, function=contrastive.info_nce):
    """(1/N) Σ_i −log e^{s₊} / (e^{s₊} + λ Σ e^{s₋}), the module of `fastkd.info_nce`.

    Args:
        queue_size: How many keys of the batches before are negatives too. The oldest leave first.
            The queue is a buffer that is saved with the state and grows until it is full. In
            training a call adds its own keys, with a `group` those of all ranks. Activation
            checkpointing around the module would see them already: recompute the embeddings, not
            the loss. DistributedDataParallel gives all ranks the queue of the first one unless they
            have one queue anyway, by `group`.
        options: Those of `fastkd.info_nce`.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.
        arXiv:1807.03748. The queue: He et al., Momentum Contrast, 2020. arXiv:1911.05722
    """

    queue: Tensor

    def __init__(self, *, queue_size: int = 0, **options: Any) -> None:
        if not isinstance(queue_size, int) or isinstance(queue_size, bool) or queue_size < 0:
            raise ValueError(
                f"queue_size must be a whole number of keys, at least 0, got {queue_size!r}"
            )
        self.queue_size = queue_size
        super().__init__(**options)
        self.register_buffer("queue", torch.empty(0, 0), persistent=queue_size > 0)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, negatives: Tensor | None = None
    ) -> Tensor:
        """Return the loss with the queue among the negatives."""
        if not self.queue_size:
            return self.function(query, key, negatives, **self.options)
        queue = (self.queue if len(self.queue) else key.detach()[:0]).to(key)
        if key.ndim == 2 and queue.shape[1] != key.shape[1]:
            raise ValueError(
                f"the queue holds keys of D = {queue.shape[1]}, got keys {[*key.shape]}: another "
                "width needs a new InfoNCELoss"
            )
        bank = queue if negatives is None else torch.cat([negatives, queue])
        loss = self.function(query, key, bank, **self.options)
        if self.training:
            self._add(queue, key.detach())
        return loss

    @torch.no_grad()
    def _add(self, queue: Tensor, keys: Tensor) -> None:
        (keys,), _ = Ranks(self.options["group"]).gather(keys)
        # copied, because a view would keep all keys in memory and in the state
        self.queue = torch.cat([queue, keys])[-self.queue_size :].clone()

    def _check_options(self) -> None:
        if self.queue_size and not self.options["in_batch_negatives"]:
            numbers = [x for x in self.options.values() if isinstance(x, Tensor)]
            nobody = torch.empty(0, 1, device=numbers[0].device if numbers else "cpu")
            with backend("formula"):
                self.function(nobody, nobody, nobody, **self.options)
        else:
            super()._check_options()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}queue")
        if saved is not None and self.queue_size:  # a saved queue has any number of keys
            saved = state[f"{prefix}queue"] = saved[-self.queue_size :]
            self.queue = torch.empty_like(saved, device=self.queue.device)
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return f"queue_size={self.queue_size}, {super().extra_repr()}"


class ClipLoss(_Loss, function=contrastive.clip_contrastive):
    """½ (CE of the rows + CE of the columns), the module of `fastkd.clip_contrastive`.

    Radford et al., Learning Transferable Visual Models, 2021. arXiv:2103.00020
    """


class SigLipLoss(_Loss, function=contrastive.siglip):
    """(1/N) Σ_ij softplus(−y_ij (scale · ⟨image_i, text_j⟩ + bias)), the module of `fastkd.siglip`.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023. arXiv:2303.15343
    """


class NTXentLoss(_Loss, function=contrastive.nt_xent):
    """(1/2N) Σ_i −log e^{s_i₊} / Σ_{j≠i} e^{s_ij}, the module of `fastkd.nt_xent`.

    Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020. arXiv:2002.05709
    """


class SupConLoss(_Loss, function=contrastive.sup_con):
    """mean_i (1/|P_i|) Σ_{p∈P_i} −log e^{s_ip} / Σ_{j≠i} e^{s_ij}, the module of `fastkd.sup_con`.

    Khosla et al., Supervised Contrastive Learning, 2020. arXiv:2004.11362
    """


class SimilarityKLLoss(_Loss, function=contrastive.similarity_kl):
    """(1/N) Σ_i KL(softmax_j t_ij ‖ softmax_j s_ij), the module of `fastkd.similarity_kl`.

    Fang et al., SEED, 2021, arXiv:2101.04731; Yang et al., CLIP-KD, 2024, arXiv:2307.12732
    """


class DINOLoss(_Loss, function=self_distillation.dino):
    """mean_tv H(softmax((t − c) / T_t), softmax(s_v / T_s)), the module of `fastkd.dino`.

    A call in training has the loss of the centre that the calls before left, and then moves it to
    m c + (1 − m) mean t, the mean over all crops of the teacher and all images, with a `group`
    those of all ranks.

    Args:
        n_prototypes: K, the length of the centre c: a buffer that is saved with the state.
        center_momentum: m in [0, 1].
        options: Those of `fastkd.dino`.

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
        arXiv:2104.14294
    """

    center: Tensor
    empty_shape = (2, 0, 1)

    def __init__(self, n_prototypes: int, *, center_momentum: float = 0.9, **options: Any) -> None:
        _checks.at_least_1(n_prototypes=n_prototypes)
        _checks.fraction(center_momentum=center_momentum)
        super().__init__(**options)
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(n_prototypes))

    def forward(  # type: ignore[override]
        self, student: self_distillation.Crops, teacher: self_distillation.Crops
    ) -> Tensor:
        """Return the loss with the present centre, which in training moves afterwards."""
        loss = self.function(student, teacher, self.center, **self.options)
        if self.training:
            self._move_center(crops.constant(teacher))
        return loss

    @torch.no_grad()
    def _move_center(self, teacher: Tensor) -> None:
        total = teacher.sum((0, 1), dtype=compute_dtype(self.center))
        total = torch.cat([total, total.new_full((1,), len(teacher) * teacher.shape[1])])
        total = Ranks(self.options["group"]).sum(total)
        n = total[-1:]
        mean = total[:-1] / n.clamp(min=1)
        rate = (1 - self.center_momentum) * n.clamp(max=1)  # 0 images move nothing
        self.center.copy_(self.center.to(mean).lerp(mean, rate))

    def extra_repr(self) -> str:
        own = f"n_prototypes={len(self.center)}, center_momentum={self.center_momentum}"
        return f"{own}, {super().extra_repr()}"

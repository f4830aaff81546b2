"""The losses as modules: options at construction, tensors at the call.

``fastkd.KDLoss(temperature=2.0)(student_logits, teacher_logits, labels)`` is
``fastkd.kd(student_logits, teacher_logits, labels, temperature=2.0)``. A module has the options of
its function and takes at the call what belongs to a batch: the tensors, `weights`, `normalizer`.
It has no parameters. Its `options` may be changed later, for example to anneal the temperature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _checks, correlation, divergence, relational
from fastkd._engine import backend

_OF_A_BATCH = ("weights", "normalizer")  # keyword arguments that are not options


class _Loss(nn.Module):
    """The module of a function, which the subclass names: ``class KDLoss(_Loss, function=kd)``."""

    function: Callable[..., Any]
    defaults: dict[str, Any]

    def __init_subclass__(cls, function: Callable[..., Any] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if function is None:  # somebody's subclass of a loss
            return
        parameters = inspect.signature(function).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_A_BATCH]
        cls.function = staticmethod(function)
        cls.defaults = {p.name: p.default for p in options}
        batch = [p for p in parameters if p not in options]
        cls.__init__ = _with_signature(cls.__init__, options)  # type: ignore[method-assign]
        cls.forward = _with_signature(cls.forward, batch)  # type: ignore[method-assign]

    def __init__(self, **options: Any) -> None:
        """The options of the function, which raises TypeError or ValueError for wrong ones."""
        super().__init__()
        _checks.options(options, self.defaults, type(self).__name__)
        self.options = self.defaults | options
        self._check_options()

    def forward(self, *tensors: Tensor, **of_a_batch: Any) -> Any:
        """The function with these options."""
        return self.function(*tensors, **of_a_batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _check_options(self) -> None:
        """Let the function judge them now, on an empty batch, and not in the first step."""
        numbers = [option for option in self.options.values() if isinstance(option, Tensor)]
        device = numbers[0].device if numbers else "cpu"
        batch = [torch.empty(0, 1, device=device)] * 2
        if "labels" in inspect.signature(self.function).parameters:
            batch.append(torch.empty(0, dtype=torch.int64, device=device))
        with backend("formula"):  # whether an engine can run depends on the batches to come
            self.function(*batch, **self.options)


def _with_signature(method: Callable, parameters: Iterable[inspect.Parameter]) -> Callable:
    """The method showing these parameters to help() and inspect, instead of * and **."""

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


class KDLoss(_Loss, function=divergence.kd):
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

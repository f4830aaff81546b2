"""The losses of features as modules, as those of `fastkd.modules`.

Some own what is trained with them: `VIDLoss` a regressor and the variances. Their parameters belong
to the optimizer, and are saved, moved and copied with the module.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _checks, spatial, texture, tokens
from fastkd._module import LossModule
from fastkd.problems import _maps as maps

# ---------------------------------------------------------------------------------- places and bins


class ChannelWiseLoss(LossModule, function=spatial.channel_wise):
    """T² (1/BC) Σ_bc KL(p_bc ‖ q_bc) over positions, the module of `fastkd.channel_wise`.

    Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, 2021. arXiv:2011.13256
    """

    empty_shape = (0, 1, 1)


class LocalizationLoss(LossModule, function=spatial.localization):
    """T² KL(p ‖ q) of the edges of boxes, the module of `fastkd.localization`.

    Zheng et al., Localization Distillation for Dense Object Detection, 2022. arXiv:2102.12252
    """


# ------------------------------------------------------------------------------ textures, attention


class NSTLoss(LossModule, function=texture.nst):
    """MMD² between the channels of two networks, the module of `fastkd.nst`.

    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    arXiv:1707.01219
    """

    empty_shape = (0, 1, 1)


class FSPLoss(LossModule, function=texture.fsp):
    """(1/C C') Σ_ij (G_ij − H_ij)² of two layers, the module of `fastkd.fsp`.

    Yim et al., A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning, 2017
    """

    empty_shape = (0, 1, 1)

    def _of_empty_batch(self, name: str, empty: Tensor) -> Any:
        return [empty, empty]


class AttentionMSELoss(LossModule, function=texture.attention_mse):
    """The mean of (s_ij − t_ij)² of attention scores, the module of `fastkd.attention_mse`.

    Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
    arXiv:1909.10351
    """

    empty_shape = (0, 1, 1)


class VIDLoss(LossModule, function=texture.vid):
    """mean ½ ((μ − t)² / σ² + log σ²), the module of `fastkd.vid`.

    It owns the regressor, which makes the mean μ of the student's maps, and the variances σ². The
    student's maps are pooled first where they are the larger ones. Give its parameters to the
    optimizer.

    Args:
        student_channels: The number of channels of the student's maps.
        teacher_channels: That of the teacher's maps.
        regressor: What makes [B, teacher_channels, ...] of the student's maps; by default three
            1×1 convolutions of maps [B, C, H, W] with ReLU between them and without bias, as
            RepDistiller and torchdistill have. `torch.nn.Identity()` takes maps as the mean.
        initial_variance: σ² at the beginning, above epsilon.
        options: Those of `fastkd.vid`.

    Reference:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019.
        arXiv:1904.05835
    """

    empty_shape = (0, 1, 1)
    variance_parameter: nn.Parameter

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *misplaced: Any,
        regressor: nn.Module | None = None,
        initial_variance: float = 5.0,
        **options: Any,
    ) -> None:
        _checks.at_least_1(student_channels=student_channels, teacher_channels=teacher_channels)
        super().__init__(*misplaced, **options)
        epsilon = float(self.options["epsilon"])
        _checks.number(epsilon, initial_variance=initial_variance)
        if regressor is None:
            regressor = nn.Sequential(
                nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            )
        self.regressor = regressor
        alpha = math.log(math.expm1(initial_variance - epsilon))
        parameter = nn.Parameter(torch.full((teacher_channels,), alpha))
        self.register_parameter("variance_parameter", parameter)

    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, **of_a_batch: Any
    ) -> Tensor:
        """Return the loss of the regressed maps with the present variances."""
        maps.same_examples(student, teacher)
        student, teacher = maps.of_the_smaller_size(student, teacher)
        mean = self.regressor(student)
        return super().forward(mean, teacher, self.variance_parameter, **of_a_batch)

    def _of_empty_batch(self, name: str, empty: Tensor) -> Any:
        return empty.new_zeros(1) if name == "variance_parameter" else empty


# ------------------------------------------------------------------------------------------- tokens


class TokenRelationLoss(LossModule, function=tokens.token_relation):
    """KL(softmax(X_t X_tᵀ / T) ‖ softmax(X_s X_sᵀ / T)), the module of `fastkd.token_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """


class MiniLMRelationLoss(LossModule, function=tokens.minilm_relation):
    """The relations of queries, keys and values, the module of `fastkd.minilm_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """

    def _of_empty_batch(self, name: str, empty: Tensor) -> Any:
        return [empty]


class GramAnchoringLoss(LossModule, function=tokens.gram_anchoring):
    """The mean of (cos(s_i, s_j) − cos(t_i, t_j))², the module of `fastkd.gram_anchoring`.

    Siméoni et al., DINOv3, 2025. arXiv:2508.10104
    """


class CKALoss(LossModule, function=tokens.cka):
    """1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), the module of `fastkd.cka`.

    Kornblith et al., Similarity of Neural Network Representations Revisited, 2019. arXiv:1905.00414
    """

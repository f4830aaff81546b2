"""The losses of features as modules, as those of `fastkd.modules`.

Two own what is trained with them: `HintLoss` a projector, `VIDLoss` a regressor and variances. Give
their parameters to the optimizer; they are saved, moved and copied with the module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _option_checks, _projectors, feature, spatial, texture, tokens
from fastkd._module import LossModule
from fastkd.problems import _features as features
from fastkd.problems import _maps as maps

# ---------------------------------------------------------------------------------------- features


class HintLoss(LossModule, function=feature.hint):
    """Σ w·v / Σ w of features brought to one width and size, the module of `fastkd.hint`.

    It owns a projector from the student's width to the teacher's, which is trained with the
    student. A projector of the teacher's features is fixed instead: trained with the student, both
    would agree best where neither says anything. One that is made here has orthogonal weights;
    a module of yours, for example principal components, is used as it is, without a gradient and
    in evaluation mode.

    Args:
        student_channels: The width of the student's features.
        teacher_channels: The width of the teacher's features. With equal widths, or none, there is
            no projector unless it is named.
        projector: "linear", of features in any dimension, which is a 1×1 convolution of maps; of
            maps [B, C, H, W] "conv1x1", "conv1x1-relu-conv1x1", as Ultralytics has, or
            "conv3x3-bn"; or a module. By default "linear" where the widths differ.
        side: Whose features are projected, "student" or "teacher".
        resize: What is done where the sizes differ: "pool" averages the larger one to the smaller
            in each dimension, "interpolate" brings the student's to the teacher's linearly, and by
            default it is an error. `weights` and `mask` are of the size that is compared.
        options: Those of `fastkd.hint`.

    Reference:
        Romero et al., FitNets: Hints for Thin Deep Nets, 2015. arXiv:1412.6550
    """

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *misplaced: Any,
        projector: str | nn.Module | None = None,
        side: str = "student",
        resize: str | None = None,
        **options: Any,
    ) -> None:
        _option_checks.one_of(("student", "teacher"), side=side)
        if resize is not None:
            _option_checks.one_of(_projectors.RESIZES, resize=resize)
        widths = {"student_channels": student_channels, "teacher_channels": teacher_channels}
        _option_checks.at_least_1(**{name: n for name, n in widths.items() if n is not None})
        super().__init__(*misplaced, **options)
        self.student_channels, self.teacher_channels = widths.values()
        self.side, self.resize = side, resize
        n_in, n_out = [*widths.values()][:: 1 if side == "student" else -1]
        self.projector = _projectors.projector(projector, n_in, n_out)
        if side == "teacher" and self.projector is not projector and self.projector is not None:
            _projectors.freeze(self.projector)
        self.train(self.training)

    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, **of_a_batch: Any
    ) -> Tensor:
        """Return the loss of the projected and resized features."""
        features.check_layers(student, teacher)
        student, teacher = self._brought_together(student, teacher)
        return super().forward(student, teacher, **of_a_batch)

    def _brought_together(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        places = features.dimensions(student, options["feature_dim"], options["batch_dim"])
        _projectors.check_width(student, places[0], self.student_channels, "student")
        _projectors.check_width(teacher, places[0], self.teacher_channels, "teacher")
        student, teacher = _projectors.of_one_size(student, teacher, *places, self.resize)
        if self.projector is None:
            return student, teacher
        if self.side == "student":
            return _projectors.project(self.projector, student, places[0]), teacher
        with torch.no_grad():
            return student, _projectors.project(self.projector, teacher, places[0])

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        """Return features of as many dimensions as the options speak of."""
        dims = [x for x in (options["feature_dim"], options["batch_dim"]) if isinstance(x, int)]
        return empty.new_empty([1] * max(3, *(x + 1 if x >= 0 else -x for x in dims)))

    def train(self, mode: bool = True) -> HintLoss:
        """Set training mode, but for a fixed projector, whose statistics must not move."""
        super().train(mode)
        if self.side == "teacher" and self.projector is not None:
            self.projector.eval()
        return self

    def extra_repr(self) -> str:
        own = f"side={self.side!r}, resize={self.resize!r}"
        return f"{own}, {super().extra_repr()}"


class EmbeddingMSELoss(LossModule, function=feature.embedding_mse):
    """(1/D) ‖s − t‖², the module of `fastkd.embedding_mse`.

    Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
    arXiv:1909.10351
    """


class AttentionTransferLoss(LossModule, function=feature.attention_transfer):
    """mean_bx (A/‖A‖ − T/‖T‖)² of maps A = Σ_c |s|^p, the module of `fastkd.attention_transfer`.

    Zagoruyko and Komodakis, Paying More Attention to Attention, 2017. arXiv:1612.03928
    """

    empty_shape = (0, 1, 1)


# ------------------------------------------------------------------------------ tokens and patches


class TokenRelationLoss(LossModule, function=tokens.token_relation):
    """KL(softmax(X_t X_tᵀ / T) ‖ softmax(X_s X_sᵀ / T)), the module of `fastkd.token_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """


class MiniLMRelationLoss(LossModule, function=tokens.minilm_relation):
    """The relations of queries, keys and values, the module of `fastkd.minilm_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """

    of_a_batch = ("mask",)  # the weights are those of the relations

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        return [empty]


class GramAnchoringLoss(LossModule, function=tokens.gram_anchoring):
    """The mean of (cos(s_i, s_j) − cos(t_i, t_j))², the module of `fastkd.gram_anchoring`.

    Siméoni et al., DINOv3, 2025. arXiv:2508.10104
    """


class CKALoss(LossModule, function=tokens.cka):
    """1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), the module of `fastkd.cka`.

    Kornblith et al., Similarity of Neural Network Representations Revisited, 2019. arXiv:1905.00414
    """


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

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
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
        _option_checks.at_least_1(
            student_channels=student_channels, teacher_channels=teacher_channels
        )
        super().__init__(*misplaced, **options)
        epsilon = float(self.options["epsilon"])
        _option_checks.number(epsilon, initial_variance=initial_variance)
        if regressor is None:
            regressor = nn.Sequential(
                nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            )
        self.regressor = regressor
        softplus = initial_variance - epsilon
        alpha = softplus + math.log(-math.expm1(-softplus))  # its inverse, without an overflow
        parameter = nn.Parameter(torch.full((teacher_channels,), alpha))
        self.register_parameter("variance_parameter", parameter)

    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, **of_a_batch: Any
    ) -> Tensor:
        """Return the loss of the regressed maps with the present variances."""
        maps.same_examples(student, teacher)
        student, teacher = maps.of_the_smaller_size(student, teacher)
        mean = _projectors.project(self.regressor, student, 1)
        return super().forward(mean, teacher, self.variance_parameter, **of_a_batch)

    def _of_empty_batch(self, name: str, empty: Tensor, options: Mapping[str, Any]) -> Any:
        return empty.new_zeros(1) if name == "variance_parameter" else empty

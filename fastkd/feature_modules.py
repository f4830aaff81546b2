"""The losses of features as modules, as those of `fastkd.modules`."""

from __future__ import annotations

from fastkd import tokens
from fastkd._module import LossModule


class TokenRelationLoss(LossModule, function=tokens.token_relation):
    """KL(softmax(X_t X_tᵀ / T) ‖ softmax(X_s X_sᵀ / T)), the module of `fastkd.token_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """


class MiniLMRelationLoss(LossModule, function=tokens.minilm_relation):
    """The relations of queries, keys and values, the module of `fastkd.minilm_relation`.

    Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021. arXiv:2012.15828
    """


class GramAnchoringLoss(LossModule, function=tokens.gram_anchoring):
    """The mean of (cos(s_i, s_j) − cos(t_i, t_j))², the module of `fastkd.gram_anchoring`.

    Siméoni et al., DINOv3, 2025. arXiv:2508.10104
    """


class CKALoss(LossModule, function=tokens.cka):
    """1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), the module of `fastkd.cka`.

    Kornblith et al., Similarity of Neural Network Representations Revisited, 2019. arXiv:1905.00414
    """

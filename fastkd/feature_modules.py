"""The losses of features as modules, as those of `fastkd.modules`."""

from __future__ import annotations

from fastkd import feature
from fastkd._module import LossModule


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

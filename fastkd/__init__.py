"""fastkd: every knowledge-distillation loss, exact, lean and fast."""

from fastkd._engine import backend
from fastkd._version import __version__
from fastkd.divergence import (
    forward_kl,
    jensen_shannon,
    kd,
    logit_mse,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    total_variation,
)
from fastkd.modules import (
    ForwardKLLoss,
    JensenShannonLoss,
    KDLoss,
    LogitMSELoss,
    ReverseKLLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    SkewKLLoss,
    SkewReverseKLLoss,
    SoftCrossEntropyLoss,
    SymmetricKLLoss,
    TotalVariationLoss,
)
from fastkd.relational import rkd, rkd_angle, rkd_distance

__all__ = [
    "ForwardKLLoss",
    "JensenShannonLoss",
    "KDLoss",
    "LogitMSELoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "SoftCrossEntropyLoss",
    "SymmetricKLLoss",
    "TotalVariationLoss",
    "__version__",
    "backend",
    "forward_kl",
    "jensen_shannon",
    "kd",
    "logit_mse",
    "reverse_kl",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "symmetric_kl",
    "total_variation",
]

"""fastkd: every knowledge-distillation loss, exact, lean and fast."""

from fastkd._backend import backend
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
from fastkd.self_distillation import dino

"""The cases of rows of logits that several files test, and the options of their divergences."""

from cases import CASES, LOSSES

# what is about ibot alone is in test_self_distillation.py
ROWS = [x for x in CASES if x.per_example and x.problem == "rows" and x.name != "ibot"]
SOFTMAXED = [case for case in ROWS if case.name != "logit_mse"]
EACH = [case for case in ROWS if case in LOSSES]
FEW = ("forward_kl", "jensen_shannon", "kd")  # a KL, a mixture, with labels: for kernels, quickly
LONG = 8999  # columns, more than stay on chip
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": dict(beta=0.2),
    "skew_kl": dict(skew=0.3),
    "skew_reverse_kl": dict(skew=0.3),
    "symmetric_kl": dict(weight=0.7),
    "total_variation": {},
    "soft_cross_entropy": {},
}

"""The same losses by other libraries, each as its documentation says, where it can be imported.

Each takes what the case takes and gives the case's loss: the mean over rows, times T². What a
library lacks is added outside, as its users must: liger-kernel takes log-probabilities or
probabilities, TRL knows no T², flash-linear-attention and quack have the cross-entropy of `kd`
alone (its divergence is the eager one). Divergences of hidden states are no peers of these.
torchdistill takes the outputs of modules by their paths.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable

import cases
import torch.nn.functional as F
from cases import T
from torch import Tensor

Loss = Callable[..., Tensor]


def liger() -> dict[str, Loss]:
    modules = importlib.import_module("liger_kernel.transformers")
    kl, tv = modules.LigerKLDIVLoss(reduction="batchmean"), modules.LigerTVDLoss("batchmean")
    cross_entropy = modules.LigerCrossEntropyLoss()

    def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
        return kl(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1)) * T**2

    def mixture(beta: float) -> Loss:
        loss = modules.LigerJSD(beta)
        return lambda student, teacher: (
            loss(F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)) * T**2
        )

    def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
        # its first argument gets the gradient
        return tv(F.softmax(student / T, -1), F.softmax(teacher / T, -1)) * T**2

    def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        # a copy: its cross-entropy writes the gradient over the logits that it gets
        return 0.5 * cross_entropy(student.clone(), labels) + 0.5 * forward_kl(student, teacher)

    return {
        "forward_kl": forward_kl,
        "reverse_kl": mixture(1.0),
        "jensen_shannon": mixture(0.5),
        "total_variation": total_variation,
        "kd": kd,
    }


def trl() -> dict[str, Loss]:
    loss = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss

    def mixture(beta: float) -> Loss:
        return lambda student, teacher: loss(student, teacher, beta=beta, temperature=T) * T**2

    return {
        "forward_kl": mixture(0),
        "reverse_kl": mixture(1),
        "jensen_shannon": mixture(0.5),
    }


def flash_linear_attention() -> dict[str, Loss]:
    module = importlib.import_module("fla.modules.fused_cross_entropy")
    return {"kd": _kd(module.FusedCrossEntropyLoss())}


def quack() -> dict[str, Loss]:
    return {"kd": _kd(importlib.import_module("quack").cross_entropy)}


def torchdistill() -> dict[str, Loss]:
    module = importlib.import_module("torchdistill.losses.mid_level")

    def relations(distance_weight: float, angle_weight: float) -> Loss:
        loss = module.RKDLoss("layer", "layer", distance_weight, angle_weight, "mean")
        return lambda student, teacher: loss(
            {"layer": {"output": student}}, {"layer": {"output": teacher}}
        )

    return {
        "rkd_distance": relations(1.0, 0.0),
        "rkd_angle": relations(0.0, 1.0),
        "rkd": relations(25.0, 50.0),
    }


def _kd(cross_entropy: Loss) -> Loss:
    return lambda student, teacher, labels: (
        0.5 * cross_entropy(student, labels) + 0.5 * cases.forward_kl(student, teacher)
    )


# the name on PyPI
PEERS: dict[str, Callable[[], dict[str, Loss]]] = {
    "liger-kernel": liger,
    "trl": trl,
    "flash-linear-attention": flash_linear_attention,
    "quack-kernels": quack,
    "torchdistill": torchdistill,
}


def available() -> tuple[dict[str, dict[str, Loss]], dict[str, str]]:
    """The losses of each peer that can be imported, and each peer's version or what it lacks."""
    losses, found = {}, {}
    for name, peer in PEERS.items():
        try:
            losses[name] = peer()
            found[name] = importlib.metadata.version(name)
        except Exception as error:  # whatever an import may raise
            found[name] = f"cannot be imported: {type(error).__name__}: {error}"[:300]
    return losses, found

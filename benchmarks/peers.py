"""Import the same losses by other libraries, each as its documentation says.

Each takes what the case takes and gives the case's loss: the mean over rows, times T². What a
library lacks is added outside, as its users must: liger-kernel takes log-probabilities or
probabilities, TRL knows no T², torchdistill takes the outputs of modules by their paths.
Divergences of hidden states are no peers of these. A cross-entropy with a linear layer is an
InfoNCE whose weights are the keys.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from eager import T
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

    fused = modules.LigerFusedLinearCrossEntropyLoss()
    return {
        "forward_kl": forward_kl,
        "reverse_kl": mixture(1.0),
        "jensen_shannon": mixture(0.5),
        "total_variation": total_variation,
        "kd": kd,
        "info_nce": _info_nce(lambda query, key, own: fused(key, query, own)),
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


def mid_level_of_torchdistill() -> Any:
    """Import the losses without torchvision, which the package asks for."""
    stub("torchdistill.common.constant", def_logger=logging.getLogger("torchdistill"))
    return alone("torchdistill.losses.mid_level", "torchdistill.common")


def torchdistill() -> dict[str, Loss]:
    module = mid_level_of_torchdistill()

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


def open_clip() -> dict[str, Loss]:
    module = alone("open_clip.loss")
    return {"clip_contrastive": module.ClipLoss(), "siglip": module.SigLipLoss()}


def pytorch_metric_learning() -> dict[str, Loss]:
    losses = importlib.import_module("pytorch_metric_learning.losses")

    def views(temperature: float, **options: bool) -> Loss:
        # of one positive each it is the loss of NTXentLoss, without its N³ numbers
        return losses.SelfSupervisedLoss(losses.SupConLoss(temperature), **options)

    return {
        "info_nce": views(0.07, symmetric=False),
        "nt_xent": views(0.5),
        "sup_con": losses.SupConLoss(0.1),  # averages over anchors with a positive, as ours
    }


def lightly() -> dict[str, Loss]:
    # of a memory bank, which is off
    others = ["lightly.models", "lightly.models.modules", "lightly.models.utils"]
    return {"nt_xent": alone("lightly.loss.ntx_ent_loss", *others).NTXentLoss(0.5)}


def info_nce_pytorch() -> dict[str, Loss]:
    return {"info_nce": importlib.import_module("info_nce").InfoNCE(0.07)}


def torch_linear_cross_entropy() -> dict[str, Loss]:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it is the eager expression

    def fused(query: Tensor, key: Tensor, own: Tensor) -> Tensor:
        return F.linear_cross_entropy(query, key, own, options=options)

    return {"info_nce": _info_nce(fused)}


def cut_cross_entropy() -> dict[str, Loss]:
    module = importlib.import_module("cut_cross_entropy")
    return {"info_nce": _info_nce(module.linear_cross_entropy)}


def quack() -> dict[str, Loss]:
    module = importlib.import_module("quack.linear_cross_entropy")
    return {"info_nce": _info_nce(module.chunked_linear_cross_entropy)}


def _info_nce(fused: Loss) -> Loss:
    """Make InfoNCE out of a linear layer with its cross-entropy, which has no temperature."""

    def info_nce(query: Tensor, key: Tensor) -> Tensor:
        own = torch.arange(len(query), device=query.device)
        return fused(F.normalize(query) / 0.07, F.normalize(key), own)

    return info_nce


def alone(name: str, *others: str) -> Any:
    """Import a module with its packages and others left empty, which import much more than it."""
    parts = name.split(".")
    for left_empty in [*(".".join(parts[:i]) for i in range(1, len(parts))), *others]:
        if left_empty in sys.modules:
            continue
        spec = importlib.util.find_spec(left_empty)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {left_empty!r}")
        sys.modules[left_empty] = module = types.ModuleType(left_empty)
        module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations or [])
    return importlib.import_module(name)


def stub(name: str, **attributes: Any) -> None:
    """Put a module with these attributes alone where imports look for it."""
    if name not in sys.modules:
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(attributes)


# by the name on PyPI; after a space, which of its losses
PEERS: dict[str, Callable[[], dict[str, Loss]]] = {
    "liger-kernel": liger,
    "trl": trl,
    "torchdistill": torchdistill,
    "open_clip_torch": open_clip,
    "pytorch-metric-learning": pytorch_metric_learning,
    "lightly": lightly,
    "info-nce-pytorch": info_nce_pytorch,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
    "quack-kernels": quack,
}
# what some of them need that is not to be had everywhere, to be said where they are missing
NEEDS = {
    "torch linear_cross_entropy": "torch 2.13",
    "quack-kernels": "nvidia-cutlass-dsl, which is no wheel of pure Python",
    "trl": "transformers, accelerate and datasets",
}
MISSING = "cannot be imported"
NEED_A_GPU = ("liger-kernel", "cut-cross-entropy", "quack-kernels")
# numbers in the largest temporary of those that take more or less than eager PyTorch
TEMPORARIES: dict[str, Callable[[tuple[int, ...]], int]] = {
    "pytorch-metric-learning": lambda shape: 2 * shape[0] ** 2,  # indices of pairs, as int64
    **dict.fromkeys(("torch linear_cross_entropy", "liger-kernel", "cut-cross-entropy"), math.prod),
}


def available() -> tuple[dict[str, dict[str, Loss]], dict[str, str]]:
    """Import the losses of each peer, and return with them each peer's version or what it lacks."""
    losses, found = {}, {}
    for name, peer in PEERS.items():
        try:
            losses[name] = peer()
            found[name] = importlib.metadata.version(name.split()[0])
        except Exception as error:  # whatever an import may raise
            needs = f" (it needs {NEEDS[name]})" if name in NEEDS else ""
            why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            found[name] = f"{MISSING}{needs}: {why}"
    return losses, found

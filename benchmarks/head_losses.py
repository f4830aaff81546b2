"""Losses of hidden states under two heads: fastkd's, eager PyTorch's and those of other libraries.

Each takes a loss and a batch and gives α CE + (1 − α) T² D, the mean over tokens. What a library
lacks is added outside, as its users must: only liger-kernel has both terms in one call, and none of
them has T².
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

_TRL_CHUNK = 32768  # entries of the vocabulary that its trainers have made at once
BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}


class Loss(NamedTuple):
    """α CE + (1 − α) T² D, without D where α is 1."""

    divergence: str
    alpha: float = 0.0
    temperature: float = 1.0


class Batch(NamedTuple):
    """N tokens as the heads get them: hidden states [N, H], heads [V, H], biases [V]."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None


Contender = Callable[[Loss, Batch], Tensor]


def linear_kd(loss: Loss, x: Batch) -> Tensor:
    student = x.student, x.student_weight
    if loss.alpha == 1:
        return fastkd.linear_kd(*student, labels=x.labels, student_bias=x.student_bias, alpha=1.0)
    return fastkd.linear_kd(
        *student, x.teacher, x.teacher_weight, x.labels if loss.alpha else None,
        student_bias=x.student_bias, teacher_bias=x.teacher_bias,
        alpha=loss.alpha, temperature=loss.temperature, divergence=loss.divergence,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ eager


def forward_kl(z: Tensor, z_teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(z, -1), F.softmax(z_teacher, -1), reduction="batchmean")


def reverse_kl(z: Tensor, z_teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(z, -1), F.log_softmax(z_teacher, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def jensen_shannon(z: Tensor, z_teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(z, -1), F.log_softmax(z_teacher, -1)
    log_half = torch.tensor(0.5, dtype=log_q.dtype, device=log_q.device).log()
    log_m = torch.logsumexp(torch.stack([log_q + log_half, log_p + log_half]), dim=0)
    of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (of_p + of_q) / 2


EAGER = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}


def eager(loss: Loss, x: Batch) -> Tensor:
    alpha, T = loss.alpha, loss.temperature
    z = _widened(F.linear(x.student, x.student_weight, x.student_bias))
    if alpha == 1:
        return F.cross_entropy(z, x.labels)
    with torch.no_grad():
        z_teacher = _widened(F.linear(x.teacher, x.teacher_weight, x.teacher_bias))
    if T != 1:  # otherwise nobody divides
        divergence = EAGER[loss.divergence](z / T, z_teacher / T) * T**2
    else:
        divergence = EAGER[loss.divergence](z, z_teacher)
    return alpha * F.cross_entropy(z, x.labels) + (1 - alpha) * divergence if alpha else divergence


def _widened(z: Tensor) -> Tensor:
    """Return logits in float32, in which people take the softmax of those of half precision."""
    return z if z.dtype == torch.float64 else z.float()


def expressions() -> str:
    """Return the source of what eager PyTorch computes."""
    return "\n".join(map(inspect.getsource, (*EAGER.values(), eager, _widened)))


# ------------------------------------------------------------------------------------------ peers


def unsloth() -> Contender:
    module = peers.alone("unsloth_zoo.fused_losses.fused_linear")

    def cross_entropy(x: Batch) -> Tensor:
        return module.fused_linear_cross_entropy(
            x.student, x.student_weight, x.student_bias, x.labels, divisor=len(x.labels)
        )

    def loss_of(loss: Loss, x: Batch) -> Tensor:
        if loss.alpha == 1:
            return cross_entropy(x)
        divergence = module.fused_linear_jsd(
            x.student, x.student_weight, x.teacher, x.teacher_weight,
            beta=BETAS[loss.divergence], temperature=loss.temperature,
            student_bias=x.student_bias, teacher_bias=x.teacher_bias,
        )  # fmt: skip
        divergence = divergence * loss.temperature**2 if loss.temperature != 1 else divergence
        if not loss.alpha:
            return divergence
        return loss.alpha * cross_entropy(x) + (1 - loss.alpha) * divergence

    return loss_of


def trl() -> Contender:
    def nothing(*parameters: Tensor) -> Any:
        return contextlib.nullcontext()

    # it takes two functions of what it would import, which are these without DeepSpeed
    functions: dict[str, dict[str, Any]] = {
        "trl.trainer.utils": {"maybe_gather_lm_head_ctx": nothing}
    }
    if importlib.util.find_spec("transformers") is None:
        functions |= {
            "transformers": {},
            "transformers.utils": {"is_triton_available": lambda: False},
        }
    for name, of_module in functions.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(of_module)
    try:
        divergences = peers.alone("trl.kernels.chunked_divergence", "trl.trainer")
        log_probabilities = importlib.import_module("trl.kernels.chunked_logprob")
    finally:
        for name in functions:
            if not name.startswith("trl."):  # because others ask whether it is there
                del sys.modules[name]

    def cross_entropy(x: Batch) -> Tensor:
        found, *_ = log_probabilities.ChunkedLogProbFunction.apply(
            x.student, x.student_weight, x.student_bias, x.labels, 1.0, _TRL_CHUNK, None, 1.0, ()
        )
        return -found.mean()

    def loss_of(loss: Loss, x: Batch) -> Tensor:
        if loss.alpha == 1:
            return cross_entropy(x)
        rows, _ = divergences.ChunkedDivergenceFunction.apply(
            x.student, x.student_weight, x.student_bias,
            x.teacher, x.teacher_weight, x.teacher_bias,
            BETAS[loss.divergence], loss.temperature,
        )  # fmt: skip
        divergence = rows.mean()
        divergence = divergence * loss.temperature**2 if loss.temperature != 1 else divergence
        if not loss.alpha:
            return divergence
        return loss.alpha * cross_entropy(x) + (1 - loss.alpha) * divergence

    return loss_of


def liger(compiled: bool) -> Contender:
    if compiled and not shutil.which("g++"):
        raise FileNotFoundError("torch.compile needs g++ on a CPU")
    module = peers.alone("liger_kernel.chunked_loss.jsd_loss")

    def loss_of(loss: Loss, x: Batch) -> Tensor:
        of_teacher = (1 - loss.alpha) * loss.temperature**2
        function = module.LigerFusedLinearJSDLoss(
            loss.alpha, of_teacher, BETAS[loss.divergence], -100, loss.temperature, compiled
        )
        return function(
            x.student, x.student_weight, x.teacher, x.teacher_weight, x.labels,
            x.student_bias, x.teacher_bias,
        )  # fmt: skip

    return loss_of


def torch_linear_cross_entropy() -> Contender:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it is the eager expression

    def loss_of(loss: Loss, x: Batch) -> Tensor:
        bias = {} if x.student_bias is None else {"linear_bias": x.student_bias}
        return F.linear_cross_entropy(
            x.student, x.student_weight, x.labels, options=options, **bias
        )

    return loss_of


# by the name on PyPI; after a space, which of its losses
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "fastkd": lambda: linear_kd,
    "eager": lambda: eager,
    "unsloth_zoo": unsloth,
    "trl": trl,
    "liger-kernel": lambda: liger(compiled=False),
    "liger-kernel compiled": lambda: liger(compiled=True),
    "torch linear_cross_entropy": torch_linear_cross_entropy,
}


def lacks(name: str, loss: Loss) -> str | None:
    """Return why a contender has no such loss, None if it has."""
    if name.startswith("liger") and loss.alpha == 1:
        return "its cross-entropy is a kernel of a GPU"
    if name == "torch linear_cross_entropy" and loss.alpha != 1:
        return "has the cross-entropy alone"
    return None


def available() -> tuple[dict[str, Contender], dict[str, str]]:
    """Import the contenders, and return with them each one's version or what it lacks."""
    losses: dict[str, Contender] = {}
    found: dict[str, str] = {}
    for name, contender in CONTENDERS.items():
        try:
            losses[name] = contender()
            package = "torch" if name == "eager" else name.split()[0]
            found[name] = importlib.metadata.version(package)
        except Exception as error:  # whatever an import may raise
            losses.pop(name, None)
            why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            found[name] = f"{peers.MISSING}: {why}"
    return losses, found

"""The rows that heads.py measures: losses at their sizes, their inputs, and a step of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import devices
import records
import runner
import torch
from head_losses import Batch, Contender, Loss
from torch import Tensor
from workloads import BY_NAME, heads

N_TOKENS, SMALL, TINY = 2048, (512, 4096, 512), (64, 256, 32)
_WORDS = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jensen_shannon": "JSD"}


class Row(NamedTuple):
    """A loss at a size, or the errors of a loss."""

    loss: Loss
    shape: tuple[int, int, int]  # tokens, vocabulary, width of both networks
    dtype: str = "float32"
    head: str = "trained"  # or "frozen"
    gradient: bool = True
    teacher: str = "other"  # "near": the student with noise of 0.01; "padded": −∞ in both biases

    @property
    def has_errors(self) -> bool:
        return self.shape == SMALL

    @property
    def name(self) -> str:
        words = [_WORDS[self.loss.divergence]] if self.loss.alpha != 1 else []
        words += ["CE"] if self.loss.alpha else []
        name = " + ".join(words)
        name += f" at T = {self.loss.temperature:g}" if self.loss.temperature != 1 else ""
        name += " with a frozen head" if self.head == "frozen" else ""
        name += "" if self.gradient else " without gradient"
        return name + (f" of a {self.teacher} teacher" if self.teacher != "other" else "")

    def in_record(self, device: devices.Cpu) -> dict[str, Any]:
        direction = "errors" if self.has_errors else runner.DIRECTIONS[not self.gradient]
        return {
            "loss": "linear_kd",
            "options": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "direction": direction,
            "threads": device.threads,
            "sources": records.sources(BY_NAME["linear_kd"].case, device.engine),
            "implementations": {},
        }


def rows() -> list[Row]:
    """Return the rows, those first that tell most."""
    forward, jsd, reverse = map(Loss, ("forward_kl", "jensen_shannon", "reverse_kl"))
    both, of_labels = Loss("forward_kl", 0.5, 2.0), Loss("forward_kl", 1.0)
    found = [Row(x, SMALL, dtype) for dtype in ("float32", "bfloat16") for x in (forward, jsd)]
    found += [Row(reverse, SMALL), Row(both, SMALL), Row(of_labels, SMALL)]
    found += [Row(x, SMALL, "bfloat16", teacher="near") for x in (forward, jsd)]
    found += [Row(x, SMALL, teacher="padded") for x in (forward, jsd)]
    for width in (512, 1024):
        for n_cols in (32000, 128256):
            size = N_TOKENS, n_cols, width
            found += [Row(x, size, y) for y in ("float32", "bfloat16") for x in (forward, jsd)]
            if (width, n_cols) == (512, 32000):
                found += [Row(reverse, size), Row(both, size), Row(of_labels, size)]
                found += [Row(forward, size, head="frozen"), Row(forward, size, gradient=False)]
    return found


def batch_of(row: Row, shape: tuple[int, int, int] | None = None) -> Batch:
    n_tokens, n_cols, width = shape or row.shape
    dtype = getattr(torch, row.dtype)
    x = Batch(
        *heads((n_tokens, width, width, n_cols), dtype),
        torch.randint(n_cols, (n_tokens,), generator=torch.Generator().manual_seed(9)),
    )
    if row.teacher == "near":
        noise = torch.randn(x.student.shape, generator=torch.Generator().manual_seed(8))
        x = x._replace(
            teacher=(x.student.detach() + 0.01 * noise).to(dtype),
            teacher_weight=x.student_weight.detach().clone(),
        )
    if row.teacher == "padded":
        bias = torch.zeros(n_cols, dtype=dtype)
        bias[-n_cols // 16 :] = -torch.inf
        x = x._replace(student_bias=bias.clone().requires_grad_(), teacher_bias=bias)
    x.student_weight.requires_grad_(row.head == "trained")
    return x


def step_of(contender: Contender, row: Row, x: Batch) -> Callable[[], Tensor]:
    def step() -> Tensor:
        forget_gradients(x)
        with contextlib.nullcontext() if row.gradient else torch.no_grad():
            value = contender(row.loss, x)
        if row.gradient:
            value.backward()
        return value.detach()

    return step


def forget_gradients(x: Batch) -> None:
    for tensor in x:
        if tensor is not None:
            tensor.grad = None

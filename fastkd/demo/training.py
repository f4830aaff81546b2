"""Handwritten digits of scikit-learn, and the training loop that all demos share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

N_TRAIN, N_STUDENT = 1147, 250  # of 1797 images, since 650 are for the test
BATCH, LEARNING_RATE, TEACHER_STEPS = 128, 6e-3, 500
IGNORED = -100  # the label of what has none, as in torch


def load_images(device: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 8, 8) and digits (N), in a random but fixed order."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels)[order].float().view(-1, 1, 8, 8).to(device) / 16
    return images, torch.from_numpy(digits)[order].to(device)


def rows_of_student(seed: int) -> Tensor:
    """Return the numbers of the training images that a student sees, others for each seed."""
    return torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))[:N_STUDENT]


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    n_examples: int,
    steps: int,
    seed: int,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Train the model on random batches of row numbers, and return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        value = loss(torch.randint(n_examples, (batch,), generator=generator))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
    return torch.stack(losses).cpu()


def per_cent(right: Tensor) -> float:
    return 100 * right.double().mean().item()

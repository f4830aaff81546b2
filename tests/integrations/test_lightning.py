"""Lightning: a module whose `training_step` returns the loss."""

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd

pytestmark = pytest.mark.integration


# what a user writes: lightning.Trainer(...).fit(Distillation(student, teacher), loader)
class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def training_step(self, batch, index):
        inputs, labels = batch
        loss = fastkd.kd(
            self.student(inputs), self.teacher(inputs), labels, alpha=0.3, temperature=4.0
        )
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def networks():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    # dropout: a teacher that is put in training mode would change the curve
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    with torch.no_grad():
        teacher[-1].weight *= 10
    return student, teacher


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(192, 8, generator=generator)
    labels = torch.randint(10, (192,), generator=generator)
    labels[::5] = -100  # unlabelled: counts in neither term
    return DataLoader(TensorDataset(inputs, labels), batch_size=16)


def expression(student, teacher, labels, alpha, temperature):
    kept = labels != -100
    soft = F.kl_div(
        F.log_softmax(student[kept] / temperature, -1),
        F.log_softmax(teacher[kept] / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    hard = F.cross_entropy(student, labels)
    return alpha * hard + (1 - alpha) * temperature**2 * soft


def plain_loop():
    student, teacher = networks()
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for inputs, labels in batches():
        loss = expression(student(inputs), teacher(inputs), labels, alpha=0.3, temperature=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield [loss.item()]


class Curve(lightning.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append([trainer.callback_metrics["loss"].item()])


def test_curve(same_curve, tmp_path):
    curve = Curve()
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[curve],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=1,
    )
    trainer.fit(Distillation(*networks()), batches())
    same_curve(curve.rows, list(plain_loop()))

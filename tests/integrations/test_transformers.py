"""The Trainer of Hugging Face transformers: `compute_loss_func` is the place for a loss."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import scatter_gather
from transformers import Trainer, TrainingArguments

import fastkd

pytestmark = pytest.mark.integration
BATCH = 8  # every step sees all the sentences, in micro-batches that differ


# what a user writes: Trainer(student, ..., compute_loss_func=Distillation(student, teacher))
class Distillation:
    def __init__(self, student, teacher, **options):
        self.teachers, self.options = {teacher.device: teacher.eval()}, options
        student.register_forward_hook(self.teach, with_kwargs=True)

    @torch.no_grad()
    def teach(self, student, arguments, inputs, outputs):
        device = outputs.logits.device
        if device not in self.teachers:  # the threads of DataParallel must not move one teacher
            self.teachers[device] = copy.deepcopy(next(iter(self.teachers.values()))).to(device)
        # an entry and no attribute, because DataParallel gathers the entries alone
        outputs["teacher_logits"] = self.teachers[device](**inputs).logits

    def __call__(self, outputs, labels, num_items_in_batch=None):
        student, teacher = outputs.logits[:, :-1], outputs.teacher_logits[:, :-1]
        labels = labels[:, 1:]  # position i predicts token i + 1
        if num_items_in_batch is not None:  # under DataParallel one number for each device
            num_items_in_batch = torch.as_tensor(num_items_in_batch).sum()
        return fastkd.kd(student, teacher, labels, normalizer=num_items_in_batch, **self.options)


class Expression(Distillation):
    """The same in plain PyTorch."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        alpha, temperature = self.options["alpha"], self.options["temperature"]
        kept = labels[:, 1:] != -100
        student, teacher = outputs.logits[:, :-1][kept], outputs.teacher_logits[:, :-1][kept]
        hard = F.cross_entropy(student, labels[:, 1:][kept], reduction="sum")
        soft = F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.log_softmax(teacher / temperature, -1),
            log_target=True,
            reduction="sum",
        )
        return (alpha * hard + (1 - alpha) * temperature**2 * soft) / num_items_in_batch


def sentences(n, length=12):
    """Return sentences of 3 to `length` tokens: a mean of means would weight tokens wrongly."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 32, (n, length), generator=generator)
    lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
    mask = torch.arange(length) < lengths
    labels = torch.where(mask, tokens, -100)
    return [
        {"input_ids": t, "attention_mask": m, "labels": y}
        for t, m, y in zip(tokens, mask.long(), labels, strict=True)
    ]


@pytest.fixture
def curve(tiny_llama, trainer_options, curve_of):
    def train(loss, accumulation=1, n_devices=1, **options):
        student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
        arguments = TrainingArguments(
            **trainer_options,
            per_device_train_batch_size=BATCH // accumulation // n_devices,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.2,
        )
        arguments._n_gpu = n_devices
        loss = loss and loss(student, teacher, **options)
        return curve_of(
            Trainer(student, arguments, train_dataset=sentences(BATCH), compute_loss_func=loss)
        )

    return train


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_distillation_is_the_plain_expression_of_the_whole_batch(curve, same_curve, accumulation):
    options = {"alpha": 0.3, "temperature": 2.0}
    same_curve(curve(Distillation, accumulation, **options), curve(Expression, **options))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cross_entropy_is_the_trainers_own(curve, same_curve, accumulation):
    same_curve(curve(Distillation, accumulation, alpha=1.0), curve(None, accumulation))


class TwoDevices(torch.nn.Module):
    """torch.nn.DataParallel with one device in place of two: replicas, threads and gathering."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        halves = [{name: x.chunk(2)[i] for name, x in inputs.items()} for i in range(2)]
        with ThreadPoolExecutor(2) as threads:
            outputs = [*threads.map(lambda half: replica_of(self.module)(**half), halves)]
        return scatter_gather.gather(outputs, 0)


def replica_of(module):
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    replica._modules = {name: replica_of(child) for name, child in module.named_children()}
    return replica


class Gather:
    """Concatenates on a CPU, where that of torch cannot."""

    @staticmethod
    def apply(device, dim, *tensors):
        return torch.cat(tensors, dim)


def test_two_devices_of_one_process_train_as_one(curve, same_curve, monkeypatch):
    options = {"alpha": 0.3, "temperature": 2.0}
    expected = curve(Expression, **options)
    monkeypatch.setattr(torch.nn, "DataParallel", TwoDevices)
    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    same_curve(curve(Distillation, n_devices=2, **options), expected)


def test_each_device_has_a_teacher_of_its_own(tiny_llama):
    teacher = tiny_llama(1, width=32)
    loss, tokens = Distillation(tiny_llama(0, width=16), teacher), torch.ones(2, 3).long()
    outputs = teacher(tokens)
    for device in ("cpu", "meta", "meta"):
        outputs["logits"] = outputs.logits.to(device)
        loss.teach(None, (), {"input_ids": tokens.to(device)}, outputs)
        assert outputs["teacher_logits"].device.type == device
    assert {x.type for x in loss.teachers} == {"cpu", "meta"} and teacher.device.type == "cpu"

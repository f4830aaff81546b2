"""The Trainer of Hugging Face transformers: `compute_loss_func` is the place for a loss."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel, scatter_gather
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

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
        # in a field of its class: DataParallel gathers fields, and DDP makes a new output of them
        outputs["hidden_states"] = (self.teachers[device](**inputs).logits,)

    def __call__(self, outputs, labels, num_items_in_batch=None):
        (teacher_logits,) = outputs.hidden_states
        student, teacher = outputs.logits[:, :-1], teacher_logits[:, :-1]
        labels = labels[:, 1:]  # position i predicts token i + 1
        if num_items_in_batch is not None:  # under DataParallel one number for each device
            num_items_in_batch = torch.as_tensor(num_items_in_batch).sum()
        return fastkd.kd(student, teacher, labels, normalizer=num_items_in_batch, **self.options)


# or, from hidden states, compute_loss_func=LinearDistillation(student, teacher)
kept = threading.local()  # DataParallel has a thread for each device


def keep(head, inputs):
    """Keep the hidden states of all positions, and have logits made of the last one.

    They are not used, but DDP looks for the head in what the model returns.
    """
    (kept.hidden,) = inputs
    return kept.hidden[:, -1:]


class LinearDistillation:
    def __init__(self, student, teacher, **options):
        self.student, self.teachers = student, {teacher.device: teacher.eval()}
        of_student = fastkd.head_options(student.config)
        of_teacher = fastkd.head_options(teacher.config, "teacher")
        self.options = {**of_student, **of_teacher, **options}
        for network in (student, teacher):
            network.get_output_embeddings().register_forward_pre_hook(keep)
        student.register_forward_hook(self.teach, with_kwargs=True)

    @torch.no_grad()
    def teach(self, student, arguments, inputs, outputs):
        device = outputs.logits.device
        if device not in self.teachers:  # the threads of DataParallel must not move one teacher
            self.teachers[device] = copy.deepcopy(next(iter(self.teachers.values()))).to(device)
        student_hidden = kept.hidden
        self.teachers[device](**inputs)
        # in a field of its class: DataParallel gathers fields, and DDP makes a new output of them
        outputs["hidden_states"] = student_hidden, kept.hidden
        del kept.hidden

    def __call__(self, outputs, labels, num_items_in_batch=None):
        # DataParallel gathers on the device of the student, whose own head gets the gradient
        student_hidden, teacher_hidden = outputs.hidden_states
        teacher = self.teachers[teacher_hidden.device]
        student_head, teacher_head = (x.get_output_embeddings() for x in (self.student, teacher))
        if num_items_in_batch is not None:  # under DataParallel one number for each device
            num_items_in_batch = torch.as_tensor(num_items_in_batch).sum()
        return fastkd.linear_kd(
            student_hidden[:, :-1],
            student_head.weight,
            teacher_hidden[:, :-1],
            teacher_head.weight,
            labels[:, 1:],  # position i predicts token i + 1
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            normalizer=num_items_in_batch,
            **self.options,
        )


class Expression(Distillation):
    """The same in plain PyTorch."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        alpha, temperature = self.options["alpha"], self.options["temperature"]
        kept = labels[:, 1:] != -100
        (teacher_logits,) = outputs.hidden_states
        student, teacher = outputs.logits[:, :-1][kept], teacher_logits[:, :-1][kept]
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


LOSSES = pytest.mark.parametrize("loss", [Distillation, LinearDistillation])


@LOSSES
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_distillation_is_the_plain_expression_of_the_whole_batch(
    curve, same_curve, loss, accumulation
):
    options = {"alpha": 0.3, "temperature": 2.0}
    same_curve(curve(loss, accumulation, **options), curve(Expression, **options))


@LOSSES
@pytest.mark.parametrize("accumulation", [1, 2])
def test_cross_entropy_is_the_trainers_own(curve, same_curve, loss, accumulation):
    same_curve(curve(loss, accumulation, alpha=1.0), curve(None, accumulation))


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


@LOSSES
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_devices_of_one_process_train_as_one(
    curve, same_curve, monkeypatch, loss, accumulation
):
    options = {"alpha": 0.3, "temperature": 2.0}
    expected = curve(Expression, **options)
    monkeypatch.setattr(torch.nn, "DataParallel", TwoDevices)
    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    same_curve(curve(loss, accumulation, n_devices=2, **options), expected)


@LOSSES
def test_each_device_has_a_teacher_of_its_own(tiny_llama, loss):
    student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
    loss, tokens = loss(student, teacher), torch.ones(2, 3).long()
    for device in ("cpu", "meta", "meta"):
        outputs = student.to(device)(input_ids=tokens.to(device))
        assert outputs.hidden_states[-1].device.type == device
    assert {x.type for x in loss.teachers} == {"cpu", "meta"} and teacher.device.type == "cpu"


@LOSSES
@pytest.mark.parametrize("finds_unused", [True, False])
def test_a_process_for_each_device_trains_the_same(tiny_llama, one_rank, loss, finds_unused):
    student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
    tokens = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    loss, weights = loss(student, teacher, alpha=0.3), list(student.parameters())
    expected = loss(student(input_ids=tokens), tokens)
    gradients = torch.autograd.grad(expected, weights)
    wrapped = DistributedDataParallel(student, find_unused_parameters=finds_unused)
    for _ in range(2):  # the second forward asks whether the first one's gradients were all ready
        student.zero_grad()
        found = loss(wrapped(input_ids=tokens), tokens)
        found.backward()
    torch.testing.assert_close((found, *(x.grad for x in weights)), (expected, *gradients))


def test_no_network_makes_the_logits_of_a_batch(tiny_llama):
    networks, made = (tiny_llama(0, width=16), tiny_llama(1, width=32)), []
    for network in networks:
        network.lm_head.register_forward_hook(lambda *inputs_output: made.append(inputs_output[-1]))
    loss, tokens = LinearDistillation(*networks), torch.ones(2, 5).long()
    outputs = networks[0](input_ids=tokens)
    loss(outputs, tokens).backward()
    assert [logits.shape for logits in made] == [(2, 1, 32)] * 2
    assert [x.shape for x in outputs.hidden_states] == [(2, 5, 16), (2, 5, 32)]


def test_under_autocast_the_products_of_the_heads_are_in_bfloat16(tiny_llama):
    """The Trainer leaves autocast before it calls the loss, which a decorator turns on again."""
    student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
    loss = LinearDistillation(student, teacher)
    tokens = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    outputs = student(input_ids=tokens)
    found = torch.autocast("cpu", torch.bfloat16)(loss)(outputs, tokens)
    heads = (network.lm_head.weight.detach() for network in (student, teacher))
    operands = [x for pair in zip(outputs.hidden_states, heads, strict=True) for x in pair]
    operands[::2] = (hidden[:, :-1] for hidden in operands[::2])
    expected = fastkd.linear_kd(*(x.bfloat16() for x in operands))
    torch.testing.assert_close(found, expected)
    assert found != loss(outputs, tokens)


# what a model does to its logits, besides the product of its head
MODELS = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "phi": {},  # a bias
}


@pytest.mark.parametrize(
    "student, teacher", zip(MODELS, [*MODELS][1:] + [*MODELS][:1], strict=True)
)
def test_hidden_states_and_options_of_heads_make_the_models_own_logits(student, teacher):
    def build(name, width):
        torch.manual_seed(width)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                name,
                vocab_size=32,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **MODELS[name],
            )
        )

    networks = build(student, 16), build(teacher, 32)
    tokens = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"alpha": 0.3, "temperature": 2.0}
    student, teacher = (network.double() for network in networks)
    for network in (student, teacher):
        if network.lm_head.bias is not None:
            torch.nn.init.normal_(network.lm_head.bias)
    with torch.no_grad():
        teacher_logits = teacher(tokens).logits
    logits = student(tokens).logits
    expected = fastkd.kd(logits[:, :-1], teacher_logits[:, :-1], tokens[:, 1:], **options)
    loss = LinearDistillation(student, teacher, **options)
    found = loss(student(input_ids=tokens), tokens)
    weights = list(student.parameters())
    torch.testing.assert_close(
        (found, *torch.autograd.grad(found, weights)),
        (expected, *torch.autograd.grad(expected, weights)),
        rtol=1e-9,
        atol=1e-12,
    )

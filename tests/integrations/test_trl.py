"""TRL's trainers: a subclass replaces a method of GKDTrainer, and a function that of a module."""

import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

import fastkd

pytestmark = pytest.mark.integration


# what a user writes: FastGKDTrainer(...) instead of GKDTrainer(...)
class FastGKDTrainer(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels, beta=0.5, temperature=1.0, num_items_in_batch=None
    ):
        return fastkd.jensen_shannon(
            student_logits,
            teacher_logits,
            beta=beta,
            temperature=temperature,
            scale_t2=False,  # TRL's convention
            labels=labels,
            normalizer=num_items_in_batch,
        )


# or LinearGKDTrainer(...), from hidden states
class LinearGKDTrainer(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        # the logits of one position are left, so that DDP finds the head in what is returned
        batch |= {"output_hidden_states": [-1], "logits_to_keep": 1}
        outputs = model(**batch)
        with torch.no_grad():
            hidden = self.teacher_model.eval()(**batch).hidden_states[-1]
        student, teacher = map(self.accelerator.unwrap_model, (model, self.teacher_model))
        student_head, teacher_head = (x.get_output_embeddings() for x in (student, teacher))
        with self.accelerator.autocast():
            loss = fastkd.linear_kd(
                outputs.hidden_states[-1][:, :-1],
                student_head.weight,
                hidden[:, :-1],
                teacher_head.weight,
                inputs["labels"][:, 1:],
                student_bias=student_head.bias,
                teacher_bias=teacher_head.bias,
                divergence="jensen_shannon",
                beta=self.beta,
                normalizer=num_items_in_batch,
                **fastkd.head_options(student.config),
                **fastkd.head_options(teacher.config, "teacher"),
            )
        return (loss, outputs) if return_outputs else loss


# the loss of DistillationTrainer
def whole(head, hidden):
    """Return a head that FSDP2 has cut up in one piece."""
    return head.full_tensor().to(hidden.dtype) if hasattr(head, "full_tensor") else head


def divergence_loss(
    student_hidden,
    teacher_hidden,
    student_weight,
    teacher_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_final_logit_softcapping=None,
    temperature=1.0,
):
    student_softcap, teacher_softcap = (
        None if softcap is None else softcap / temperature
        for softcap in (student_final_logit_softcapping, teacher_final_logit_softcapping)
    )
    counted = completion_mask != 0
    loss, found = fastkd.linear_kd(
        student_hidden[counted],
        whole(student_weight, student_hidden),
        teacher_hidden[counted],
        whole(teacher_weight, teacher_hidden),
        student_bias=whole(student_lm_head_bias, student_hidden),
        teacher_bias=whole(teacher_lm_head_bias, teacher_hidden),
        divergence="jensen_shannon",
        beta=beta,
        # here and not as `temperature`, because TRL's entropy is that of the softened logits
        student_logit_scale=student_logit_scale / temperature,
        teacher_logit_scale=teacher_logit_scale / temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        normalizer=num_items_in_batch,
        metrics=True,
    )
    return loss, found["student_entropy"].sum(), counted.sum()


WORDS = [f"word{i}" for i in range(24)]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(**options):
    vocabulary = ["<pad>", "<unknown>", "<end>", "user", "assistant", *WORDS]
    words = models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unknown>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATE,
        pad_token="<pad>",
        unk_token="<unknown>",
        eos_token="<end>",
        **options,
    )


def chats(n):
    """Return prompts and answers of different lengths, so that masks and divisors matter."""
    rng = random.Random(0)

    def words():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    def chat():
        return [{"role": role, "content": words()} for role in ("user", "assistant")]

    return Dataset.from_list([{"messages": chat()} for _ in range(n)])


@pytest.fixture
def curve(tiny_llama, trainer_options, curve_of):
    def train(trainer_class, beta):
        config = GKDConfig(
            **trainer_options,
            beta=beta,
            lmbda=0,  # off-policy: nothing is generated
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=0.3,
        )
        student, teacher = tiny_llama(0, width=16), tiny_llama(1, width=32)
        trainer = trainer_class(
            student, teacher, config, train_dataset=chats(8), processing_class=tokenizer()
        )
        return curve_of(trainer)

    return train


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_curve(curve, same_curve, beta):
    expected = curve(GKDTrainer, beta)
    same_curve(curve(FastGKDTrainer, beta), expected)
    same_curve(curve(LinearGKDTrainer, beta), expected)


def test_no_network_makes_the_logits_of_a_batch(curve):
    made = set()

    def note(module, inputs, outputs):
        if isinstance(module, LlamaForCausalLM):
            made.add((module.config.hidden_size, outputs.logits.shape[1]))

    hook = register_module_forward_hook(note)
    curve(LinearGKDTrainer, 0.5)
    hook.remove()
    assert made == {(16, 1), (32, 1)}


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n_items", [None, 40])
def test_loss_at_another_temperature(beta, n_items):
    """The trainer leaves it at 1: the `temperature` of its config is that of the sampling."""
    torch.manual_seed(0)
    student = torch.randn(4, 7, 50, requires_grad=True)
    teacher, labels = torch.randn(4, 7, 50), torch.randint(0, 50, (4, 7))
    labels[:, :3] = -100

    def value_and_gradient(trainer_class):
        loss = trainer_class.generalized_jsd_loss(
            student, teacher, labels, beta, temperature=2.0, num_items_in_batch=n_items
        )
        return loss, *torch.autograd.grad(loss, student)

    torch.testing.assert_close(
        value_and_gradient(FastGKDTrainer), value_and_gradient(GKDTrainer), rtol=1e-5, atol=1e-8
    )


# ---------------------------------------------------------------------------- DistillationTrainer


@pytest.fixture
def on_policy_curve(tiny_llama, trainer_options, monkeypatch):
    """Return a function that trains and returns loss, norm of the gradient and entropy."""

    def train(loss, **options):
        if loss is not None:
            monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", loss)
        config = DistillationConfig(
            **trainer_options,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=8,
            **options,
        )
        prompts = [{"prompt": chat["messages"][:1]} for chat in chats(8)]
        trainer = DistillationTrainer(
            tiny_llama(0, width=16),
            tiny_llama(1, width=32),
            config,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer(padding_side="left"),
        )
        trainer.train()
        names = "loss", "grad_norm", "entropy"
        return [[x[name] for name in names] for x in trainer.state.log_history if "loss" in x]

    return train


@pytest.mark.parametrize("options", [
    {"beta": 0.0, "learning_rate": 0.3},
    {"beta": 0.5, "learning_rate": 3.0},
    {"beta": 1.0, "learning_rate": 0.3},
    {"beta": 0.5, "learning_rate": 12.0, "temperature": 2.0},
], ids=str)  # fmt: skip
def test_curve_on_policy(on_policy_curve, same_curve, options):
    expected = on_policy_curve(None, **options)
    same_curve(on_policy_curve(divergence_loss, **options), expected)


def hidden_states_and_heads():
    """Return what TRL calls its loss with; one sequence is empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, 16), (3, 6, 24), (40, 16), (40, 24)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    return *(torch.randn(shape, generator=generator) for shape in shapes), mask.long()


OF_MODELS = {
    "plain": {},
    "items": {"num_items_in_batch": torch.tensor(13)},
    "biases": {f"{x}_lm_head_bias": torch.linspace(-1, 1, 40) for x in ("student", "teacher")},
    "scales": {"student_logit_scale": 0.5, "teacher_logit_scale": 0.25},
    "softcaps": {
        f"{x}_final_logit_softcapping": c for x, c in (("student", 3.0), ("teacher", 5.0))
    },
}


def value_and_gradients(loss, student, teacher, student_head, *others, **options):
    trained = student.clone().requires_grad_(), student_head.clone().requires_grad_()
    found, entropy, n_valid = loss(trained[0], teacher, trained[1], *others, **options)
    return found, entropy, n_valid, *torch.autograd.grad(found, trained)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", OF_MODELS)
def test_the_loss_is_that_of_distillation_trainer(model, beta, temperature):
    *networks, mask = hidden_states_and_heads()
    options = {**OF_MODELS[model], "temperature": temperature}
    found, expected = (
        value_and_gradients(loss, *networks, mask, beta, **options)
        for loss in (divergence_loss, distillation_trainer._chunked_divergence_loss)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_rank_without_a_token_has_a_loss_of_0_with_a_gradient():
    *networks, mask = hidden_states_and_heads()
    found = value_and_gradients(divergence_loss, *networks, torch.zeros_like(mask), 0.5)
    assert not any(x.any() for x in found)


def test_heads_that_fsdp_has_cut_up(one_rank):
    mesh = init_device_mesh("cpu", (1,))
    student, teacher, *heads, mask = hidden_states_and_heads()
    expected = value_and_gradients(divergence_loss, student, teacher, *heads, mask, 0.5)
    heads = [distribute_tensor(x, mesh, [Shard(0)]) for x in heads]
    *found, of_head = value_and_gradients(divergence_loss, student, teacher, *heads, mask, 0.5)
    torch.testing.assert_close((*found, of_head.full_tensor()), expected)

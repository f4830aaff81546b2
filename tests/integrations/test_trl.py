"""TRL's GKDTrainer: its loss is a static method, and a subclass replaces it."""

import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

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


WORDS = [f"word{i}" for i in range(24)]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer():
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
    same_curve(curve(FastGKDTrainer, beta), curve(GKDTrainer, beta))


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

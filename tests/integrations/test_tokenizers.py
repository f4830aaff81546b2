"""Tokenizers that packages ship are aligned, and losses between two are those of TRL's GOLD."""

import base64
import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from trl.experimental.gold.gold_trainer import ULDLoss

import fastkd

pytestmark = pytest.mark.integration

TEXTS = [
    "The unbelievable results of 2024 surprised everyone, didn't they?",
    "def add(x, y):\n    return x + y  # adds\n\n\tprint('tabs')",
    "Füße, naïve café, 25 €, 北京大学, こんにちは, Здравствуйте, 👩‍🔬🎉!",
    "  two spaces before, and after  ",
    "x",
]
SHIPPED = ("mistral_common", "sentencepiece", "tiktoken")


def folder_of(package):
    """Return where the data of a package lie, which is not imported."""
    if not all(map(importlib.util.find_spec, SHIPPED)):
        pytest.skip("`make test-integrations` installs mistral-common, sentencepiece and tiktoken")
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return Path(folder, "data")


def tekken():
    """Return a tokenizer of bytes, with 130 thousand entries."""
    import tiktoken

    data = json.loads((folder_of("mistral_common") / "tekken_240911.json").read_text("utf-8"))
    config = data["config"]
    n = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(x["token_bytes"]): x["rank"] for x in data["vocab"][:n]}
    encoding = tiktoken.Encoding(
        "tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={}
    )

    def offsets_of(text):
        tokens = encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
        return fastkd.byte_offsets(text, tokens)

    return offsets_of


def sentencepiece():
    """Return a tokenizer of characters, with 32 thousand entries, that falls back to bytes."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(str(folder_of("mistral_common") / "tokenizer.model.v1"))

    def bytes_of(piece):
        byte = re.fullmatch("<0x(..)>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def offsets_of(text):
        first, *others = map(bytes_of, processor.encode(text, out_type=str))
        return fastkd.byte_offsets(text, [first.removeprefix(b" "), *others])

    return offsets_of


def of_characters():
    """Return a tokenizer of Hugging Face, the offsets of which are characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:2], trainer)

    def offsets_of(text):
        return fastkd.byte_offsets(text, tokenizer.encode(text).offsets)

    return offsets_of


@pytest.mark.parametrize(
    "first, second",
    [*itertools.permutations([tekken, sentencepiece, of_characters], 2)],
    ids=lambda x: x.__name__,
)
def test_groups_of_real_tokenizers_cover_the_same_bytes(first, second):
    first, second = first(), second()
    for text in TEXTS:
        encoded, student, teacher = text.encode(), first(text), second(text)
        found = fastkd.align(student, teacher)
        place = 0
        for spans in found.spans():
            covered = {
                (min(offsets[i][0] for i in span), max(offsets[i][1] for i in span))
                for span, offsets in zip(spans, (student, teacher), strict=True)
            }
            ((start, end),) = covered
            assert start == place
            place = end
        assert place == len(encoded)
        assert found.n_groups > len(text.split()) / 2  # the tokenizers agree at most words


def test_groups_are_those_of_trl():
    first, second = tekken(), sentencepiece()
    for text in TEXTS:
        # TRL gives tokens without text to a neighbour
        student, teacher = ([x for x in of(text) if x[0] < x[1]] for of in (first, second))
        expected = ULDLoss._align_by_byte_offsets(student, teacher)
        found = fastkd.align(student, teacher).spans()
        assert [[*map(list, spans)] for spans in zip(*found, strict=True)] == [*expected]


def gold(*tokenizers, **options):
    """Return TRL's loss, as its trainer makes it."""
    config = dict(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.5,
        uld_teacher_temperature=0.8,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
        beta=0.3,
    )
    return ULDLoss(SimpleNamespace(**config | options), *tokenizers)


@pytest.fixture
def batch():
    """Return logits of sequences whose prompts have two tokens and one, and their labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(2, 7, n, generator=generator, dtype=torch.float64) for n in (11, 13)
    )
    labels = torch.randint(9, (2, 7), generator=generator)
    labels[0, :2] = labels[1, :1] = labels[1, 5:] = -100
    return student.requires_grad_(), teacher, labels


def of_sequences(losses, labels):
    """Return the mean over sequences of the means over the tokens that have a label, as TRL."""
    counted = labels != -100
    return ((losses * counted).sum(1) / counted.sum(1)).mean()


def assert_same(student, found, expected):
    (of_found,) = torch.autograd.grad(found, student, retain_graph=True)
    (of_expected,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-7, atol=1e-9)


TEMPERATURES = dict(student_temperature=1.5, teacher_temperature=0.8)


def test_sorted_probabilities_are_those_of_trl(batch):
    student, teacher, labels = batch
    expected = gold()(student, teacher, labels, labels, labels, labels)
    losses = fastkd.uld(student, teacher, **TEMPERATURES, labels=labels, reduction="none")
    assert_same(student, of_sequences(losses, labels), expected)


def test_matched_probabilities_are_those_of_trl(batch):
    student, teacher, labels = batch
    student_ids, teacher_ids = torch.tensor([10, 2, 5]), torch.tensor([1, 12, 4])
    words = "abc"
    vocabularies = (
        SimpleNamespace(get_vocab=lambda ids=ids: dict(zip(words, ids.tolist(), strict=True)))
        for ids in (student_ids, teacher_ids)
    )
    loss = gold(
        *vocabularies,
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=1.0,
        uld_hybrid_unmatched_weight=0.0,
    )
    expected = loss(student, teacher, labels, labels, labels, labels)
    losses = fastkd.matched_kl(
        student,
        teacher,
        student_ids,
        teacher_ids,
        mass="raw",
        divergence="jensen_shannon",
        beta=0.3,
        **TEMPERATURES,
        scale_t2=False,
        labels=labels,
        reduction="none",
    )
    assert_same(student, of_sequences(losses, labels), expected)

"""The divergence of two networks' similarities: what contrastive losses have not."""

from functools import partial

import contrasts
import pytest
import torch
from contrasts import embeddings, of_two_networks, published_similarity_kl
from exactness import assert_same, results
from losses import DEVICE

import fastkd

engine = contrasts.engine


def test_a_student_whose_embeddings_are_alike(engine):
    """The sums of its exponentials and of the teacher's are float32 numbers, their quotient not."""
    generator = torch.Generator().manual_seed(0)
    noise, teacher = torch.randn(2, 32, 2048, generator=generator, dtype=torch.float64).to(DEVICE)
    student = (1 + 0.01 * noise).requires_grad_()
    options = dict(student_temperature=0.01, teacher_temperature=0.01, mask_self=True)
    truth = published_similarity_kl(student, teacher, **options).detach()
    found = fastkd.similarity_kl(student.float(), teacher.float(), **options).detach()
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def test_the_teacher_gets_no_gradient(engine):
    student, teacher = embeddings((5,), 3)
    fastkd.similarity_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"mask_self": True}])
def test_a_student_like_its_teacher_has_no_loss(options, engine):
    student, _ = embeddings((9,), 4)
    found = results(partial(fastkd.similarity_kl, **options), [student, 3 * student.detach()])
    assert all(x.abs().max() <= 1e-14 for x in found)  # lengths do not count


def test_among_the_queries_columns_are_rows(engine):
    inputs = of_two_networks((9,), 4)
    by_rows = results(fastkd.similarity_kl, inputs)
    assert_same(results(partial(fastkd.similarity_kl, symmetric=True), inputs), by_rows)
    student, teacher = inputs
    with_keys = partial(fastkd.similarity_kl, student_keys=student, teacher_keys=teacher)
    assert_same(results(lambda *x: with_keys(*x), inputs)[:1], by_rows[:1])


Q, K = torch.ones(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: fastkd.similarity_kl(Q, K[:2]), ValueError, "student and teacher"),
        (lambda: fastkd.similarity_kl(Q, K, student_keys=K), ValueError, "give both"),
        (
            lambda: fastkd.similarity_kl(Q, K, student_keys=K[:3], teacher_keys=K),
            ValueError,
            "student_keys and teacher_keys",
        ),
        (
            lambda: fastkd.similarity_kl(
                Q, K, student_keys=K[:3], teacher_keys=K[:3], mask_self=True
            ),
            ValueError,
            "mask_self .* 3 and 4",
        ),
    ],
)
def test_wrong_inputs(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()

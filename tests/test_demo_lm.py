"""The demo of language models, small: its text, its losses, its check, and what it counts."""

import functools
import math
import string

import pytest
import torch
import torch.nn.functional as F
from meter import PeakMemory
from torch import nn

from fastkd import __main__ as program

lm = pytest.importorskip("fastkd.demo.lm", reason="needs the extra `demo`")
lm_report = pytest.importorskip("fastkd.demo.lm_report", reason="needs the extra `demo`")
costs = pytest.importorskip("fastkd.demo.costs", reason="needs the extra `demo`")

SIZES = dict(TEACHER_STEPS=3, OWN_STEPS=2, BATCH=4, OWN_BATCH=4, N_PROMPTS=8, N_SAMPLED=6)
LARGE = (64, 1000)  # tokens and entries of a vocabulary


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, size in SIZES.items():
        monkeypatch.setattr(lm, name, size)
    monkeypatch.setattr(lm_report, "CHECK_STEPS", 4)
    monkeypatch.setattr(lm_report, "LARGE", LARGE)
    monkeypatch.setattr(lm_report, "SMALL_BUDGET", 1 << 20)
    whole = load()
    part = whole._replace(windows=whole.windows[:40], held_out=whole.held_out[:16])
    monkeypatch.setattr(lm, "load", lambda device: part)


load = functools.cache(functools.partial(lm.load, "cpu"))


@pytest.fixture
def data():
    return lm.load("cpu")


@pytest.fixture
def taught(data):
    return lm.train_teacher(data, watch=lambda what: None)


def test_prints_and_writes_the_tables_the_check_and_the_plot(tmp_path, capsys):
    arguments = ["demo", "lm", "--seeds", "2", "--steps", "3", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "lm.md").read_text("utf-8")
    headers = lm_report.HEADER, lm_report.OWN_HEADER, lm_report.COSTS_HEADER
    names = ["teacher", "no teacher", "KD, linear_kd", "KD, then its own text"]
    for text in (printed, written):
        for word in (*names, *(word for header in headers for word in header)):
            assert word in text  # 80 columns hold all of them
        assert "Check passed" in text
    rows = [line.split("|")[1:-1] for line in written.splitlines() if line.startswith("| ")]
    first = [row[0].strip() for row in rows]
    engines = ["eager PyTorch", "linear_kd"]
    assert [name for name in first if name != "---"] == [
        *(lm_report.HEADER[0], *names[:3]),
        *(lm_report.OWN_HEADER[0], *names[1:]),
        *(lm_report.COSTS_HEADER[0], *engines),
        *(lm_report.COSTS_HEADER[0], *engines, "linear_kd, 1 MiB of logits"),
    ]
    assert "64 tokens, 1000 entries" in printed
    assert (tmp_path / "lm.png").read_bytes().startswith(b"\x89PNG")


def test_progress_ends_at_its_total(monkeypatch, tmp_path):
    bars = []

    class Watched(lm_report.Progress):
        def __exit__(self, *error):
            bars.extend(self.tasks)
            super().__exit__(*error)

    monkeypatch.setattr(lm_report, "Progress", Watched)
    lm_report.run(tmp_path, seeds=2, steps=3, device="cpu")
    assert [bar.completed for bar in bars] == [bar.total for bar in bars] == [3 + 2 * 8 + 8 + 2]


def test_a_wrong_loss_fails_the_check(monkeypatch, tmp_path, capsys):
    wrong = lm.EAGER._replace(loss=lambda batch: 1.0001 * lm.eager(batch))
    monkeypatch.setattr(lm_report, "EAGER", wrong)
    assert lm_report.run(tmp_path, seeds=1, steps=2, device="cpu") == 1
    assert "Check FAILED" in capsys.readouterr().out
    assert "Check FAILED" in (tmp_path / "lm.md").read_text("utf-8")


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (2e-4, False), (float("nan"), False)])
def test_the_check_sees_a_small_error_of_one_step(error, passed):
    curve = torch.linspace(4, 2, 50)
    wrong = curve.clone()
    wrong[30] += error
    assert lm_report.check(wrong, curve)[0] is passed


def test_the_same_seed_gives_the_same_numbers(data, taught):
    def fits():
        return [*lm.experiment(2, 3, data, taught, lambda what: None)]

    first = fits()
    assert first == fits()
    assert [fit.method for fit in first] == 2 * [lm.ALONE, lm.DISTILLED, lm.OWN_TEXT]
    assert len({fit.nats for fit in first}) == len(first)  # another seed or loss, another student


def test_every_step_is_reported(data, taught):
    seen = []
    lm.fit(lm.DISTILLED, lm.new_student(data, 0), data, taught, 3, 0, seen.append)
    lm.fit_to_own_text(lm.new_student(data, 0), data, taught, 0, seen.append)
    assert seen == 3 * [lm.DISTILLED.name] + 2 * [lm.OWN_TEXT.name]


# ---------------------------------------------------------------------------------- text, networks


def test_text_is_that_of_the_documentation_and_each_paragraph_is_there_once():
    data = load()

    def text_of(windows):
        codes = torch.cat([windows[:, :-1].flatten(), windows[-1, -1:]])
        return "".join(data.characters[code] for code in codes.tolist())

    text, held_out = text_of(data.windows), text_of(data.held_out)
    assert len(text) > 250_000 and 0.1 < len(held_out) / len(text) < 0.12
    assert "The simple form" in text and {*string.ascii_letters} <= {*data.characters}
    # a window or the split may cut the first and the last
    paragraphs, others = (whole.split("\n\n")[1:-1] for whole in (text, held_out))
    assert len(paragraphs) == len({*paragraphs}) and not {*paragraphs} & {*others}
    for windows in (data.windows, data.held_out):
        assert windows.shape[1] == lm.LENGTH + 1
        assert torch.equal(windows[:-1, -1], windows[1:, 0])


def test_no_position_sees_what_comes_after_it(data):
    model, text = lm.new_student(data, 0), data.windows[:2, :-1]
    other = text.clone()
    other[:, 20:] = (other[:, 20:] + 1) % len(data.characters)
    before, after = model(text), model(other)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-3


def test_hidden_states_are_those_of_their_windows(data):
    model = lm.new_student(data, 0)
    windows = data.windows.repeat(2, 1)[:70]  # more than are computed at once
    hidden = lm.hidden_states(model, windows)
    assert hidden.shape == (70, lm.LENGTH, lm.STUDENT_WIDTH) and not hidden.requires_grad
    torch.testing.assert_close(hidden[66], model(windows[66:67, :-1])[0])


def test_students_get_the_teachers_states_of_their_own_windows(data, taught):
    batches = []

    def loss(batch):
        batches.append(batch)
        return lm.distilled(batch)

    student = lm.new_student(data, 0)
    lm.fit(lm.Method("watched", loss), student, data, taught, 2, 0, lambda what: None)
    for batch in batches:
        for labels, hidden in zip(batch.labels, batch.teacher, strict=True):
            row = int((data.windows[:, 1:] == labels).all(1).nonzero())
            inputs = data.windows[row : row + 1, :-1]
            torch.testing.assert_close(hidden, taught.model(inputs)[0].detach())
        assert batch.student_head is student.head.weight
        assert torch.equal(batch.teacher_head, taught.model.head.weight)


class Chain(nn.Module):
    """A model whose next character depends on the last one alone, by a matrix of probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.head = nn.Linear(len(probabilities), len(probabilities), bias=False)
        self.head.weight = nn.Parameter(probabilities.log().mT)

    def forward(self, characters):
        return F.one_hot(characters, len(self.head.weight)).to(self.head.weight.dtype)


def test_samples_have_the_probabilities_of_the_model(monkeypatch):
    monkeypatch.setattr(lm, "N_SAMPLED", 40)
    # 1 follows 0 always, 0 or 2 follow 1, 0 follows 2
    chain = Chain(torch.tensor([[0, 1, 0], [0.25, 0, 0.75], [1, 0, 0.0]]).clamp(min=1e-30))
    prompts = torch.tensor([[2, 0, 1]]).expand(200, 3)
    text = lm.sample(chain, prompts, torch.Generator().manual_seed(0))
    assert text.shape == (200, 43) and torch.equal(text[:, :3], prompts)
    last, following = text[:, 2:-1].flatten(), text[:, 3:].flatten()
    assert (following[last == 0] == 1).all() and (following[last == 2] == 0).all()
    share = (following[last == 1] == 2).double().mean().item()
    assert share == pytest.approx(0.75, abs=0.03) and (following[last == 1] != 1).all()


def test_measures_are_those_of_known_networks(data):
    n = len(data.characters)
    uniform, skewed = torch.full((n, n), 1 / n), torch.full((n, n), 0.5 / (n - 1))
    skewed[:, 0] = 0.5
    teacher = Chain(skewed)
    taught = lm.Taught(teacher, lm.hidden_states(teacher, data.windows))
    found = lm.measured(lm.ALONE, 3, Chain(uniform), data, taught)
    divergence = (uniform * (uniform / skewed).log()).sum(-1)[0].item()
    assert found[:2] == (lm.ALONE, 3)
    assert found.nats == pytest.approx(math.log(n), rel=1e-5)
    assert found.reverse_kl == pytest.approx(divergence, rel=1e-5)
    assert lm.measured(lm.TEACHER, 0, teacher, data, taught).reverse_kl == pytest.approx(
        0, abs=1e-6
    )


# ------------------------------------------------------------------------------------------ losses


def batch():
    """Return a batch of 14 characters of 11."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, 5), (11, 5), (2, 7, 6), (11, 6)
    student, head, *teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    labels = torch.randint(11, (2, 7), generator=generator)
    return lm.Batch(student.requires_grad_(), head.requires_grad_(), *teacher, labels)


def test_linear_kd_and_the_eager_expression_are_one_loss():
    both = []
    for method in (lm.DISTILLED, lm.EAGER):
        inputs = batch()
        value = method.loss(inputs)
        both.append((value, *torch.autograd.grad(value, inputs[:2])))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_reverse_divergence_asks_how_likely_the_students_characters_are():
    inputs = batch()
    value = lm.OWN_TEXT.loss(inputs)
    log_q = (inputs.student @ inputs.student_head.mT).log_softmax(-1)
    log_p = (inputs.teacher @ inputs.teacher_head.mT).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    gradients = (torch.autograd.grad(x, inputs[:2]) for x in (value, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_own_text_is_what_follows_the_prompt_and_both_networks_read_it(data, taught):
    student, prompts = lm.new_student(data, 0), data.windows[:5, : lm.PROMPT]
    found = lm.continued(student, taught.model, prompts, torch.Generator().manual_seed(1))
    text = lm.sample(student, prompts, torch.Generator().manual_seed(1))
    assert torch.equal(found.labels, text[:, lm.PROMPT :])
    for model, hidden in ((student, found.student), (taught.model, found.teacher)):
        assert hidden.shape[:2] == found.labels.shape == (5, lm.N_SAMPLED)
        torch.testing.assert_close(hidden[:, 0], model(prompts)[:, -1])
        torch.testing.assert_close(hidden[:, -1], model(text[:, :-1])[:, -1])
    assert found.student.requires_grad and not found.teacher.requires_grad


def test_own_text_brings_the_student_nearer_to_the_teacher(data, taught, monkeypatch):
    monkeypatch.setattr(lm, "OWN_STEPS", 40)
    student = lm.new_student(data, 0)
    before = lm.measured(lm.DISTILLED, 0, student, data, taught)
    lm.fit_to_own_text(student, data, taught, 0, lambda what: None)
    after = lm.measured(lm.OWN_TEXT, 0, student, data, taught)
    assert after.reverse_kl < 0.7 * before.reverse_kl


# ------------------------------------------------------------------------------------------ tables


def test_a_gain_is_of_nats_that_are_saved():
    nats = {lm.TEACHER: [1.0], lm.ALONE: [2.0, 2.5, 3.0], lm.DISTILLED: [1.5, 2.6, 2.0]}
    nats[lm.OWN_TEXT] = [1.25, 1.5, 1.75]
    fits = [
        lm.Fit(method, seed, x, x / 2)
        for method, values in nats.items()
        for seed, x in enumerate(values)
    ]
    assert lm_report.table(fits) == [
        ["teacher", "1.0000", "2.72", "", ""],
        ["no teacher", "2.5000 ± 0.5000", "13.22 ± 6.41", "", ""],
        ["KD, linear_kd", "2.0333 ± 0.5508", "8.44 ± 4.58", "+0.4667 ± 0.5508", "2/3"],
    ]
    assert lm_report.own_table(fits)[2] == [
        *("KD, then its own text", "0.7500 ± 0.1250", "1.5000 ± 0.2500")
    ]


def test_memory_is_counted_as_the_tests_count_it():
    inputs = lm_report.random_batch(*LARGE, "cpu")
    trained = [inputs.student, inputs.student_head]
    losses = [lambda: lm.eager(inputs), lambda: lm.distilled(inputs)]
    found = costs.compare(losses, trained, n_rounds=1)
    for loss, cost in zip(losses, found, strict=True):
        with PeakMemory() as memory:
            torch.autograd.grad(loss(), trained)
        assert cost.peak_bytes == memory.peak_bytes and cost.seconds > 0
    logits = 4 * LARGE[0] * LARGE[1]
    assert found[0].peak_bytes >= 4 * logits  # eager makes and keeps several tensors of all logits


def test_a_budget_bounds_the_memory_of_a_large_vocabulary(monkeypatch):
    n_tokens, n_entries = 256, 8000
    monkeypatch.setattr(lm_report, "LARGE", (n_tokens, n_entries))
    few, large = lm_report.costs(11, "cpu", lambda what: None).values()
    assert [row[0] for row in few] == [row[0] for row in large][:2]
    eager, fused, bounded = (float(row[1]) for row in large)
    logits, gradients = (n * n_entries / 2**18 for n in (n_tokens, lm.STUDENT_WIDTH))
    assert eager > 4 * logits and 2 * logits < fused < 3 * logits
    assert bounded < 2 * gradients + 2  # one of them the budget, the other all else

"""The demos that are studies, small: their data, their losses and their tables."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd
from fastkd import __main__ as program

online = pytest.importorskip("fastkd.demo.online", reason="needs the extra `demo`")
scenes = pytest.importorskip("fastkd.demo.scenes", reason="needs the extra `demo`")
study = pytest.importorskip("fastkd.demo.study", reason="needs the extra `demo`")
text = pytest.importorskip("fastkd.demo.text", reason="needs the extra `demo`")
texts = pytest.importorskip("fastkd.demo.texts", reason="needs the extra `demo`")
training = pytest.importorskip("fastkd.demo.training", reason="needs the extra `demo`")

SMALL = {text: dict(N_STUDENT=40, N_LABELLED=20, TEACHER_STEPS=2, N_TEST=50)}
SMALL[scenes] = dict(N_STUDENT=8, N_LABELLED=4, TEACHER_STEPS=2, N_TEST=4, N_TEACHER=8)
SMALL[online] = {}
STUDIES = [text.STUDY, scenes.STUDY, online.MUTUAL, online.EMA]
each_study = pytest.mark.parametrize("chosen", STUDIES, ids=lambda chosen: chosen.name)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for module, sizes in SMALL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
        monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(training, "TEACHER_STEPS", 2)


@each_study
def test_prints_and_writes_the_table_and_the_plot(chosen, tmp_path, capsys):
    name = chosen.name
    arguments = ["demo", name, "--seeds", "2", "--steps", "2", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    printed, written = capsys.readouterr().out, (tmp_path / f"{name}.md").read_text("utf-8")
    rows = [line.split("|")[1:-1] for line in written.splitlines() if line.startswith("| ")]
    names = [method.name for method in chosen.methods]
    assert [row[0].strip() for row in rows[2:]] == [chosen.teacher.name, *names]
    assert [cell.strip() for cell in rows[0]] == study.header_of(chosen)
    for word in (*names, *study.header_of(chosen)):  # 80 columns hold all of them
        assert word in printed
    gains = [i for i, cell in enumerate(rows[0]) if cell.strip() == "gain"]
    assert len(gains) == chosen.n_gains
    assert not any(rows[3][i].strip() for i in gains)  # no teacher has no gain
    assert rows[4][2].strip()[0] in "+-" and rows[4][3].strip()[1:] == "/2"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@each_study
def test_the_same_seed_gives_the_same_numbers(chosen):
    first, second = ([*chosen.experiment(1, 2, "cpu")] for _ in range(2))
    assert [fit.results for fit in first] == [fit.results for fit in second]
    assert len(first) == 1 + len(chosen.methods)


def gradients_of(method, outputs, target):
    """Return the gradients in all that a student's output holds; teachers are not trained."""
    torch.manual_seed(0)
    student, teacher = torch.utils._pytree.tree_map(torch.Tensor.detach, outputs)
    student = torch.utils._pytree.tree_map(
        lambda x: x.requires_grad_() if x.is_floating_point() else x, student
    )
    loss = method.new_loss()(student, teacher, target)
    tensors = [x for x in torch.utils._pytree.tree_leaves(student) if x.requires_grad]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [x is not None and bool(x.isfinite().all()) and bool(x.any()) for x in found]


def test_each_loss_of_text_trains_what_its_name_says():
    def output(width, n_layers, seed):
        torch.manual_seed(seed)
        model = text.Encoder(data.n_tokens, width, n_layers, dropout=0.0)
        return model(data)

    data = texts.load("cpu").take(torch.arange(6))
    student = output(text.STUDENT_WIDTH, text.STUDENT_LAYERS, 0)
    teacher = output(text.TEACHER_WIDTH, text.TEACHER_LAYERS, 1)
    reached = {
        method.name: gradients_of(method, (student, teacher), data) for method in text.METHODS
    }
    # logits, embeddings, two hidden states, two attentions, q, k, v
    assert reached["no teacher"] == reached["KD"] == [True] + 8 * [False]
    hints = reached["KD + cosine (DistilBERT)"]
    assert hints == [True, False, False, True, *5 * [False]]
    assert reached["KD + layers (TinyBERT)"] == [*6 * [True], *3 * [False]]
    assert reached["KD + relations (MiniLM)"] == [True, *5 * [False], *3 * [True]]


def test_padding_reaches_nothing():
    data = texts.load("cpu").take(torch.arange(30))
    model = text.Encoder(data.n_tokens, 16, 2, dropout=0.0).eval()
    before = model(data).logits
    other = data._replace(tokens=torch.where(data.mask, data.tokens, 7))
    torch.testing.assert_close(model(other).logits, before)


def test_paragraphs_are_those_of_docstrings_and_each_is_there_once():
    data = texts.load("cpu")
    assert len(data.tokens) > 3000 and data.subjects.bincount().min() > 100
    assert torch.equal(data.mask, data.tokens != texts.PADDING)
    found = {*texts.paragraphs(["json"])}
    assert any(x.startswith("Serialize ``obj`` as a JSON formatted stream") for x in found)
    assert not any("\n" in x for x in found)


def test_students_see_few_labels():
    data = texts.load("cpu")
    few = text.few_labels(data, seed=1)
    assert (few.subjects != training.IGNORED).sum() == text.N_LABELLED
    assert len(few.subjects) == text.N_STUDENT and (data.subjects >= 0).all()


def test_boxes_enclose_the_digit_of_their_place():
    images, digits = training.load_images("cpu")
    drawn = scenes.draw(images, digits, n_scenes=5, seed=0)
    has_digit = drawn.distances[:, 0] >= 0
    assert torch.equal(has_digit, drawn.classes > 0)
    widths = drawn.distances[:, 0] + drawn.distances[:, 2] + 1
    heights = drawn.distances[:, 1] + drawn.distances[:, 3] + 1
    assert torch.equal(widths[has_digit], heights[has_digit])  # digits are squares
    assert 8 <= widths[has_digit].min() and widths[has_digit].max() < scenes.N_BINS
    assert (drawn.distances < scenes.N_BINS).all()
    row, column = has_digit[0].nonzero()[0] * scenes.STRIDE + scenes.STRIDE // 2
    assert drawn.images[0, 0, row, column] > 0.3


def test_a_perfect_network_has_full_measures():
    images, digits = training.load_images("cpu")
    drawn = scenes.draw(images[digits < 5], digits[digits < 5], n_scenes=20, seed=0)

    class Oracle(nn.Module):
        def forward(self, seen):
            classes = nn.functional.one_hot(drawn.classes, scenes.N_CLASSES).movedim(-1, 1)
            edges = nn.functional.one_hot(drawn.distances.clamp(min=0), scenes.N_BINS)
            return scenes.Output(seen.images, classes.float(), edges.float())

    assert scenes.measure(Oracle(), drawn) == (100.0, 100.0)


@pytest.mark.parametrize("method", scenes.METHODS, ids=lambda method: method.name)
def test_each_loss_of_scenes_teaches_places_without_a_label(method):
    images, digits = training.load_images("cpu")
    drawn = scenes.draw(images[digits < 5], digits[digits < 5], n_scenes=2, seed=0)
    for labels in drawn[1:]:
        labels[1] = training.IGNORED
    torch.manual_seed(0)
    student, teacher = (
        scenes.predict(scenes.Network(n), drawn)
        for n in (scenes.STUDENT_WIDTH, scenes.TEACHER_WIDTH)
    )
    for x in student:
        x.requires_grad_()
    loss = method.new_loss()(student, teacher, drawn)
    gradients = torch.autograd.grad(loss, [*student], allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in gradients)
    taught = [x is not None and bool(x[1].any()) for x in gradients]
    expected = {
        "no teacher": [False, False, False],
        "KD of each place": [False, True, False],
        "channel-wise (CWD)": [False, True, False],
        "localization (LD)": [False, False, True],
        "CWD + LD": [False, True, True],
        "hint, weighted": [True, False, False],
    }
    assert taught == expected[method.name]


# --------------------------------------------------------------------- online and without labels


def test_students_learn_from_whom_their_method_says():
    """Images without a label teach where there is a teacher, or another student."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 10, generator=generator).unbind()
    teacher = torch.randn(6, 10, generator=generator)
    labels = torch.tensor([3, -100, 1, -100, -100, 9])
    names = {"labels alone": False, "each other, two": True, "the teacher, KD": True}
    for method in online.GROUPS:
        loss = method.new_loss()
        students = [x.clone().requires_grad_() for x in logits[: loss.n_students]]
        gradients = torch.autograd.grad(loss(students, teacher, labels), students)
        assert len(students) == (3 if "three" in method.name else 2)
        for gradient in gradients:
            assert gradient[labels >= 0].any() and gradient.isfinite().all()
            assert bool(gradient[labels < 0].any()) is names.get(method.name, True)
        alone = online.Alone()(students, teacher, labels)
        apart = torch.autograd.grad(alone, students)
        assert all(torch.equal(a, b) for a, b in zip(gradients, apart, strict=True)) is (
            method.name == "labels alone"
        )


def test_a_group_is_judged_one_by_one_and_together():
    test = online.Data(torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))

    class Answer(nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = F.pad(torch.tensor(logits), (0, 8), value=-9.0)

        def forward(self, images):
            return SimpleNamespace(logits=self.logits)

    first = Answer((2.0, 0.0), (2.0, 0.0), (2.0, 0.0), (0.0, 2.0))  # 75 %
    second = Answer((9.0, 0.0), (0.0, 1.0), (0.0, 9.0), (0.0, 9.0))  # 75 %
    assert online.results_of(nn.ModuleList([first, second]), test) == (75.0, 100.0)


def test_an_average_is_returned_that_labels_did_not_teach():
    images, loss = training.load_images("cpu")[0][:40], online.DINO(online._average)
    torch.manual_seed(0)
    start = online.Encoder().state_dict()
    found = []
    for decay in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        loss.decay = lambda steps, decay=decay: fastkd.schedules.constant(decay)
        found.append(online.train_by_average(loss, images, 3, seed=0).state_dict())
    kept, average, last = ([*x.values()] for x in found)
    assert all(map(torch.equal, kept, start.values()))
    assert not any(map(torch.equal, average, kept)) and not any(map(torch.equal, average, last))


def test_crops_are_of_their_images_and_features_are_probed():
    images, digits = training.load_images("cpu")
    generator = torch.Generator().manual_seed(0)
    crops = online.cropped(images, generator)
    assert crops.shape == images.shape
    alike = F.cosine_similarity(crops.flatten(1), images.flatten(1))
    others = F.cosine_similarity(crops.flatten(1), images.flatten(1).roll(1, 0))
    assert alike.mean() > others.mean() + 0.1
    data = online.Data(images[:300], digits[:300])
    told = online.Data(F.one_hot(digits[:300], 64).float().view(-1, 1, 8, 8), digits[:300])
    assert online.probed(nn.Flatten(), told.take(torch.arange(60)), told) == 100.0
    assert 60 < online.probed(nn.Flatten(), data.take(torch.arange(60)), data) < 100

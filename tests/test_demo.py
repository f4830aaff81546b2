"""The demo, small: it trains, reports honestly, and fails where fastkd and eager PyTorch differ."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import __main__ as program
from fastkd._backend import choose

digits = pytest.importorskip("fastkd.demo.digits", reason="needs the extra `demo`")
report = pytest.importorskip("fastkd.demo.report", reason="needs the extra `demo`")
training = pytest.importorskip("fastkd.demo.training", reason="needs the extra `demo`")
two_towers = pytest.importorskip("fastkd.demo.two_towers", reason="needs the extra `demo`")

STEPS = 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "TEACHER_STEPS", 30)
    monkeypatch.setenv("COLUMNS", "80")


def keep_methods(monkeypatch, *methods):
    for module in (digits, report):
        monkeypatch.setattr(module, "METHODS", [*methods])


def fits(seeds=1, steps=STEPS):
    teacher, *students = digits.experiment(seeds, steps)
    return teacher, students


def test_prints_and_writes_the_tables_the_check_and_the_plot(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["demo", "--seeds", "1", "--steps", str(STEPS), "--out", str(out)]
    assert program.main(arguments) == 0
    printed, written = capsys.readouterr().out, (out / "digits.md").read_text(encoding="utf-8")
    for text in (printed, written):
        names = [method.name for method in (*digits.METHODS, *two_towers.METHODS)]
        for word in (*names, *report.HEADER, *report.TOWERS_HEADER):  # 80 columns hold all of them
            assert word in text
        assert "Check passed" in text
    rows = [line.split("|")[1:-1] for line in written.splitlines() if line.startswith("| ")]
    n_digits = len(digits.METHODS) + 2 * len(report.TITLES)  # each with its header and rule
    of_towers = rows[n_digits:]
    assert {len(row) for row in rows[:n_digits]} == {len(report.HEADER)}
    assert {len(row) for row in of_towers} == {len(report.TOWERS_HEADER)}
    assert [row[0].strip() for row in of_towers] == [
        *("two towers", "---", "teacher", "student alone", "student distilled")
    ]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    engines = [cells[name][-1] for name in ("no teacher", "KD, skew KL")]
    assert engines == ["PyTorch", choose([torch.empty(0)])]
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_loss_fails_the_check(monkeypatch, tmp_path, capsys):
    def without_t2(student, teacher, labels):
        log_q, p = F.log_softmax(student.logits / 4, -1), F.softmax(teacher.logits / 4, -1)
        supervised = F.cross_entropy(student.logits, labels)
        return 0.5 * supervised + 0.5 * F.kl_div(log_q, p, reduction="batchmean")

    wrong = digits.EAGER_KD._replace(loss=without_t2)
    keep_methods(monkeypatch, digits.NO_TEACHER, wrong, digits.KD)
    monkeypatch.setattr(report, "EAGER_KD", wrong)
    monkeypatch.setattr(report, "TITLES", {report.FEW: "few"})
    assert report.run(tmp_path, seeds=1, steps=3, device="cpu") == 1
    assert "Check FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-4, False), (float("nan"), False)])
def test_the_check_sees_a_small_error(error, passed):
    curve = torch.linspace(2, 1, 40)
    wrong = curve * (1 + error)
    students = [
        digits.Fit(method, seed, 90.0, 90.0, losses)
        for method, losses in ((digits.KD, wrong), (digits.EAGER_KD, curve))
        for seed in range(3)
    ]
    assert report.check(students)[0] is passed


def test_the_check_sees_a_late_error_in_most_seeds_only():
    """One chaotic seed may amplify its rounding, two of three may not."""
    curve = torch.linspace(2, 1, 40)
    late = curve.clone()
    late[20:] *= 1.01
    for n_late, passed in ((1, True), (2, False)):
        students = [
            digits.Fit(digits.KD, seed, 90.0, 90.0, late if seed < n_late else curve)
            for seed in range(3)
        ] + [digits.Fit(digits.EAGER_KD, seed, 90.0, 90.0, curve) for seed in range(3)]
        assert report.check(students)[0] is passed


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    keep_methods(monkeypatch, digits.KD)
    (first_teacher, first), (second_teacher, second) = fits(2), fits(2)
    for a, b in zip([first_teacher, *first], [second_teacher, *second], strict=True):
        assert torch.equal(a.losses, b.losses)
        assert a[:4] == b[:4]
    assert not torch.equal(first[0].losses, first[1].losses)  # another seed, another run


def test_students_see_few_labels_and_the_teacher_of_their_own_images():
    data, test = digits.load("cpu")
    images = data.images.flatten(1)
    data = data._replace(teacher=digits.Output(images[:, :10], images))
    few = digits.few_labels(data, seed=1)
    assert len(few.images) == training.N_STUDENT
    assert (few.labels != digits.IGNORED).sum() == digits.N_LABELLED
    assert torch.equal(few.teacher.features, few.images.flatten(1))
    assert (data.labels >= 0).all()  # the labels of the others are not overwritten
    assert not torch.equal(few.images, digits.few_labels(data, seed=2).images)
    assert len(data.images) + len(test.images) == 1797


@pytest.mark.parametrize("method", digits.METHODS, ids=lambda method: method.name)
def test_every_loss_teaches_the_student_alone(method):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 10, generator=generator)
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    labels = torch.tensor([3, -100, 1, -100, -100, 9])

    def output(logits, channels):
        places = torch.arange(4.0).view(2, 2)
        wide = logits.repeat(1, 4)[..., None, None]
        return digits.Output(logits, logits, tuple(wide[:, :n] + places for n in channels))

    compute = method.loss() if isinstance(method.loss, type) else method.loss
    of_teacher = output(teacher, digits.TEACHER_CHANNELS)
    loss = compute(output(student, digits.STUDENT_CHANNELS), of_teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    unlabelled = gradient[labels < 0]
    assert gradient.isfinite().all()
    assert bool(unlabelled.any()) is (method.loss is not digits.no_teacher)


def test_batches_depend_on_their_seed_alone():
    def batches(seed):
        model, rows = torch.nn.Linear(1, 1), []
        training.train(model, lambda x: rows.append(x) or model.weight.sum(), 9, 2, seed)
        return torch.stack(rows)

    first = batches(seed=0)
    assert first.shape == (2, training.BATCH) and first.unique().tolist() == [*range(9)]
    assert torch.equal(first, batches(seed=0))  # another start, the same batches
    assert not torch.equal(first, batches(seed=1))


def test_kd_and_the_eager_expression_are_one_loss():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, -100, 1, -100, -100, 9])
    both = []
    for method in (digits.KD, digits.EAGER_KD):
        student = logits.clone().requires_grad_()
        value = method.loss(digits.Output(student, student), digits.Output(other, other), labels)
        both.append((value, *torch.autograd.grad(value, student)))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gains_are_paired_and_wins_counted(monkeypatch):
    keep_methods(monkeypatch, digits.NO_TEACHER, digits.KD)
    accuracies = {digits.NO_TEACHER: (80.0, 90.0, 70.0), digits.KD: (90.0, 89.0, 80.0)}
    students = [
        digits.Fit(method, seed, accuracy, 95.0, torch.ones(3))
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    alone, taught = report.table(students, report.FEW, device="cpu")
    assert alone[:5] == ["no teacher", "80.0 ± 10.0", "", "", "95.0"]
    assert taught[:5] == ["KD, forward KL", "86.3 ± 5.5", "+6.3 ± 6.4", "2/3", "95.0"]


def test_losses_without_kernels_name_the_engine_that_they_have():
    with fastkd.backend("triton"):  # which a CPU has only for kernels that are interpreted
        uses = SimpleNamespace(has_kernels=False)
        assert digits.Method("", digits.contrastive, uses).engine("cpu") == "portable"


def test_contrastive_distillation_finds_the_teachers_features():
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, -100, 1, -100, -100, 9])
    student, teacher = digits.Output(logits, 1 - logits), digits.Output(others, others)
    cosines = F.normalize(student.features) @ F.normalize(teacher.features).mT
    contrast = 4 * F.cross_entropy(cosines / 0.2, torch.arange(6))
    for loss, supervised in (
        (digits.contrastive, digits.no_teacher),
        (digits.kd_and_contrastive, digits.KD.loss),
    ):
        expected = supervised(student, teacher, labels) + contrast
        torch.testing.assert_close(loss(student, teacher, labels), expected)


# ------------------------------------------------------------------------------------- two towers


def halves(n=6, width=4, seed=0, scale=10.0):
    generator = torch.Generator().manual_seed(seed)
    upper, lower = F.normalize(torch.randn(2, n, width, generator=generator).double(), dim=-1)
    return two_towers.Halves(upper, lower, torch.tensor(scale, dtype=torch.float64))


def test_towers_see_their_half_alone():
    images, model = training.load_images("cpu")[0][:3], two_towers.new_teacher().eval()
    before = model(images)
    images[:, :, 4:] = 0
    after = model(images)
    assert torch.equal(before.upper, after.upper)
    assert not torch.isclose(before.lower, after.lower).all(1).any()


def test_recall_counts_both_directions():
    own = torch.eye(4)
    assert two_towers.recall(two_towers.Halves(own, own, torch.tensor(1.0))) == (100.0, 100.0)
    lower = torch.tensor([[1, 0, 0, 0], [0.9, 0.5, 0, 0], [0, 0, 1, 0], [0, 0.6, 0.9, 0.8]])
    assert two_towers.recall(two_towers.Halves(own, lower, torch.tensor(1.0))) == (75.0, 50.0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    same, other = halves(scale=10.0), halves(width=7, seed=1)
    alone = two_towers.alone(same, same)
    torch.testing.assert_close(two_towers.distilled(same, same), alone)  # both temperatures: 0.1
    assert two_towers.distilled(same, other) > alone + 0.1


def test_both_losses_of_the_towers_train_the_embeddings_and_the_scale():
    student, teacher = halves(), halves(width=7, seed=1)
    for x in student:
        x.requires_grad_()
    taught = two_towers.distilled(student, teacher)
    for loss in (two_towers.alone(student, student), taught - two_towers.alone(student, student)):
        for gradient in torch.autograd.grad(loss, student):
            assert gradient.isfinite().all() and gradient.abs().max() > 1e-3


def test_towers_learn_and_the_same_seed_gives_the_same_numbers():
    images = training.load_images("cpu")[0][:200]
    torch.manual_seed(0)
    teacher = two_towers.embed(two_towers.new_teacher(), images)
    curves = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student = two_towers.new_student()
        curves.append(two_towers.fit(student, two_towers.distilled, images, teacher, 30, seed))
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])
    assert curves[0][-5:].mean() < 0.9 * curves[0][:5].mean()


def test_gains_of_towers_are_over_the_student_alone():
    recalls = {
        two_towers.TEACHER: [(50.0, 60.0)],
        two_towers.ALONE: [(10.0, 20.0), (30.0, 20.0)],
        two_towers.DISTILLED: [(30.0, 20.0), (20.0, 20.0)],
    }
    rows = report.towers_table(
        [
            two_towers.Fit(method, seed, *pair)
            for method, pairs in recalls.items()
            for seed, pair in enumerate(pairs)
        ]
    )
    assert rows == [
        ["teacher", "50.0", "60.0", "", ""],
        ["student alone", "20.0 ± 14.1", "20.0 ± 0.0", "", ""],
        ["student distilled", "25.0 ± 7.1", "20.0 ± 0.0", "+2.5 ± 10.6", "1/2"],
    ]

"""Several teachers: how they are put together, what is read of them, weights, memory, errors."""

import pytest
import torch
from choice import quick_if
from exactness import assert_same
from inputs import DEVICE, INTERPRETED, logits_of_three, normal
from meter import Meter, PeakMemory

import fastkd
from fastkd import _checks
from fastkd.problems import ensembles
from fastkd.problems.rows import DIVERGENCES

COMBINATIONS = ensembles.COMBINATIONS
WEIGHTS = {
    "none": lambda n: None,
    "numbers": lambda n: [0.5, 0.0, 1.2],
    "of each row": lambda n: normal(*n, 3, seed=22).exp(),
}


def gradients(loss, student, **options):
    """Return the loss and its gradient under a random upstream gradient of order one."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, **options)
    upstream = normal(*value.shape, dtype=value.dtype, seed=99)
    return [value.detach(), *torch.autograd.grad(value, student, upstream)]


def by_both(student, teachers, **options):
    """Return the losses and gradients of the engine, and those of the formula."""

    def loss(student):
        return fastkd.multi_teacher(student, teachers, **options)

    found = gradients(loss, student)
    with fastkd.backend("formula"):
        return found, gradients(loss, student)


def three(examples=(4,), width=7, seed=0):
    student, *teachers = logits_of_three(examples, width, seed=seed)
    return student.detach(), teachers


# ----------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick_if(
    lambda divergence, weights, engine: (
        engine != "triton" or (divergence, weights) == ("jensen_shannon", "of each row")
    )
)
def test_every_combination_is_its_formula(divergence, combine, weights, engine):
    student, teachers = three()
    options = dict(
        divergence=divergence, combine=combine, teacher_weights=WEIGHTS[weights]((4,)),
        temperature=3.0, student_temperature=2.0,
    )  # fmt: skip
    for reduction in ("mean", "none"):
        assert_same(*by_both(student, teachers, reduction=reduction, **options))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_teachers_of_several_dtypes_and_layouts(combine, engine):
    """Logits without the last position are no matrix, and one teacher makes float64 of all."""
    student, teachers = three((2, 5))
    student = student[:, :-1].bfloat16() if engine != "triton" else student[:, :-1].half()
    teachers = [teachers[0].float()[:, :-1], teachers[1][:, :-1], teachers[2].half()[:, :-1]]
    found, expected = by_both(student, teachers, combine=combine, divergence="reverse_kl")
    assert found[0].dtype == torch.float64 and found[1].dtype == student.dtype
    assert_same(found[:1], expected[:1])
    assert_same(found[1:], expected[1:], 2e-2 if student.dtype == torch.bfloat16 else 2e-3)


def test_one_teacher_is_the_plain_loss(engine):
    student, (teacher, *_) = three()
    for combine in COMBINATIONS:
        options = dict(temperature=2.0, divergence="jensen_shannon", combine=combine)
        found = gradients(lambda x, o=options: fastkd.multi_teacher(x, [teacher], **o), student)
        expected = gradients(lambda x: fastkd.jensen_shannon(x, teacher, temperature=2.0), student)
        assert_same(found, expected)


def test_a_sum_of_forward_kls_has_the_gradient_of_the_mixture(engine):
    """Their values differ by Σ w KL(p_k ‖ p̄), which has no student."""
    student, teachers = three()
    options = dict(teacher_weights=[0.5, 0.2, 0.3], temperature=2.0)

    def loss(student, **more):
        return fastkd.multi_teacher(student, teachers, **options, **more)

    mixed, summed = gradients(loss, student), gradients(loss, student, combine="sum")
    assert_same(summed[1:], mixed[1:])
    p = torch.stack([(x / 2).softmax(-1) for x in teachers])
    w = torch.tensor(options["teacher_weights"], dtype=p.dtype, device=DEVICE)[:, None, None]
    of_mixture = (w * p * (p.log() - (w * p).sum(0).log())).sum((0, -1)).mean()
    assert_same(summed[:1], [mixed[0] + 4 * of_mixture])


def test_a_sum_of_reverse_kls_has_the_gradient_of_averaged_logits(engine):
    student, teachers = three()
    options = dict(teacher_weights=[0.5, 0.2, 0.3], temperature=2.0, divergence="reverse_kl")

    def loss(student, **more):
        return fastkd.multi_teacher(student, teachers, **options, **more)

    averaged, summed = (gradients(loss, student, combine=x) for x in ("logits", "sum"))
    assert_same(summed[1:], averaged[1:])
    assert summed[0] > averaged[0]


def test_only_ratios_of_weights_count_in_a_mixture():
    student, teachers = three()
    found, expected = (
        gradients(lambda x, w=w: fastkd.multi_teacher(x, teachers, teacher_weights=w), student)
        for w in ([2.0, 4.0, 2.0], [0.25, 0.5, 0.25])
    )
    assert_same(found, expected)


def test_no_probability_of_a_mixture_vanishes(engine):
    """Float32 has none below 1e-45, but their logarithms; the entry that all exclude stays so."""
    student = normal(3, 6, dtype=torch.float32)
    student[:, 5] = -1e4
    logits = torch.tensor([[0.0, 150, -300, -400, -torch.inf, -torch.inf]], device=DEVICE)
    teachers = [logits.expand(3, 6), logits.roll(1, 1).expand(3, 6)]
    for divergence in ("reverse_kl", "symmetric_kl"):
        found, expected = by_both(student, teachers, divergence=divergence)
        assert found[0].isfinite() and found[0] > 50
        assert_same(found, expected, 1e-5)
    student[:, 5] = 0
    loss, _ = by_both(student, teachers, divergence="reverse_kl")[0]
    assert loss == torch.inf


@pytest.mark.parametrize("combine, value", [("logits", -torch.inf), ("sum", torch.inf)])
def test_a_teacher_of_weight_0_counts_for_nothing(combine, value, engine):
    """It may exclude what others have, or differ from the student by an infinite loss."""
    student, teachers = three()
    excluding = teachers[1].clone()
    excluding[:, 2] = -torch.inf
    for weights in ([0.3, 0.0, 0.7], torch.tensor([0.3, 0.0, 0.7], device=DEVICE).expand(4, 3)):
        options = dict(combine=combine, divergence="reverse_kl", teacher_weights=weights)
        found, expected = (
            gradients(lambda x, y=y, o=options: fastkd.multi_teacher(x, y, **o), student)
            for y in ([teachers[0], excluding, teachers[2]], teachers)
        )
        assert_same(found, expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("combine", ["logits", "sum"])
def test_a_teacher_of_weight_0_may_hold_anything(combine, bad, divergence, engine):
    student, teachers = three()
    shares = normal(4, 3, seed=22).exp()
    shares[1, 0] = shares[2, 2] = 0
    dirty = [x.clone() for x in teachers]
    dirty[0][1] = dirty[2][2] = bad
    options = dict(combine=combine, divergence=divergence, teacher_weights=shares)
    found, expected = (
        gradients(lambda x, y=y: fastkd.multi_teacher(x, y, **options), student)
        for y in (dirty, teachers)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_rows_of_weight_0_may_hold_anything(combine, engine):
    student, teachers = three((6,))
    counted = torch.arange(6, device=DEVICE) % 3 > 0
    of_teachers = normal(6, 3, seed=22).exp()
    dirty = [torch.where(counted[:, None], x, torch.nan) for x in (student, *teachers, of_teachers)]
    labels = torch.where(counted, 0, -100)

    def loss(student, teachers, shares, **rows):
        options = dict(combine=combine, divergence="jensen_shannon", teacher_weights=shares)
        return gradients(lambda x: fastkd.multi_teacher(x, teachers, **options, **rows), student)

    expected = loss(student, teachers, of_teachers, weights=counted)
    for rows in (dict(weights=counted), dict(labels=labels)):
        found = loss(dirty[0], dirty[1:4], dirty[4], **rows)
        assert_same(found, expected)
        assert not found[1][~counted].any()


@quick_if(lambda engine: engine != "triton")
def test_a_row_that_does_not_count_takes_no_logarithm_from_the_others(engine):
    """Its NaN does not hide that other rows have probabilities which only logarithms hold."""
    student, teachers = three()
    far = [1e3 * x for x in teachers]
    weights = torch.tensor([1, 0, 1, 1], device=DEVICE)
    for x in (student, *far):
        x[1] = torch.nan
    found, expected = by_both(
        student, far, divergence="reverse_kl", weights=weights, reduction="none"
    )
    assert found[0].isfinite().all()
    assert_same(found, expected)


def test_a_teacher_of_weight_0_may_be_infinitely_far(engine):
    student, teachers = three()
    teachers[0][:, 2] = -torch.inf
    found, expected = by_both(
        student, teachers, divergence="reverse_kl", combine="sum",
        teacher_weights=[0.0, 0.5, 1.0], reduction="none",
    )  # fmt: skip
    assert all(x.isfinite().all() for x in found)
    assert_same(found, expected)


def test_another_upstream_gradient_than_the_foreseen_one(engine):
    """It multiplies the gradient that the forward made, and a 0 wins over a NaN."""
    student, teachers = three((60,))
    teachers[0][0] = torch.nan
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if engine == "triton" and dtype == torch.bfloat16:
            continue
        for factor in (1.0, 0.3, 0.0):
            x = student.to(dtype).requires_grad_()
            x_of_formula = x.detach().clone().requires_grad_()
            found = fastkd.multi_teacher(x, teachers, reduction="sum") * factor
            with fastkd.backend("formula"):
                expected = fastkd.multi_teacher(x_of_formula, teachers, reduction="sum") * factor
            (found,), (expected,) = (
                torch.autograd.grad(y, z) for y, z in ((found, x), (expected, x_of_formula))
            )
            assert_same([found[1:]], [expected[1:]], {2: 1e-2, 4: 1e-6, 8: 1e-12}[dtype.itemsize])
            assert found[0].isnan().all() == (factor != 0)


# ---------------------------------------------------------------------------- a teacher of each row


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@quick_if(
    lambda divergence, dtype, engine: (
        engine != "triton" or (divergence, dtype) == ("reverse_kl", torch.uint8)
    )
)
def test_each_row_learns_from_its_teacher_alone(divergence, dtype, engine):
    student, teachers = three((2, 4))
    index = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]], device=DEVICE)
    options = dict(divergence=divergence, temperature=2.0, teacher_index=index.to(dtype))
    others = [torch.where((index == k)[..., None], x, torch.nan) for k, x in enumerate(teachers)]
    of_each = torch.stack(teachers).gather(0, index[None, ..., None].expand(1, 2, 4, 7))[0]
    found = gradients(lambda x: fastkd.multi_teacher(x, others, **options), student)
    of_rows = getattr(fastkd, divergence)
    assert_same(found, gradients(lambda x: of_rows(x, of_each, temperature=2.0), student))
    assert_same(*by_both(student, others, **options))


def test_an_index_of_no_teacher_gives_a_nan_where_nobody_looks(engine):
    student, teachers = three()
    index = torch.tensor([0, 3, -1, 2], device=DEVICE)
    problem = ensembles.Ensemble(
        student.requires_grad_(), tuple(teachers), None, index, None, 1.0, 1.0, 0.0, 1.0,
        "forward_kl", "chosen",
    )  # fmt: skip
    losses = ensembles.solve(engine.split()[0], problem)
    assert losses.isnan().tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(losses, student, torch.ones_like(losses))
    assert gradient.isnan().all(-1).tolist() == [False, True, True, False]


# ------------------------------------------------------------------------------- memory and bytes


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_the_teachers_size_is_made(combine, dtype, reduction):
    """There are the gradient, the scratch of a chunk and some numbers for each row."""
    n_rows, n_cols, chunk = 64, 32000, 1 << 18
    student, *teachers = (torch.empty(n_rows, n_cols, dtype=dtype) for _ in range(4))
    for x in (student, *teachers):
        x.normal_()
    student.requires_grad_()
    weights = torch.rand(n_rows, 3)
    with fastkd.backend("portable"), PeakMemory() as memory:
        losses = fastkd.multi_teacher(
            student, teachers, combine=combine, teacher_weights=weights, reduction=reduction
        )
        losses.sum().backward()
    gradient, scratch = student.nbytes, 8 * 4 * chunk + chunk
    assert memory.peak_bytes <= gradient + scratch + 512 * n_rows


NEEDS_INTERPRETER = pytest.mark.skipif(
    not INTERPRETED, reason="needs Triton's interpreter, TRITON_INTERPRET=1"
)
LONG = 8192 + 5  # columns that do not stay on chip


def loads_of(launch, student):
    """Return how often the entries of the student and of each teacher are read, on average."""
    names = ["student.ptr", *(f"teachers.{k}.ptr" for k in range(3))]
    return [launch.arguments[x].loaded / student.nbytes for x in names]


@NEEDS_INTERPRETER
@pytest.mark.parametrize("width", [70, LONG])
def test_kernels_read_the_chosen_rows_alone(width):
    student, teachers = three((6,), width)
    student, teachers = student.float().requires_grad_(), [x.float() for x in teachers]
    index = torch.tensor([0, 2, 1, 1, 0, 0])
    with fastkd.backend("triton"), Meter() as meter:
        losses = fastkd.multi_teacher(student, teachers, teacher_index=index, reduction="none")
        torch.autograd.grad(losses.sum(), student)
    assert len(meter.launches) == 2 and not meter.races
    for launch in meter.launches:
        assert loads_of(launch, student) == pytest.approx([1, 3 / 6, 2 / 6, 1 / 6])


@NEEDS_INTERPRETER
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_whole_rows_are_read_once_and_the_gradient_alone_is_written(combine):
    student, teachers = three((3,), 70)
    student, teachers = student.bfloat16().requires_grad_(), [x.bfloat16() for x in teachers]
    with fastkd.backend("triton"), Meter() as meter:
        loss = fastkd.multi_teacher(student, teachers, combine=combine)
        torch.autograd.grad(loss, student)
    # the second one finds that the gradient was made for the weight which every row has
    forward, backward = meter.launches
    assert loads_of(forward, student) == [1, 1, 1, 1] and not meter.races
    stored = {name: x.stored for name, x in forward.arguments.items() if x.stored}
    assert stored == {"gradient_ptr": student.nbytes, "losses_ptr": 3 * 4}
    assert {name for name, x in backward.arguments.items() if x.loaded} == {"upstream_ptr"}


@NEEDS_INTERPRETER
@pytest.mark.parametrize(
    "combine, divergence, of_student, of_teachers",
    [
        ("mixture", "forward_kl", 1, 2),
        ("logits", "forward_kl", 1, 1),
        ("sum", "forward_kl", 3, 1),
        ("mixture", "jensen_shannon", 2, 2),
        ("logits", "jensen_shannon", 2, 2),
    ],
)
def test_reads_of_long_rows(combine, divergence, of_student, of_teachers):
    """They are those that `sweeps.py` names; a gradient reads once, of a sum from the cache too."""
    student, teachers = three((2,), LONG)
    student, teachers = student.bfloat16().requires_grad_(), [x.bfloat16() for x in teachers]
    with fastkd.backend("triton"), Meter() as meter:
        loss = fastkd.multi_teacher(
            student, teachers, combine=combine, divergence=divergence, reduction="none"
        )
        torch.autograd.grad(loss.sum(), student)
    losses, gradient = meter.launches
    assert loads_of(losses, student) == [of_student, *3 * [of_teachers]] and not meter.races
    assert loads_of(gradient, student)[1:] == [1, 1, 1]
    assert gradient.arguments["gradient_ptr"].stored == student.nbytes


@NEEDS_INTERPRETER
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_cross_entropy"])
def test_a_long_mixture_of_known_weight_is_read_twice_in_all(divergence):
    student, teachers = three((2,), LONG)
    student, teachers = student.bfloat16().requires_grad_(), [x.bfloat16() for x in teachers]
    with fastkd.backend("triton"), Meter() as meter:
        loss = fastkd.multi_teacher(student, teachers, divergence=divergence)
        torch.autograd.grad(loss, student)
    losses, gradient = meter.launches
    assert loads_of(losses, student) == [2, 2, 2, 2] and not meter.races
    assert losses.arguments["gradient_ptr"].stored == student.nbytes
    assert {name for name, x in gradient.arguments.items() if x.loaded} == {"upstream_ptr"}


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_cross_entropy"])
@quick_if(lambda divergence, engine: engine == "triton")
def test_the_gradient_of_a_long_mixture_is_made_for_the_weight_that_it_gets(divergence, engine):
    """It is the one of the mean at first, and another one where the upstream gradient differs."""
    student, teachers = three((4,), LONG)
    student.detach()[1, 5] = 40.0  # certain, where the teachers are not
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE)
    student.detach()[2] = torch.nan
    options = dict(divergence=divergence, temperature=2.0)

    def found(rows, dtype, weights, factor):
        x, *of = (y[rows].to(dtype) for y in (student, *teachers))
        x.requires_grad_()
        loss = fastkd.multi_teacher(x, of, weights=weights, normalizer=3, **options)
        loss.backward(torch.full_like(loss, factor), retain_graph=True)
        first, x.grad = x.grad, None
        loss.backward()
        return loss, first, x.grad

    kept = [0, 1, 3]
    for factor in (1.0, 3.0):
        with fastkd.backend("formula"):
            exact = found(kept, torch.float64, None, factor)
        loss, first, second = found(kept, torch.float32, None, factor)
        assert_same([loss, first, second], [x.float() for x in exact], 1e-5)
        loss, *others = found([0, 1, 2, 3], torch.float32, weights, factor)
        for gradient, of_exact in zip(others, exact[1:], strict=True):
            assert not gradient[2].any()
            assert_same([loss, gradient[kept]], [exact[0].float(), of_exact.float()], 1e-5)


@NEEDS_INTERPRETER
def test_rows_that_do_not_count_are_not_read():
    for width in (70, LONG):
        student, teachers = three((2,), width)
        student, teachers = student.float().requires_grad_(), [x.float() for x in teachers]
        with fastkd.backend("triton"), Meter() as meter:
            loss = fastkd.multi_teacher(student, teachers, weights=torch.tensor([0.0, 1.0]))
            torch.autograd.grad(loss, student)
        for launch in meter.launches:
            found = launch.arguments["student.ptr"].unique_loaded
            assert found == student.nbytes // 2


@pytest.mark.parametrize("combine", COMBINATIONS)
@quick_if(lambda combine, engine: engine == "triton" and combine != "logits")
def test_long_rows_of_a_certain_student(combine, engine):
    """The gradient of the certain class is minus the sum of the others, to the last digit."""
    student, teachers = three((2,), LONG)
    student[0, 4100] = student[1, LONG - 1] = 60.0
    student, teachers = student.float(), [x.float() for x in teachers]
    weights = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.3, 0.2]], device=DEVICE)
    options = dict(combine=combine, teacher_weights=weights, divergence="forward_kl")
    found, gradient = by_both(student, teachers, **options)[0]
    exact = by_both(student.double(), [x.double() for x in teachers], **options)[1]
    assert_same([found, gradient], [x.float() for x in exact], 1e-5)
    of_rows = gradient.double().sum(-1).abs() / gradient.double().abs().amax(-1)
    assert of_rows.max() < 1e-6


@pytest.mark.parametrize("combine", ["mixture", "logits", "sum"])
@quick_if(lambda combine, engine: engine != "triton" or combine == "mixture")
def test_a_long_row_without_a_softmax_leaves_its_neighbours_alone(combine, engine):
    student, *teachers = logits_of_three((3,), LONG, torch.float32)
    options = dict(combine=combine, reduction="none")

    def found():
        losses = fastkd.multi_teacher(student, teachers, **options)
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        return losses, gradient

    expected = found()
    student.detach()[1] = -torch.inf
    losses, gradient = found()
    assert losses[1].isnan() and gradient[1].isnan().all()
    others = [0, 2]
    assert_same([losses[others], gradient[others]], [x[others] for x in expected], 1e-6)


@pytest.mark.parametrize("combine", COMBINATIONS)
@quick_if(lambda combine, engine: combine == "mixture")
def test_many_teachers(combine, engine):
    student, _ = three((3,))
    teachers = [3 * normal(3, 7, seed=40 + k) for k in range(11)]
    assert_same(*by_both(student, teachers, combine=combine, divergence="reverse_kl"))


# ---------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("combine", COMBINATIONS)
@quick_if(lambda combine: combine == "mixture")
def test_a_compiled_ensemble_is_one_op(combine):
    student, teachers = three((19,))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def loss(student, *teachers):
        weights = [0.5, 0.2, 0.3]
        return fastkd.multi_teacher(student, teachers, combine=combine, teacher_weights=weights)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(loss, backend=backend, fullgraph=True)(student, *teachers)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("fastkd.ensemble_forward" in name for name in called) == 1
    assert not any("softmax" in name or "exp" in name.split(".")[-1] for name in called)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    # one teacher may be passed twice
    teachers[2] = teachers[0]
    assert_same(
        *(
            gradients(lambda x, f=function: f(x, *teachers), student)
            for function in (compiled, loss)
        )
    )


# ------------------------------------------------------------------------------ weights of teachers


def test_weights_of_the_surer_teacher_are_larger():
    _, teachers = three((5,))
    labels = torch.tensor([0, 3, -100, 6, 1], device=DEVICE)
    p = torch.stack(teachers, -1).softmax(-2)
    of_labels = p.gather(1, labels.clamp(min=0)[:, None, None].expand(5, 1, 3))[:, 0].log()
    scores = {
        "cross_entropy": torch.where(labels[:, None] < 0, 0.0, of_labels),
        "entropy": (p * p.log()).sum(1),
        "max_probability": p.amax(1),
    }
    for by, score in scores.items():
        found = fastkd.teacher_weights(teachers, labels, by=by, temperature=0.5)
        assert_same([found], [(score / 0.5).softmax(-1)])
    student = three((5,))[0].requires_grad_()
    weights = fastkd.teacher_weights([student, *teachers], by="entropy")
    assert not weights.requires_grad
    loss = fastkd.multi_teacher(
        student, teachers, teacher_weights=fastkd.teacher_weights(teachers, by="entropy")
    )
    assert loss.isfinite()


def test_weights_that_require_grad_get_none_and_that_is_said(engine):
    student, teachers = three()
    weights = torch.tensor([0.5, 0.2, 0.3], device=DEVICE, requires_grad=True)
    _checks._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="teacher_weights requires grad"):
        loss = fastkd.multi_teacher(student.requires_grad_(), teachers, teacher_weights=weights)
    assert torch.autograd.grad(loss, weights, allow_unused=True) == (None,)


def test_the_module_has_the_options_of_the_function():
    student, teachers = three()
    options = dict(combine="sum", divergence="reverse_kl", temperature=2.0)
    module, index = fastkd.MultiTeacherLoss(**options), torch.tensor([0, 2, 1, 1], device=DEVICE)
    for batch in ({}, dict(teacher_weights=[0.1, 0.2, 0.3]), dict(teacher_index=index)):
        expected = fastkd.multi_teacher(student, teachers, **batch, **options)
        assert_same([module(student, teachers, **batch)], [expected])
    with pytest.raises(ValueError, match="combine must be"):
        fastkd.MultiTeacherLoss(combine="product")


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(teachers=[]), "teachers is empty: pass the logits of at least one"),
        (dict(teachers=torch.zeros(3, 4, 7)), r"a list or tuple .* \[3, 4, 7\].*teachers.unbind"),
        (dict(teachers=None), "a list or tuple of K tensors .* got NoneType"),
        (dict(teachers=[torch.zeros(4, 7), torch.zeros(4, 8)]), r"teachers\[1\]: .* one shape"),
        (dict(teachers=[torch.zeros(4, 7), 3]), r"teachers\[1\]: teacher_logits must be a tensor"),
        (
            dict(teachers=[torch.zeros(4, 7), torch.zeros(4, 7, device="meta")]),
            r"teachers\[1\]: .* is on cpu, teacher_logits on meta: move them",
        ),
        (dict(combine="product"), 'combine must be "mixture" or "logits" or "sum", got .product'),
        (dict(divergence="kl"), "divergence must be one of forward_kl"),
        (dict(divergence="jensen_shannon", beta=2.0), "beta must be a number in"),
        (dict(temperature=0.0), "temperature must be a finite number above 0"),
        (dict(temperature=torch.ones(4)), r"temperature must be a number.*got \[4\]"),
        (dict(teacher_temperature=torch.ones((), requires_grad=True)), "without gradient"),
        (dict(teacher_weights=[1.0, 2.0]), r"one number for each of 3 teachers.*got \[2\]"),
        (dict(teacher_weights="abc"), "one number for each of 3 teachers.*got str"),
        (dict(teacher_weights=[1.0, -1.0, 1.0]), "must be at least 0"),
        (dict(teacher_weights=[0.0, 0.0, 0.0]), "one of them above in a mixture"),
        (dict(teacher_index=torch.zeros(3, dtype=torch.int64)), r"of integers of shape \[4\], got"),
        (dict(teacher_index=torch.zeros(4)), "of integers of shape .*torch.float32"),
        (dict(teacher_index=torch.tensor([0, 1, 2, 3])), r"lie in \[0, 3\).*got 3; rows without"),
        (dict(teacher_index=torch.tensor([0, 1, 2, -1])), r"lie in \[0, 3\).*got -1"),
        (
            dict(teacher_index=torch.zeros(4, dtype=torch.int64), teacher_weights=[1.0, 1.0, 1.0]),
            "got teacher_index and teacher_weights.*drop one",
        ),
    ],
)
def test_errors_say_what_to_do(change, sentence):
    given = dict(student_logits=torch.zeros(4, 7), teachers=[torch.zeros(4, 7)] * 3) | change
    with pytest.raises((TypeError, ValueError), match=f"(?s){sentence}"):
        fastkd.multi_teacher(**given)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(labels=None), 'needs labels: pass them, or by="entropy"'),
        (dict(by="margin"), 'by must be "cross_entropy" or'),
        (dict(labels=torch.full((4,), 7)), r"labels must lie in \[0, 7\)"),
        (dict(teachers=[]), "teachers is empty"),
        (dict(temperature=0.0), "temperature must be a finite number above 0"),
    ],
)
def test_errors_of_weights_say_what_to_do(change, sentence):
    labels = torch.zeros(4, dtype=torch.int64)
    given = dict(teachers=[torch.zeros(4, 7)] * 2, labels=labels) | change
    with pytest.raises(ValueError, match=sentence):
        fastkd.teacher_weights(**given)

"""The correlation family: its losses by every engine equal the published ones, and cost little."""

import contracts
import correlations
import pytest
import torch
import torch.nn.functional as F
from correlations import (
    DIST,
    KERNEL,
    LOSSES,
    OF_FEATURES,
    OF_GRAM,
    PKT,
    SIMILARITIES,
    each_case,
    each_loss,
    of_gram,
    published_dist,
)
from exactness import assert_as_exact, assert_same, exact, results
from losses import DEVICE, normal
from meter import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import _backend, _checks
from fastkd.portable import correlation as portable

engine = correlations.engine
smoke = pytest.mark.smoke


# -------------------------------------------------------------------------------------- numbers


@smoke
@each_case
@pytest.mark.parametrize("n, width", [(2, 3), (7, 5), (33, 3), (33, 70), (67, 9)])
def test_the_published_loss_and_gradient(case, n, width, engine):
    inputs = case.inputs((n,), width)
    found, expected = results(case, inputs), results(case.eager, inputs)
    for x, y in zip(found, expected, strict=True):  # two examples may have nothing to learn
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * max(1.0, y.abs().max()))


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n, width", [(5, 37), (67, 33), (130, 20)])
def test_every_dtype(case, n, width, dtype, engine):
    inputs = case.inputs((n,), width, dtype)
    with fastkd.backend("formula"):
        truth, yardstick = results(case, exact(inputs)), results(case, inputs)
    loss, gradient = results(case, inputs)
    assert_as_exact([loss, gradient], yardstick, truth)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


@smoke
def test_pkt_is_exact_near_the_teacher():
    """Where the terms of the sum cancel: the definition in float32 has not one digit right."""
    student = normal(64, 32).float()
    teacher = student + 1e-3 * normal(64, 32, seed=1).float()
    inputs = [student.requires_grad_(), teacher]
    for x, true in zip(results(PKT, inputs), results(PKT, exact(inputs)), strict=True):
        assert (x.double() - true).norm() <= 1e-3 * true.norm()


@each_case
def test_gradcheck(case, engine):
    student, teacher = case.inputs((5,), 3)
    assert torch.autograd.gradcheck(lambda x: case(x, teacher), [student])


def test_options_given_as_tensors(engine):
    for case, options in (
        (KERNEL, dict(gamma=0.7)),
        (DIST, dict(beta=0.5, gamma=2.0, temperature=3.0)),
    ):
        inputs = case.inputs((9,), 5)
        tensors = {name: torch.tensor(value, device=DEVICE) for name, value in options.items()}
        found = results(lambda *x, c=case, o=tensors: c(*x, **o), inputs)
        expected = results(lambda *x, c=case, o=options: c(*x, **o), inputs)
        assert_same(found, expected, tolerance=1e-6)


# -------------------------------------------------------------------------------------- batches


@smoke
@each_case
def test_an_empty_batch(case, engine):
    student, teacher = case.inputs((0,), 3, torch.bfloat16)
    loss = case(student, teacher)
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, student)[0].shape == (0, 3)


@smoke
@each_case
def test_a_single_example(case, engine):
    """Without relations, but with correlations between its classes."""
    inputs = case.inputs((1,), 3)
    loss, gradient = results(case, inputs)
    expected = case.eager(*inputs) if case.loss is fastkd.dist_kd else torch.zeros_like(loss)
    assert (loss - expected).abs() <= 1e-15
    if case.loss is not fastkd.dist_kd:
        assert gradient.abs().max() <= 1e-15
    else:
        assert_same([gradient], results(case.eager, inputs)[1:], tolerance=1e-11)


@each_loss
def test_more_dimensions_are_flattened(case, engine):
    student, teacher = case.inputs((3, 2, 4), 5)
    if case is DIST:
        flat = [x.detach().reshape(-1, 5) for x in (student, teacher)]
    else:
        flat = [x.detach().reshape(3, -1) for x in (student, teacher)]
    loss, gradient = results(case, [student, teacher])
    expected, of_flat = results(case, [flat[0].requires_grad_(), flat[1]])
    assert_same([loss, gradient.reshape(of_flat.shape)], [expected, of_flat])


@each_loss
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: F.pad(x, (0, 3), value=torch.nan)[:, :-3],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["transposed", "padded", "every other row", "every other feature"],
)
def test_every_layout(case, lay_out, engine):
    student, teacher = case.inputs((19,), 5)
    strided = [lay_out(student.detach()).requires_grad_(), lay_out(teacher)]
    assert_same(results(case, strided), results(case, [student, teacher]))


@smoke
@of_gram
@pytest.mark.parametrize("whose", [(0, 1), (1,), (0,)], ids=["both", "teacher", "student"])
def test_examples_without_features(case, whose, engine):
    """The published loss, and a gradient from the directions of the others alone."""
    inputs = [x.detach() for x in case.inputs((17,), 3)]
    for i in whose:
        inputs[i][[2, 5]] = 0
    inputs[0].requires_grad_()
    loss, gradient = results(case, inputs)
    assert_same([loss], [case.eager(*inputs).detach()])
    with fastkd.backend("formula"):
        assert_same([gradient], results(case, inputs)[1:])
    assert gradient.abs().max() < 10
    if 0 in whose and case is not SIMILARITIES:
        assert not gradient[[2, 5]].any()


@smoke
@each_case
def test_collapsed_students(case, engine):
    student, teacher = case.inputs((9,), 4)
    for collapsed in (student.detach()[:1].repeat(9, 1), torch.zeros_like(teacher[:, :4])):
        inputs = [collapsed.requires_grad_(), teacher]
        loss, gradient = results(case, inputs)
        assert_same([loss], [case.eager(*inputs).detach()])
        assert gradient.isfinite().all()


def test_a_uniform_row_correlates_with_nothing(engine):
    student, teacher = DIST.inputs((9,), 8)
    with torch.no_grad():
        student[3] = 1.5
    assert_same(results(DIST, [student, teacher]), results(DIST.eager, [student, teacher]))


@smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_teacher_that_does_not_vary_over_the_batch(dtype, engine):
    """Views of one image: nothing between examples is to be learned."""
    student, teacher = DIST.inputs((50,), 7, dtype)
    teacher = teacher[:1].expand(50, 7)
    truth = results(published_dist, exact([student, teacher]))
    assert_same(results(fastkd.dist_kd, [student, teacher]), truth, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_and_masked_logits(dtype, engine):
    student, teacher = (1000 * x.detach() for x in DIST.inputs((9,), 8, dtype))
    for x in (student, teacher):
        x[:, 3] = -torch.inf
    loss, gradient = results(DIST, [student.requires_grad_(), teacher])
    assert_same([loss], [DIST.eager(student, teacher).detach()], tolerance=1e-6)
    assert gradient.isfinite().all()


@each_case
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_nan_is_not_hidden(case, value, whose, engine):
    inputs = [x.detach() for x in case.inputs((5,), 3)]
    inputs[whose][2, 1] = value
    assert not case(*inputs).isfinite()


# --------------------------------------------------------------------------------------- memory

CHUNK = 4 * portable._CHUNK_ELEMENTS["cpu"]  # bytes of a buffer


def peak_of(case, inputs):
    with PeakMemory() as memory:
        case(*inputs)
    return memory.peak_bytes


@each_loss
def test_forward_keeps_the_gradient_and_a_few_buffers(case):
    """Of a chunk of rows: four, and less than 64 numbers an example and 64 a class."""
    n, width = 2048, 512
    student, teacher = case.inputs((n,), width, torch.float32)
    few = 256 * (n + width)
    gradient = 4 * n * width
    assert gradient < peak_of(case, [student, teacher]) <= gradient + 4 * CHUNK + few
    assert peak_of(case, [student.detach(), teacher]) <= 5 * CHUNK + few
    narrow = [x.detach().bfloat16() for x in (student, teacher)]
    copies = 2 * gradient * (case in OF_GRAM)  # which the products need in float32
    assert peak_of(case, narrow) <= copies + 5 * CHUNK + few
    with fastkd.backend("formula"):  # so that the numbers above mean something
        assert peak_of(case, [student, teacher]) >= 2 * gradient


# -------------------------------------------------------------------------------- training loops


@each_case
@pytest.mark.parametrize("tensors", ["fake", "meta"])
def test_no_step_waits_for_a_gpu(case, tensors, engine):
    """Looking at a value that is not there raises."""
    shapes = [x.shape for x in case.inputs((19,), 5)]
    with FakeTensorMode() if tensors == "fake" else torch.device("meta"):
        student, teacher = (torch.empty(shape) for shape in shapes)
        (gradient,) = torch.autograd.grad(case(student.requires_grad_(), teacher), student)
    assert gradient.shape == shapes[0]


@each_loss
def test_engines_are_one_node_of_the_graph(case, engine):
    node = case(*case.inputs((3,), 7)).grad_fn
    is_function = isinstance(node, torch.autograd.function.BackwardCFunction)
    assert is_function == (engine != "formula")


@smoke
@each_case
def test_a_student_without_gradient(case, engine):
    student, teacher = case.inputs((19,), 5)
    expected = case(student, teacher)
    with torch.no_grad():
        assert_same([case(student, teacher)], [expected])
    without = case(student.detach(), teacher)
    assert without.grad_fn is None
    assert_same([without], [expected])


@each_loss
def test_two_runs_agree_bit_for_bit(case, engine):
    contracts.agrees_with_itself(case, case.inputs((70,), 5, torch.float32))


@each_loss
def test_func_grad_and_vmap(case, engine):
    contracts.maps_over_batches(case, case.inputs((2, 5), 3))


@each_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(case, reentrant, engine):
    contracts.survives_checkpoint(case, case.inputs((5,), 3), reentrant)


@smoke
@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, dtype, engine):
    contracts.ignores_autocast(case, case.inputs((9,), 5, torch.float32), dtype, engine)


@each_loss
def test_torch_compile(case, engine):
    contracts.compiles(case, case.inputs((19,), 3))


def test_a_new_batch_size_and_other_options_compile_nothing():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(fastkd.dist_kd, backend=count, fullgraph=True, dynamic=True)
    for n, beta in ((7, 2.0), (8, 3.0), (11, 4.0)):
        inputs = DIST.inputs((n,), 3)
        found = results(lambda *x, b=beta: compiled(*x, beta=b), inputs)
        assert_same(found, results(lambda *x, b=beta: fastkd.dist_kd(*x, beta=b), inputs))
    assert len(graphs) == 1


@each_case
def test_double_backward_works_or_says_how(case, engine):
    contracts.says_how_to_differentiate_twice(case, case.inputs((4,), 3), engine)


def test_the_op_keeps_the_promises_of_its_schema():
    student, teacher = DIST.inputs((5,), 3)
    numbers = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (1.0, 2.0, 4.0)]
    for name in ("pkt", "dist_kd"):
        arguments = (student.detach(), teacher, *numbers, name, 2, True, "portable")
        op = fastkd.correlation._engine
        torch.library.opcheck(op.opaque_forward, arguments)
        loss, gradient = op.opaque_forward(*arguments)
        torch.library.opcheck(op.opaque_backward, (torch.ones_like(loss), gradient, *arguments))


def test_without_kernels_the_portable_engine_is_the_best(monkeypatch):
    monkeypatch.setattr(_backend, "triton_obstacle", lambda tensors: None)
    monkeypatch.setattr(fastkd.correlation, "_engine", lambda backend, *arguments: (backend, None))
    for name, engine_that_runs in (("triton", "portable"), ("auto", "portable")):
        with fastkd.backend(name):
            assert {case(*case.inputs((3,), 5)) for case in LOSSES} == {engine_that_runs}


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("case", OF_FEATURES, ids=str)
def test_wrong_features(case):
    right = torch.ones(3, 2)
    for student, error, words in (
        (torch.ones(4, 2), ValueError, r"one N, got \[4, 2\] and \[3, 2\]"),
        (torch.ones(3), ValueError, r"student needs the shape \[N, D\] with D ≥ 1.* got \[3\]"),
        (right.int(), TypeError, "floating-point"),
        ([1.0], TypeError, "student must be a tensor"),
        (right.to("meta"), ValueError, "move them together"),
    ):
        with pytest.raises(error, match=words):
            case(student, right)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(form="gaussian"), 'form must be "sequential" or "kernel", got \'gaussian\''),
        (dict(gamma=-1.0), "gamma must be a finite number of at least 0, got -1.0"),
        (dict(order=0), "order must be a whole number of at least 1, got 0"),
        (dict(order=1.5), "order must be a whole number of at least 1, got 1.5"),
        ({}, r"one width, got \[3, 2\] and \[3, 4\]; project .* or take form=\"kernel\""),
    ],
)
def test_wrong_options_of_congruence(options, words):
    with pytest.raises(ValueError, match=words):
        fastkd.correlation_congruence(torch.ones(3, 2), torch.ones(3, 4), **options)


def test_wrong_logits_and_options_of_dist():
    right = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"need one shape, got \[3, 4\] and \[3, 5\]"):
        fastkd.dist_kd(right[:, :4], right)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        fastkd.dist_kd(right, right, temperature=0)
    for option in ("beta", "gamma"):
        with pytest.raises(ValueError, match=f"{option} must be a finite number of at least 0"):
            fastkd.dist_kd(right, right, **{option: -1.0})
    with pytest.raises(TypeError, match="dist_kd has no option 'reduction'"):
        fastkd.dist_kd(right, right, reduction="sum")


@each_loss
def test_the_teacher_gets_no_gradient_and_that_is_said(case, engine):
    student, teacher = case.inputs((5,), 3)
    _checks._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"teacher(_logits)?\.detach\(\)"):
        loss = case(student, teacher.requires_grad_())
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)

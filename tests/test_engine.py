"""What a loss must survive in a training loop, whichever engine computes it."""

import pytest
import torch
from exactness import assert_same, results
from losses import DEVICE, LOSSES, each_loss, normal
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import _checks

smoke = pytest.mark.smoke
a_few = pytest.mark.parametrize("case", [LOSSES[0], LOSSES[2], LOSSES[-1]], ids=str)
fused = pytest.mark.parametrize(
    "engine", ["portable", "portable in chunks", "triton"], indirect=True
)


@each_loss
def test_engines_are_one_node_of_the_graph(case, engine):
    node = case(*case.inputs((3,), 7)).grad_fn
    is_function = isinstance(node, torch.autograd.function.BackwardCFunction)
    if case.loss not in (fastkd.logit_mse, fastkd.kd):  # a formula everywhere; a sum of two terms
        assert is_function == (engine != "formula")


@a_few
def test_a_student_without_gradient(case, engine):
    student, *others = case.inputs((3,), 7)
    expected = case(student, *others)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same([case(student, *others)], [expected])
    assert case(student.detach(), *others).grad_fn is None


@a_few
@pytest.mark.parametrize("n_cols", [101, 9001])
def test_two_runs_agree_bit_for_bit(case, n_cols, engine):
    inputs = case.inputs((3,), n_cols, torch.float32)
    for first, second in zip(results(case, inputs), results(case, inputs), strict=True):
        assert torch.equal(first, second)


@smoke
@a_few
def test_func_grad(case, engine):
    student, *others = case.inputs((3,), 7)
    expected = results(lambda x: case(x, *others).sum(), [student])[1]
    found = torch.func.grad(lambda x: case(x, *others).sum())(student.detach())
    assert_same([found], [expected / normal(seed=99)])


@a_few
def test_func_jacrev(case, engine):
    student, *others = case.inputs((3,), 7)
    jacobian = torch.func.jacrev(lambda x: case(x, *others))(student.detach())
    rows = torch.arange(3, device=DEVICE)
    between_rows = jacobian[rows != rows[:, None]]
    assert (between_rows == 0).all()
    expected = torch.autograd.grad(case(student, *others).sum(), student)[0]
    assert_same([jacobian[rows, rows]], [expected])


@a_few
def test_func_jacrev_of_a_parameter(case, engine):
    """Examples and their number of classes must not be taken for what an engine keeps."""
    student, teacher, *labels = case.inputs((2, 4), 6)
    found, expected = [], []
    for backend, jacobians in ((engine, found), ("formula", expected)):
        with fastkd.backend(backend):
            jacobian = torch.func.jacrev(lambda x: case(x, teacher, *labels).sum(-1))(student)
            jacobians.append(jacobian.detach())
    assert_same(found, expected)


@fused
def test_grads_batched_by_autograd_are_an_error(engine):
    student, teacher = LOSSES[0].inputs((3,), 7)
    losses = LOSSES[0](student, teacher)
    with pytest.raises(RuntimeError, match=r"Use torch\.func\.jacrev"):
        torch.autograd.grad(
            losses, student, torch.eye(3, dtype=losses.dtype), is_grads_batched=True
        )


@smoke
@a_few
@pytest.mark.parametrize("n_cols", [7, 9001])
def test_a_teacher_run_under_inference_mode(case, n_cols, engine):
    inputs = case.inputs((3,), n_cols)
    expected = results(case, inputs)
    with torch.inference_mode():
        inputs[1] = inputs[1].clone()
    assert_same(results(case, inputs), expected)


@a_few
@pytest.mark.parametrize("place", [0, 1, 2])
def test_vmap_of_losses(case, place, engine):
    """Over any dimension; what is not mapped is shared."""
    student, teacher, *labels = case.inputs((4, 3), 7)
    expected = case(student, teacher, *labels).detach()
    moved = [student.detach().movedim(0, place), teacher.movedim(0, place)]
    dims = (place, place, *(0 for _ in labels))
    assert_same([torch.func.vmap(case, dims)(*moved, *labels)], [expected])
    shared = [x[0] for x in (teacher, *labels)]
    found = torch.func.vmap(lambda x: case(x, *shared), place)(moved[0])
    assert_same([found], [torch.stack([case(x, *shared) for x in student.detach()])])


@smoke
@a_few
def test_vmap_of_gradients(case, engine):
    """Gradients of single examples, as for differential privacy."""
    student, *others = case.inputs((4,), 7)
    expected = torch.autograd.grad(case(student, *others).sum(), student)[0]
    found = torch.func.vmap(torch.func.grad(case))(student.detach(), *others)
    assert_same([found], [expected])


def test_vmap_over_what_is_not_an_example(engine):
    """A temperature for each teacher of an ensemble: one call each."""
    student, teacher = LOSSES[0].inputs((3,), 7)
    temperatures = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, device=DEVICE)

    def loss(x, temperature):
        return fastkd.forward_kl(x, teacher, temperature=temperature)

    found = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0))(
        student.detach(), temperatures
    )
    for i, temperature in enumerate(temperatures):
        expected = loss(student, temperature)
        gradient = torch.autograd.grad(expected, student)[0]
        assert_same([x[i] for x in found], [gradient, expected])


@a_few
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(case, reentrant, engine):
    student, *others = case.inputs((3,), 7)
    expected = torch.autograd.grad(case(student, *others).sum(), student)
    checkpoint(case, student, *others, use_reentrant=reentrant).sum().backward()
    assert_same([student.grad], expected)


@a_few
def test_retained_graph(case, engine):
    student, *others = case.inputs((3,), 7)
    loss = case(student, *others).sum()
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert_same([student.grad], [2 * once])


@fused
@a_few
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_overwritten_before_the_backward_are_noticed(case, reduction, engine):
    student, *others = case.inputs((3,), 7)
    logits = student * 1
    loss = case(logits, *others, reduction=reduction).sum()
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@smoke
@a_few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, dtype, engine):
    inputs = case.inputs((3,), 7, torch.float32)
    expected = results(case, inputs)
    with torch.autocast(DEVICE.type, dtype):
        found = results(case, inputs)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


@a_few
def test_logits_of_an_autocast_layer(case, engine):
    """The gradient reaches the layer's float32 weight through its half-precision logits."""
    _, teacher, *labels = case.inputs((3,), 7, torch.float32)
    weight = normal(7, 5, dtype=torch.float32).requires_grad_()
    hidden = normal(3, 5, dtype=torch.float32, seed=1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        loss = case(logits, teacher, *labels).sum()
    loss.backward()
    expected = torch.autograd.grad(case(hidden @ weight.T, teacher, *labels).sum(), weight)
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert_same([weight.grad], expected, tolerance=0.03)


@smoke
@a_few
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_double_backward_works_or_says_how(case, reduction, engine):
    student, *others = case.inputs((2,), 5)
    loss = case(student, *others, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    if engine == "formula":
        assert torch.autograd.gradgradcheck(
            lambda x: case(x, *others, reduction=reduction), [student]
        )
    else:
        with pytest.raises(RuntimeError, match=r'Double backward .* fastkd.backend\("formula"\)'):
            gradient.square().sum().backward()


@smoke
@a_few
def test_forward_mode_works_or_says_how(case, engine):
    student, *others = case.inputs((2,), 5)

    def tangent():
        return torch.func.jvp(lambda x: case(x, *others), (student.detach(),), (direction,))[1]

    direction = normal(2, 5, seed=3)
    if engine == "formula":
        gradient = torch.autograd.grad(case(student, *others).sum(), student)[0]
        assert_same([tangent()], [(gradient * direction).sum(-1)])
    else:
        with pytest.raises(RuntimeError, match=r'Forward-mode AD .* fastkd.backend\("formula"\)'):
            tangent()


@fused
@a_few
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_dual_tensors_say_how(case, reduction, engine):
    student, *others = case.inputs((2,), 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, normal(2, 5, seed=3))
        with pytest.raises(RuntimeError, match="Forward-mode AD"):
            case(dual, *others, reduction=reduction)


@a_few
def test_vmap_of_a_backward(case, engine):
    """As a loop over upstream gradients, of a loss made before."""
    student, *others = case.inputs((3,), 7)
    losses = case(student, *others)

    def gradient(upstream):
        return torch.autograd.grad(losses, student, upstream, retain_graph=True)[0]

    upstreams = normal(2, 3, dtype=losses.dtype)
    found = torch.func.vmap(gradient)(upstreams)
    assert_same([found], [torch.stack([gradient(x) for x in upstreams])])


def warnings_of_fastkd(recorded):
    return [w for w in recorded if w.category is UserWarning]


@each_loss
def test_the_teacher_gets_no_gradient_and_that_is_said_once(case, engine, recwarn):
    student, teacher, *labels = case.inputs((3,), 7)
    teacher.requires_grad_()
    _checks._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"teacher_logits\.detach\(\)"):
        loss = case(student, teacher, *labels).sum()
    (gradient,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    assert gradient is None
    case(student, teacher, *labels)
    assert not warnings_of_fastkd(recwarn)


@each_loss
def test_a_teacher_in_no_grad_mode_needs_no_warning(case, engine, recwarn):
    student, teacher, *labels = case.inputs((3,), 7)
    _checks._warn_once.cache_clear()
    with torch.no_grad():
        case(student, teacher.requires_grad_(), *labels)
    assert not warnings_of_fastkd(recwarn)


def _arguments(divergence, labelled, engine):
    student, teacher, labels = LOSSES[-1].inputs((3,), 7, torch.float32)
    keep = torch.tensor([True, False, True], device=DEVICE)
    scalars = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (2.0, 3.0, 0.3, 4.0)]
    offset = normal(7, dtype=torch.float32, seed=5)
    labels = labels if labelled else None
    return student.detach(), teacher, labels, offset, keep, *scalars, divergence, engine


@fused
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_ops_keep_the_promises_of_their_schemas(divergence, labelled, engine):
    arguments = _arguments(divergence, labelled, engine)
    ops = fastkd.divergence._engine
    torch.library.opcheck(ops.opaque_forward, arguments)
    losses, cross_entropies, statistics = ops.opaque_forward(*arguments)
    upstream = (torch.ones_like(losses), torch.ones_like(cross_entropies) if labelled else None)
    torch.library.opcheck(ops.opaque_backward, (*upstream, statistics, *arguments))

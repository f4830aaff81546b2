"""Relations in training loops: autograd, compiler, autocast, bits."""

import contracts
import pytest
import torch
from exactness import assert_same, results
from losses import DEVICE, RELATIONAL, each_relation

import fastkd

smoke = pytest.mark.smoke
RKD = RELATIONAL[2]


@each_relation
def test_engines_are_one_node_of_the_graph(case, engine):
    node = case(*case.inputs((3,), 7)).grad_fn
    is_function = isinstance(node, torch.autograd.function.BackwardCFunction)
    assert is_function == (engine != "formula")


@each_relation
def test_a_student_without_gradient(case, engine):
    student, teacher = case.inputs((9,), 5)
    expected = case(student, teacher)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same([case(student, teacher)], [expected])
    without = case(student.detach(), teacher)
    assert without.grad_fn is None
    assert_same([without], [expected])


@smoke
@each_relation
def test_two_runs_agree_bit_for_bit(case, engine):
    contracts.agrees_with_itself(case, case.inputs((40,), 5, torch.float32))


@each_relation
def test_func_grad_and_vmap(case, engine):
    contracts.maps_over_batches(case, case.inputs((2, 5), 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, engine):
    contracts.survives_checkpoint(RKD, RKD.inputs((5,), 3), reentrant)


def test_retained_graph(engine):
    student, teacher = RKD.inputs((5,), 3)
    loss = RKD(student, teacher)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert_same([student.grad], [2 * once])


def test_a_teacher_run_under_inference_mode(engine):
    inputs = RKD.inputs((5,), 3)
    expected = results(RKD, inputs)
    with torch.inference_mode():
        inputs[1] = inputs[1].clone()
    assert_same(results(RKD, inputs), expected)


@smoke
@each_relation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(case, dtype, engine):
    contracts.ignores_autocast(case, case.inputs((9,), 5, torch.float32), dtype, engine)


@each_relation
def test_torch_compile(case, engine):
    contracts.compiles(case, case.inputs((5,), 3))


def test_a_new_batch_size_and_other_weights_compile_nothing(engine):
    if engine == "formula":
        pytest.skip("its numbers are constants of the graph")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(fastkd.rkd, backend=count, fullgraph=True, dynamic=True)
    for n, weight in ((7, 2.0), (8, 3.0), (11, 4.0)):  # none is a number of features
        inputs = RKD.inputs((n,), 3)
        found = results(lambda *x, w=weight: compiled(*x, distance_weight=w), inputs)
        expected = results(lambda *x, w=weight: fastkd.rkd(*x, distance_weight=w), inputs)
        assert_same(found, expected)
    assert len(graphs) == 1


def test_double_backward_works_or_says_how(engine):
    contracts.says_how_to_differentiate_twice(RKD, RKD.inputs((4,), 3), engine)


def test_the_op_keeps_the_promises_of_its_schema(engine):
    if engine == "formula":
        pytest.skip("has no op")
    student, teacher = RKD.inputs((5,), 3)
    numbers = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (25.0, 50.0, 1.0)]
    arguments = (student.detach(), teacher, None, *numbers, "both", "default", True, 0, engine)
    op = fastkd.relational._engine
    torch.library.opcheck(op.opaque_forward, arguments)
    loss, gradient = op.opaque_forward(*arguments)
    torch.library.opcheck(op.opaque_backward, (torch.ones_like(loss), gradient, *arguments))

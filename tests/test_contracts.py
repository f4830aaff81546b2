"""Promises that hold for every loss, whichever engine computes it: each once, for all cases."""

import inspect
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LOSSES, WAYS, Case, named, of
from choice import ENGINES, full, pairwise, quick_if
from exactness import assert_exact, assert_same, by_formula, in_dtype, results
from inputs import DEVICE, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import _checks
from fastkd._op import Op

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=str)
each_way = pytest.mark.parametrize("case", WAYS, ids=str)
# kernels are slow in the interpreter: what they have in common is tried with some of each problem
SOME = (
    "jensen_shannon", "kd", "linear_kd", "rkd", "hint", "attention_transfer", "info_nce",
    "similarity_kl", "token_relation",
)  # fmt: skip
# the first of them, for what takes the interpreter long
FEW = ("jensen_shannon", "linear_kd", "rkd", "hint", "info_nce")
with_some_kernels = quick_if(
    lambda case, engine: engine != "triton" or (case in LOSSES and case.name in FEW)
)
# one for each kind of op: recomputed, kept, reported, and with formulas around it
COMPILED = named(
    "kd-temperature=4.0-alpha=0.3-divergence=forward_kl", "linear_kd-alpha=0.3-temperature=2.0",
    "info_nce", "rkd", "attention_transfer-p=3.0-kind=max",
)  # fmt: skip
# an op is the same in any chunks
of_ops = quick_if(
    lambda case, engine: (
        engine == "portable" or (engine == "triton" and case.name in ("kd", "rkd", "sup_con"))
    )
)
# a way through each op, the first one of its problem and one whose op is another
EACH_OP = [case for i, case in enumerate(WAYS) if case.problem not in [x.problem for x in WAYS[:i]]]
EACH_OP += of("similarity_kl", cases=WAYS)
# one block of a kernel, several with tails, and for rows many rows in one program
SMALL = {"rows": [((2, 3), 7), ((33,), 2)], "pairs": [((7,), 5)], "relations": [((7,), 3)]}
ROWS = ("rows", "ensembles", "corrected", "peers")  # each is a program of its own
LARGE = {"rows": [((3,), 8999)], "pairs": [((67,), 33)], "relations": [((40,), 35)]}
OTHERS = {"rows": [((2,), 20011)], "pairs": [((2,), 3), ((150,), 5)]}
OTHERS["relations"] = [((2,), 3), ((5,), 1)]
SMALL["moments"], LARGE["moments"], OTHERS["moments"] = [((7,), 5)], [((3,), 140)], [((21,), 2)]
SMALL["tokens"], LARGE["tokens"], OTHERS["tokens"] = [((3,), 5)], [((9,), 33)], [((5,), 2)]
for shapes in (SMALL, LARGE, OTHERS):
    shapes["ensembles"] = shapes["corrected"] = shapes["rows"]
SMALL["levels"], LARGE["levels"] = [((7,), 5), ((5,), 7)], [((67,), 33), ((33,), 67)]
SMALL["linear"], LARGE["linear"], OTHERS["linear"] = [((7,), 5)], [((67,), 33)], [((3,), 2)]
SMALL["peers"], LARGE["peers"], OTHERS["peers"] = SMALL["rows"], LARGE["rows"], OTHERS["rows"]
SHAPES = [
    pytest.param(case, shape, id=f"{case}-{shape}", marks=marks)
    for shapes, marks in ((SMALL, ()), (LARGE, ()), (OTHERS, full))
    for case in CASES
    for shape in shapes.get(case.problem, shapes["pairs"])
    if case.per_example or len(shape[0]) == 1
]


def small(case: Case, dtype: torch.dtype = torch.float64, n: int = 9, width: int = 5) -> list:
    """Return inputs of one block; of rows a few, because each is a program of its own."""
    return case.inputs((min(n, 4) if case.problem in ROWS else n,), width, dtype)


def trained(inputs):
    return [x for x in inputs if x.requires_grad]


def one_number(case):
    return lambda *inputs: case(*inputs).sum()


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case, shape", SHAPES)
@quick_if(
    lambda case, shape, engine: (
        (case in LOSSES or shape[1] < 10 or case.problem not in ("rows", "ensembles", "pairs"))
        if engine != "triton"
        else case in LOSSES and (shape == SMALL.get(case.problem, [None])[0] or case.name in SOME)
    )
)
def test_value_and_gradient_are_the_published_ones(case, shape, engine):
    inputs = case.inputs(*shape)
    for x, y in zip(results(case, inputs), results(case.truth, inputs), strict=True):
        # two examples may have nothing to learn
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("case", [case for case in CASES if case.by_hand], ids=str)
def test_formulas_are_those_computed_by_hand(case):
    inputs = case.inputs((2, 3) if case.per_example else (7,), 7)
    with fastkd.backend("formula"):
        assert_same([case(*inputs), case.truth(*inputs)], 2 * [case.hand(*inputs)])


@each_case
def test_formulas_are_the_published_losses(case):
    for n, width in ((2, 3), (7, 5)):
        inputs = case.inputs((n,), width)
        for x, y in zip(by_formula(case, inputs), results(case.truth, inputs), strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-12, atol=1e-12 * max(1.0, float(y.abs().max()))
            )


@pairwise(
    case=LOSSES,
    engine=ENGINES,
    dtypes=[
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    n=[5, 67],
)
def test_the_error_is_that_of_the_formula(case, engine, dtypes, n):
    # few pairs have an error of luck, and rows are programs of their own
    inputs = case.inputs(
        ({"pairs": 67, "rows": 5, "ensembles": 5}.get(case.problem, n),), 33 if n == 5 else 37
    )
    inputs[:2] = [in_dtype(d, [x])[0] for d, x in zip(dtypes, inputs[:2], strict=True)]
    if len(inputs) > 2 and (case.problem == "pairs" or case.name == "vid"):
        inputs[2:] = in_dtype(dtypes[0], inputs[2:])
    if case.name in ("dino", "ibot"):
        inputs[-1] = inputs[-1].float()
    assert_exact(case, inputs, rounds_halves=engine == "triton")


@each_case
@with_some_kernels
def test_dtypes_of_losses_and_gradients(case, engine):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = small(case, dtype)
        losses, *gradients = results(case, inputs)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [x.dtype for x in gradients] == [x.dtype for x in trained(inputs)]
    inputs = small(case, torch.bfloat16)
    inputs[1] = inputs[1].detach().double() if inputs[1].is_floating_point() else inputs[1]
    assert case(*inputs).dtype == (
        torch.float64 if inputs[1].is_floating_point() else torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [0, 1, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
@quick_if(
    lambda case, dtype, engine: (
        dtype == torch.float32
        and (case in LOSSES or case.problem == "ensembles")
        and (engine != "triton" or case.problem in ROWS)
    )
)
def test_one_tensor_in_float64_makes_all_of_it_so(case, wide, dtype, engine):
    """Nothing in between is rounded to float32, in which others are."""
    inputs = small(case, dtype)
    floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    place = floats[wide if wide < len(floats) else 0]
    inputs[place] = inputs[place].detach().double().requires_grad_(inputs[place].requires_grad)
    losses, *gradients = results(case, inputs)
    expected, *of_expected = by_formula(case, inputs)
    assert losses.dtype == expected.dtype
    # a bias or a centre takes no part in the choice
    assert_same([losses], [expected], 1e-12 if losses.dtype == torch.float64 else 1e-6)
    for x, y in zip(gradients, of_expected, strict=True):
        narrow = torch.finfo(x.dtype if losses.dtype == torch.float64 else losses.dtype).eps
        assert_same([x], [y], 1e-12 if x.dtype == losses.dtype == torch.float64 else 10 * narrow)


# soft labels and their weights are constants, which differences of values do not know
@pytest.mark.parametrize(
    "case", [case for case in LOSSES if case.name not in ("uskd", "wsld")], ids=str
)
def test_gradcheck_of_the_formula(case):
    inputs = small(case, n=3, width=4)
    weights = normal(*case(*inputs).shape, seed=7)
    # numbers that are moved move the constants of a peer too
    options = {"detach_peers": False} if case.name == "mutual_kl" else {}
    with fastkd.backend("formula"):
        assert torch.autograd.gradcheck(lambda *xs: case(*xs, **options) * weights, inputs)


@each_case
@quick_if(lambda case, engine: case in LOSSES)
@with_some_kernels
def test_two_runs_agree_bit_for_bit(case, engine):
    inputs = small(case, torch.float32, n=21)
    for first, second in zip(results(case, inputs), results(case, inputs), strict=True):
        assert torch.equal(first, second)


@each_case
@quick_if(lambda case, engine: case in LOSSES)
@with_some_kernels
def test_every_element_is_written(case, engine):
    """Memory that was forgotten shows, because it is filled with NaN first."""
    inputs = case.inputs((5 if case.problem in ROWS else 19,), 37, torch.float32)
    expected = results(case, inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated
    try:
        found = results(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected, 1e-6)


# ---------------------------------------------------------------------------------------- batches


@each_case
@pytest.mark.parametrize("n", [0, 1])
@with_some_kernels
def test_no_example_or_one(case, n, engine):
    """There is no loss without examples, and without relations none between them."""
    inputs = case.inputs((n,), 3, torch.float32)
    losses, *gradients = results(case, inputs)
    assert [x.shape for x in gradients] == [x.shape for x in trained(inputs)]
    assert all(x.isfinite().all() for x in (losses, *gradients))
    if n == 0:
        assert not losses.any() and losses.dtype == torch.float32
    elif case.problem == "relations" or (case.problem == "gram" and case.name != "dist_kd"):
        assert all(x.abs().max() <= 1e-12 for x in (losses, *gradients))
    else:
        inputs = case.inputs((n,), 3)
        for x, y in zip(results(case, inputs), results(case.truth, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "padded": lambda x: F.pad(x, (0, 3), value=torch.nan)[..., :-3],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "off the boundary": lambda x: F.pad(x.flatten(), (1, 0), value=torch.nan)[1:].view(x.shape),
}


@pairwise(
    case=[case for case in LOSSES if case.name not in ("dino", "minilm_relation")],
    engine=ENGINES,
    layout=LAYOUTS,
    which=[(0, 1), (0,), (1,)],
)
@quick_if(lambda case, engine: engine != "triton" or case.name in SOME)
def test_every_layout(case, engine, layout, which):
    inputs = case.inputs(*(((5,), 37) if case.problem in ROWS else ((19,), 5)))
    moved = [*inputs]
    for i in which:
        if inputs[i].is_floating_point():
            moved[i] = LAYOUTS[layout](inputs[i].detach()).requires_grad_(inputs[i].requires_grad)
    assert_same(results(case, moved), results(case, inputs))


@pytest.mark.parametrize("case", of("relations", "gram"), ids=str)
def test_more_dimensions_are_flattened(case, engine):
    student, teacher = case.inputs((3, 2, 4), 5)
    flat = [x.detach() for x in (student, teacher)]
    # logits have as many examples as rows, feature maps as many as maps
    flat = [x.reshape((-1, 5) if case.name == "dist_kd" else (3, -1)) for x in flat]
    loss, gradient = results(case, [student, teacher])
    expected, of_flat = results(case, [flat[0].requires_grad_(), flat[1]])
    assert_same([loss, gradient.reshape(of_flat.shape)], [expected, of_flat])


@each_case
@pytest.mark.parametrize("place", [0, 1, -1])
@quick_if(lambda case, place, engine: case in LOSSES and (place or engine != "triton"))
@with_some_kernels
def test_nan_is_not_hidden(case, place, engine):
    inputs = [x.detach() for x in small(case, n=40)]
    if inputs[place].is_floating_point():
        inputs[place].view(-1)[-1] = torch.nan
        assert case(*inputs).isnan().any()


@each_case
@quick_if(lambda case, engine: case in LOSSES)
@with_some_kernels
def test_duplicates_and_collapsed_students_train(case, engine):
    inputs = case.inputs((9,), 4)
    for x in trained(inputs):
        x.detach()[1:4] = x.detach()[0]
    losses, *gradients = results(case, inputs)
    assert_same([losses], [case.truth(*inputs)], 1e-11)
    assert all(x.isfinite().all() for x in gradients)
    for x in trained(inputs):
        x.detach()[:] = x.detach()[0].clone()
    assert all(x.isfinite().all() for x in results(case, inputs))


# -------------------------------------------------------------------------------- gradients of what


@each_case
@quick_if(lambda case, engine: case in LOSSES or engine == "portable")
@with_some_kernels
def test_only_some_get_a_gradient(case, engine):
    """A detached input changes nothing for the others; in evaluation nothing is on the graph."""
    inputs = small(case)
    losses, *gradients = results(case, inputs)
    of_inputs = iter(gradients)
    expected = {i: next(of_inputs) for i, x in enumerate(inputs) if x.requires_grad}
    for kept in expected:
        fewer = [x.detach() for x in inputs]
        fewer[kept].requires_grad_()
        assert_same(results(case, fewer), [losses, expected[kept]])
    constants = case(*(x.detach() for x in inputs))
    assert constants.grad_fn is None
    assert_same([constants], [losses])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same([case(*inputs)], [losses])


# those whose second tensor is the teacher's
TAUGHT = [
    case
    for case in LOSSES
    if (case.problem not in ("pairs", "linear") or case.name == "similarity_kl")
    and case.name not in ("minilm_relation", "koleo", "mutual_kl", "teacher_free_kd", "uskd")
]


@pytest.mark.parametrize("case", TAUGHT, ids=str)
@quick_if(lambda engine: engine != "portable in chunks")
@with_some_kernels
def test_the_teacher_gets_no_gradient_and_that_is_said_once(case, engine):
    inputs = small(case, n=3)
    inputs[1].requires_grad_()
    _checks._warn_once.cache_clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        case(*inputs)
    with pytest.warns(UserWarning, match=r"teacher(_logits)?.* requires grad|\.detach\(\)"):
        losses = case(*inputs)
    assert torch.autograd.grad(losses.sum(), inputs[1], allow_unused=True) == (None,)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        case(*inputs)


@pytest.mark.parametrize(
    "case", [c for c in WAYS if c.name not in ("kd", "dino", "attention_transfer")], ids=str
)
def test_an_engine_is_one_node_of_the_graph(case, engine):
    """A formula would have a node for each of its operations."""
    names, nodes = [], [case(*small(case)).grad_fn]
    while nodes:
        node = nodes.pop()
        names += [node.name()] * isinstance(node, torch.autograd.function.BackwardCFunction)
        nodes += [inner for inner, _ in node.next_functions if inner is not None]
    assert len({*names}) == 1 or case.options.get("symmetric")


# ---------------------------------------------------------------------------------- training loops


@each_case
@quick_if(lambda case, engine: case in LOSSES and engine != "portable in chunks")
@with_some_kernels
def test_no_step_waits_for_a_gpu(case, engine):
    """Looking at a value that is not there raises: fake tensors run the ops, meta ones the engines.

    Kernels for tensors without memory are compiled in tests/compiled.
    """
    like = case.inputs((19,), 5, torch.float32)
    for mode in (FakeTensorMode(), torch.device("meta"))[: 1 if engine == "triton" else 2]:
        with mode:
            inputs = [
                torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad) for x in like
            ]
            rows: dict = dict(weights=torch.empty(19), reduction="mean")
            if "temperature" in inspect.signature(case.loss).parameters:
                rows["temperature"] = torch.empty(())
            for options in ({}, rows) if case.per_example else ({},):
                gradients = torch.autograd.grad(case(*inputs, **options).sum(), trained(inputs))
        assert [x.shape for x in gradients] == [x.shape for x in trained(like)]


@each_way
@pytest.mark.parametrize("reentrant", [True, False])
@of_ops
def test_checkpoint(case, reentrant, engine):
    inputs = small(case)
    expected = torch.autograd.grad(case(*inputs).sum(), trained(inputs))
    checkpoint(case, *inputs, use_reentrant=reentrant).sum().backward()
    assert_same([x.grad for x in trained(inputs)], expected)


@each_way
@of_ops
def test_a_retained_graph_gives_its_gradient_again(case, engine):
    inputs = small(case)
    loss = case(*inputs).sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in trained(inputs)]
    loss.backward()
    assert_same([x.grad for x in trained(inputs)], [2 * x for x in once])


@each_way
@pytest.mark.parametrize("options", [{}, dict(reduction="mean")], ids=str)
@of_ops
def test_what_is_overwritten_before_the_backward_is_noticed_or_not_needed(case, options, engine):
    if options and not case.per_example:
        return
    inputs = small(case)
    expected = torch.autograd.grad(case(*inputs, **options).sum(), inputs[0])
    student = inputs[0] * 1
    loss = case(student, *inputs[1:], **options).sum()
    student.mul_(2)
    try:
        found = torch.autograd.grad(loss, inputs[0])
    except RuntimeError as error:
        assert re.search("modified (by an )?inplace", str(error))
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.problem != "linear"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@quick_if(lambda case, dtype, engine: dtype == torch.bfloat16 and case in WAYS)
@of_ops
def test_autocast_changes_nothing(case, dtype, engine):
    inputs = small(case, torch.float32)
    expected = results(case, inputs)
    with torch.autocast(DEVICE.type, dtype):
        inside = results(case, inputs)
        losses = case(*inputs)
    outside = torch.autograd.grad(losses.sum(), trained(inputs))
    if case.problem is None:  # whose backward is PyTorch's, which autocast reaches
        inside, expected = inside[:1], expected[:1]
    assert all(map(torch.equal, inside, expected))
    assert_same(outside, torch.autograd.grad(case(*inputs).sum(), trained(inputs)), 0)


@each_way
@of_ops
def test_what_an_autocast_layer_returns_trains_its_weight(case, engine):
    inputs = small(case, torch.float32)
    hidden, n = inputs[0].detach(), inputs[0].shape[-1]
    weight = (
        torch.eye(n, device=DEVICE) + 0.1 * normal(n, n, dtype=torch.float32)
    ).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        losses = case(F.linear(hidden, weight), *inputs[1:])
    losses.sum().backward()
    expected = torch.autograd.grad(case(hidden @ weight.T, *inputs[1:]).sum(), weight)
    assert losses.dtype == weight.grad.dtype == torch.float32
    assert_same([weight.grad], expected, tolerance=0.1)


@each_way
@of_ops
def test_func_grad_and_vmap(case, engine):
    inputs = [x.detach() for x in case.inputs((2, 5), 3)]
    places = tuple(i for i, x in enumerate(case.inputs((2, 5), 3)) if x.requires_grad)
    gradient_and_value = torch.func.grad_and_value(one_number(case), places)
    single = [tree_leaves(gradient_and_value(*batch)) for batch in zip(*inputs, strict=True)]
    found = torch.func.vmap(gradient_and_value)(*inputs)
    assert_same(tree_leaves(found), [torch.stack(x) for x in zip(*single, strict=True)])
    first = [x[0].clone() for x in inputs]
    wanted = [first[i].requires_grad_() for i in places]
    assert_same(single[0][:-1], torch.autograd.grad(one_number(case)(*first), wanted))


@each_way
@of_ops
def test_jacrev_of_several_losses(case, engine):
    """Examples and their number of classes must not be taken for what an engine keeps."""
    of_rows = case.per_example and case.problem in ROWS
    inputs = case.inputs((2, 4) if of_rows else (4,), 6)

    def losses(x):
        found = case(x, *inputs[1:])
        return found.sum(-1) if case.per_example else found.sum() * factors

    factors = normal(3, seed=5)
    found = torch.func.jacrev(losses)(inputs[0].detach())
    with fastkd.backend("formula"):
        assert_same([found], [torch.func.jacrev(losses)(inputs[0].detach())], 1e-11)


@pytest.mark.parametrize(
    "case, width",
    [
        pytest.param(case, width, id=f"{case}-{width}")
        for case, width in (*((case, 5) for case in WAYS), (WAYS[0], 8999))
    ],
)
@quick_if(
    lambda case, engine: engine != "triton" or case.name in ("kd", "hint", "rkd", "forward_kl")
)
def test_vmap_of_a_backward(case, width, engine):
    """A loop over upstream gradients gives the same, where a loss saved something and where not."""
    inputs = small(case, n=4, width=width)
    losses = case(*inputs)

    def gradient(upstream):
        return torch.autograd.grad(losses, inputs[0], upstream, retain_graph=True)[0]

    upstreams = normal(2, *losses.shape, dtype=losses.dtype)
    expected = torch.stack([gradient(x) for x in upstreams])
    assert_same([torch.func.vmap(gradient)(upstreams)], [expected])


@each_way
@of_ops
def test_double_backward_says_how(case, engine):
    inputs = small(case, n=4)
    (gradient,) = torch.autograd.grad(case(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'Double backward .* fastkd.backend\("formula"\)'):
        gradient.square().sum().backward()


@each_way
def test_double_backward_of_formulas_works(case):
    first, *others = small(case, n=3, width=4)
    with fastkd.backend("formula"):
        assert torch.autograd.gradgradcheck(lambda x: case(x, *others), [first])


@each_way
@of_ops
def test_forward_mode_says_how_and_works_in_formulas(case, engine):
    first, *others = small(case, n=4)
    direction = normal(*first.shape, seed=3)

    def tangent():
        return torch.func.jvp(lambda x: case(x, *others).sum(), (first.detach(),), (direction,))[1]

    with pytest.raises(RuntimeError, match=r'Forward-mode AD .* fastkd.backend\("formula"\)'):
        tangent()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(first, direction)
        with pytest.raises(RuntimeError, match="Forward-mode AD"):
            case(dual, *others)
    with fastkd.backend("formula"):
        (gradient,) = torch.autograd.grad(case(first, *others).sum(), first)
        assert_same([tangent()], [(gradient * direction).sum()], 1e-10)


@each_way
@of_ops
def test_what_was_run_under_inference_mode_is_a_constant(case, engine):
    inputs = small(case)
    constants = [x.detach().clone() for x in inputs[1:]]
    expected = results(case, [inputs[0], *constants])
    with torch.inference_mode():
        constants = [x.clone() for x in constants]
    assert_same(results(case, [inputs[0], *constants]), expected)


@each_way
@quick_if(lambda case, engine: engine == "portable" and case in EACH_OP)
def test_ops_keep_the_promises_of_their_schemas(case, engine, monkeypatch):
    calls, forward = [], Op.forward
    monkeypatch.setattr(Op, "forward", lambda op, *x: calls.append((op, x)) or forward(op, *x))
    case(*small(case, torch.float32, n=4))
    assert calls
    for op, arguments in [*calls]:
        constants = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        traced = op.opaque.numbers_as_tensors(constants)
        given = op.opaque.listed(traced)
        torch.library.opcheck(op.opaque.forward, tuple(given))
        if op.recomputes:
            outputs = op.opaque.forward(*given)
            losses, saved = outputs[: op.n_losses], outputs[op.n_losses :]
            upstream = [torch.ones_like(x) if x.numel() else None for x in losses]
            torch.library.opcheck(op.opaque.backward, (*upstream, *saved, *given))


# ------------------------------------------------------------------------------------ torch.compile


@each_way
@quick_if(lambda case, engine: engine == "portable" and case in COMPILED)
def test_torch_compile_makes_one_graph(case, engine):
    inputs = case.inputs((19,), 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: case(*x) * 1.5, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(lambda *x: case(*x) * 1.5, inputs))
    with torch.no_grad():
        assert_same([compiled(*inputs)], [case(*inputs) * 1.5])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same(results(compiled, inputs), results(lambda *x: case(*x) * 1.5, inputs))

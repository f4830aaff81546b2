"""The logits family: every engine equals the truth in float64, whatever the logits look like."""

import math

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, assert_same, exact, in_dtype, results
from losses import DEVICE, LOSSES, each_case, each_loss, logits, normal

import fastkd
from fastkd.portable import _small_divergence
from fastkd.portable import divergence as portable

smoke = pytest.mark.smoke
DTYPES = [
    torch.float64,
    pytest.param(torch.float32, marks=smoke),
    torch.bfloat16,
    torch.float16,
]
SHAPES = [((33,), 2), ((2, 5), 10), ((2, 3), 1000), ((2,), 8193), ((2,), 20011)]


def assert_exact(case, inputs, engine, times=2, **options):
    """Losses and gradients of the engine against float64, measured by the formula's error.

    The formula is measured by the expression that people write, which rounds in other places.
    """

    def found(*xs):
        return case(*xs, **options)

    def written(*xs):
        dtype = torch.float64 if torch.float64 in (x.dtype for x in xs) else torch.float32
        return case.eager(*(x.to(dtype) if x.is_floating_point() else x for x in xs), **options)

    truth = results(written, exact(inputs))
    if engine == "formula":
        assert_as_exact(results(found, inputs), results(written, inputs), truth, times=10)
    else:
        with fastkd.backend("formula"):
            yardstick = results(found, inputs)
        assert_as_exact(results(found, inputs), yardstick, truth, times)


def of_all_sizes(smallest, largest, n_rows):
    """Factors for rows of logits: an accuracy of 1e-6 of the largest gradient needs a usual row."""
    return torch.logspace(math.log10(smallest), math.log10(largest), n_rows, device=DEVICE)[:, None]


@smoke
@each_case
def test_losses_are_those_computed_by_hand(case, engine):
    inputs = case.inputs((2, 3), 7)
    assert_same([case(*inputs), case.eager(*inputs)], 2 * [case.by_hand(*inputs)])


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(case, dtype, engine):
    inputs = case.inputs((5,), 37, dtype)
    assert_exact(case, inputs, engine)
    losses, gradient = results(case, inputs)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


@each_loss
@pytest.mark.parametrize("examples, n_cols", SHAPES, ids=str)
def test_every_shape(case, examples, n_cols, engine):
    assert_exact(case, case.inputs(examples, n_cols, torch.float32), engine)


@smoke
@each_loss
@pytest.mark.parametrize("cut", [False, True])
def test_every_row_of_every_chunk(case, cut, monkeypatch):
    """The portable engine takes two rows at a time here, within each sequence if one is cut."""
    monkeypatch.setattr(_small_divergence, "_MOST_ELEMENTS", 0)
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, DEVICE.type, 2 * 4000)
    inputs = case.inputs((3, 4), 4000, torch.float32)
    if cut:
        inputs = [x.detach()[:, :-1].requires_grad_(x.requires_grad) for x in inputs]
    with fastkd.backend("portable"):
        assert_exact(case, inputs, "portable")


@each_loss
@pytest.mark.parametrize("n_cols", [17, 9000])
def test_one_row_without_a_batch(case, n_cols, engine):
    inputs = case.inputs((), n_cols, torch.float32)
    batch = [x.detach().unsqueeze(0).requires_grad_(x.requires_grad) for x in inputs]
    losses, gradient = results(case, inputs)
    assert losses.shape == ()
    loss, gradient_of_batch = case(*batch), results(case, batch)[1]
    assert_same([losses, gradient], [loss[0], gradient_of_batch[0]])


@each_loss
def test_no_rows(case, engine):
    for examples in ((0,), (0, 3), (3, 0)):
        losses, gradient = results(case, case.inputs(examples, 10, torch.float32))
        assert losses.shape == examples and gradient.shape == (*examples, 10)


@each_case
def test_one_class_is_no_choice(case, engine):
    losses, gradient = results(case, case.inputs((3,), 1, torch.float32))
    if case.loss is not fastkd.logit_mse:
        assert losses.abs().max() <= 2e-6 and gradient.abs().max() <= 2e-6


@each_loss
@pytest.mark.parametrize(
    "n_cols, top", [(1000, 60.0), pytest.param(9000, 60.0, marks=smoke), (9000, -60.0)]
)
def test_ramps_move_the_running_maximum(case, n_cols, top, engine):
    student, teacher, *labels = case.inputs((3,), n_cols, torch.float32)
    ramp = torch.linspace(0, top, n_cols, device=DEVICE)
    student = (student.detach() + ramp).requires_grad_()
    assert_exact(case, [student, teacher + ramp, *labels], engine)


@each_loss
def test_gradcheck(case, engine):
    student, *others = case.inputs((2,), 5)
    upstream = normal(2, seed=7)
    assert torch.autograd.gradcheck(lambda x: case(x, *others) * upstream, [student])


@each_loss
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.half)])
def test_student_and_teacher_of_two_dtypes(case, dtypes, engine):
    inputs = case.inputs((5,), 37)
    inputs[:2] = [in_dtype(dtype, [x])[0] for dtype, x in zip(dtypes, inputs[:2], strict=True)]
    assert_exact(case, inputs, engine)


LAYOUTS = {
    "padded rows": lambda x: F.pad(x, (0, 3), value=torch.nan)[..., :-3],
    "one position left out": lambda x: F.pad(x, (0, 0, 0, 1), value=torch.nan)[..., :-1, :],
    "first position left out": lambda x: F.pad(x, (0, 0, 1, 0), value=torch.nan)[..., 1:, :],
    "column-major": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": lambda x: F.pad(x.flatten(), (1, 0), value=torch.nan)[1:].view(x.shape),
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "one sequence for all": lambda x: x[:1].expand(x.shape),
}


def with_layout(layout, logits):
    """The logits in that layout, and what they hold in the usual one."""
    strided = LAYOUTS[layout](logits.detach())
    plain = strided.clone(memory_format=torch.contiguous_format)
    assert layout == "unaligned" or strided.stride() != plain.stride()
    return [x.requires_grad_(logits.requires_grad) for x in (strided, plain)]


QUICK_LAYOUTS = ("padded rows", "one position left out", "one row for all")


@pytest.mark.parametrize(
    "case, layout",
    [
        *(pytest.param(LOSSES[0], layout, marks=smoke) for layout in QUICK_LAYOUTS),
        *((LOSSES[0], layout) for layout in LAYOUTS if layout not in QUICK_LAYOUTS),
        *((case, layout) for case in (LOSSES[2], LOSSES[-1]) for layout in LAYOUTS),
    ],
    ids=str,
)
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_every_layout(case, layout, whose, engine):
    inputs, expected = (
        case.inputs((2, 3), 37, torch.float32),
        case.inputs((2, 3), 37, torch.float32),
    )
    inputs[whose], expected[whose] = with_layout(layout, inputs[whose])
    assert_same(results(case, inputs), results(case, expected), tolerance=1e-5)


@pytest.mark.parametrize("layout, of_teacher", list(zip(LAYOUTS, reversed(LAYOUTS), strict=True)))
def test_every_layout_of_long_rows(layout, of_teacher, engine):
    student, teacher = LOSSES[2].inputs((2, 2), 8999, torch.bfloat16)
    pairs = with_layout(layout, student), with_layout(of_teacher, teacher)
    found, expected = (results(LOSSES[2], inputs) for inputs in zip(*pairs, strict=True))
    assert_same(found, expected, tolerance=4e-3)  # one step of bfloat16


@pytest.mark.parametrize("case", LOSSES[:-1], ids=str)
def test_shifted_logits(case, engine):
    """Student and teacher of a language model, without the last position, as in every trainer."""
    whole = case.inputs((2, 3), 37)
    found = results(lambda s, t: case(s[:, :-1], t[:, :-1]), whole)
    assert_same(found, results(lambda s, t: case.eager(s[:, :-1], t[:, :-1]), whole))


@each_loss
@pytest.mark.parametrize("n_cols", [37, 8999])
def test_every_element_is_written(case, n_cols, engine):
    """Memory that was forgotten shows: it is filled with NaN first."""
    inputs = case.inputs((3,), n_cols, torch.float32)
    expected = results(case, inputs)
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    try:
        found = results(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected)


@each_loss
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 20.0, 1e3])
def test_temperatures_from_tiny_to_huge(case, temperature, engine):
    student, teacher, *labels = case.inputs((16,), 37, torch.float32)
    sizes = of_all_sizes(temperature, 1.0, 16)
    inputs = [(student.detach() * sizes).requires_grad_(), teacher * sizes, *labels]
    # reverse divergences of saturated rows cancel: what is left is noise, of one size for all
    assert_exact(case, inputs, engine, times=10, temperature=temperature)


@each_loss
@pytest.mark.parametrize("scale_t2", [True, False])
def test_temperature_as_a_tensor(case, scale_t2, engine):
    inputs = case.inputs((3,), 37)
    options = dict(temperature=torch.tensor(1.5, device=DEVICE), scale_t2=scale_t2)
    expected = results(lambda *xs: case.eager(*xs, temperature=1.5, scale_t2=scale_t2), inputs)
    assert_same(results(lambda *xs: case(*xs, **options), inputs), expected)


@each_loss
@pytest.mark.parametrize("n_cols", [37, 8999])
def test_huge_logits(case, n_cols, engine):
    student, teacher, *labels = case.inputs((6,), n_cols, torch.float32)
    sizes = of_all_sizes(1.0, 1e4, 6)
    student = (student.detach() * sizes).requires_grad_()
    assert_exact(case, [student, teacher * sizes, *labels], engine, times=10)


@each_loss
@pytest.mark.parametrize("offset, n_cols", [(100.0, 37), (1e4, 37), (1e4, 8999)])
def test_an_offset_common_to_a_row_costs_no_accuracy(case, offset, n_cols, engine):
    student, teacher, *labels = case.inputs((6,), n_cols, torch.float32)
    student = (student.detach() + offset).requires_grad_()
    assert_exact(case, [student, teacher + offset, *labels], engine)


@each_loss
def test_a_student_near_its_teacher(case, engine):
    """The end of a training: computed in half precision, divergences would come out negative."""
    student, teacher, *labels = case.inputs((8,), 1000, torch.bfloat16)
    near = (teacher + 0.05 * student.detach()).requires_grad_()
    found, truth = (
        results(case, [near, teacher, *labels]),
        results(case.eager, exact([near, teacher, *labels])),
    )
    assert ((found[0] - truth[0]).abs() <= 1e-3 * truth[0]).all()
    assert (found[1] - truth[1]).norm() <= 4e-3 * truth[1].norm()


@each_case
def test_confident_rows(case, engine):
    """One-hot to the last bit, at the same and at another class, beside a usual row."""
    student, teacher, *labels = case.inputs((4,), 5, torch.float32)
    peaks = 200 * torch.eye(5, device=DEVICE)
    peaks[0] = 0
    student = (student.detach() + peaks[:4]).requires_grad_()
    assert_exact(case, [student, teacher + peaks[[0, 1, 2, 4]], *labels], engine)


@each_loss
@pytest.mark.parametrize("wide", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("trained", [True, False])
def test_float64_beside_another_dtype(case, wide, trained, engine):
    """All of it in float64, differentiated or not."""
    inputs = case.inputs((3,), 37, torch.float32)
    inputs[wide] = inputs[wide].detach().double()
    inputs[0] = inputs[0].detach().requires_grad_(trained)
    losses = case(*inputs)
    assert losses.dtype == torch.float64
    assert_same([losses], [case.eager(*exact(inputs))])


@pytest.mark.parametrize("share", [1e-3, 1e-6])
@pytest.mark.parametrize("loss", [fastkd.skew_kl, fastkd.skew_reverse_kl])
def test_a_small_share_is_not_rounded_away(loss, share, engine):
    student, teacher = logits((5,), 37, torch.float32)
    losses = loss(student, teacher, skew=share, reduction="none")
    with fastkd.backend("formula"):
        true = loss(student.double(), teacher.double(), skew=share, reduction="none")
    torch.testing.assert_close(losses.double(), true, rtol=3e-6, atol=0)


@smoke
@pytest.mark.parametrize(
    "loss, option",
    [(fastkd.skew_kl, "skew"), (fastkd.skew_reverse_kl, "skew"), (fastkd.jensen_shannon, "beta")],
)
def test_a_large_share(loss, option, engine):
    inputs = logits((5,), 37)
    found = results(lambda *x: loss(*x, **{option: 0.9}, reduction="none"), inputs)
    with fastkd.backend("formula"):
        expected = results(lambda *x: loss(*x, **{option: 0.9}, reduction="none"), inputs)
    assert_same(found, expected)


@smoke
@pytest.mark.parametrize("loss", [fastkd.reverse_kl, fastkd.symmetric_kl, fastkd.jensen_shannon])
def test_what_is_decided_has_no_gradient(loss, engine):
    """Logits of 1e4 leave one class: a sum that is not quite 1 would be multiplied by 1e4."""
    student, teacher = logits((64,), 10, torch.float32)
    student = (3e3 * student).detach().requires_grad_()
    loss(student, 3e3 * teacher, reduction="sum").backward()
    with fastkd.backend("formula"):
        wide = student.detach().double().requires_grad_()
        loss(wide, 3e3 * teacher.double(), reduction="sum").backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_equal_networks_have_no_gradient_in_any_layout(engine):
    student, _ = logits((37,), 41, torch.float32)
    transposed = student.detach().T.contiguous().T.requires_grad_()
    fastkd.total_variation(transposed, student.detach()).backward()
    assert not transposed.grad.any()

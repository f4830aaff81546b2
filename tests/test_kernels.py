"""The kernels in the interpreter: every division of the work, bytes, launches, safety of memory."""

import math
import os

import pytest
import torch
from torch import Tensor

import fastkd

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counted in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from meter import Meter

from fastkd.kernels.device import Device
from fastkd.kernels.rows import launch as kernels
from fastkd.kernels.rows import sweeps
from fastkd.portable import rows as portable
from fastkd.problems.rows import Rows

KLS = ["forward_kl", "reverse_kl", "symmetric_kl", "soft_cross_entropy"]
MIXTURES = ["jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"]
DIVERGENCES = KLS + MIXTURES
ON_CHIP, LOOPED = 1000, 8192 + 2048 + 3  # whole vectors, a rest of them, and edges


@pytest.fixture(autouse=True)
def triton():
    with fastkd.backend("triton"):
        yield


@pytest.fixture(params=["whole rows", "split rows"])
def multiprocessors(request, monkeypatch):
    """One multiprocessor is filled by any row, many are not."""
    number = 1 if request.param == "whole rows" else 132
    monkeypatch.setattr(kernels, "device_of", lambda tensor: Device(number, False))


def metered(loss, student: Tensor, *rest: Tensor, **options) -> tuple[Meter, Meter]:
    with Meter() as forward:
        result = getattr(fastkd, loss)(student, *rest, temperature=2.0, **options)
    with Meter() as backward:
        result.backward()
    return forward, backward


def bytes_of(meter: Meter, *names: str) -> dict[str, int]:
    """Loaded and stored for each argument, over all launches."""
    return {
        name: sum(x.arguments[name].loaded + x.arguments[name].stored for x in meter.launches)
        for name in names
    }


def logits(n_rows: int, n_cols: int, dtype=torch.bfloat16) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, n_rows, n_cols).to(dtype)
    return student.requires_grad_(), teacher


@pytest.mark.smoke
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_division_of_a_row_gives_its_sums(divergence, multiprocessors):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 3, LOOPED, dtype=torch.float64, generator=generator)
    student[:, : LOOPED // 2] -= 50  # the pivots rise
    labels, mask = torch.tensor([LOOPED - 1, -1, 0]), torch.tensor([True, True, False])
    rows = problem(divergence, student, teacher, labels, mask)
    weights = torch.tensor([0.5, -2, 3], dtype=torch.float64)
    found, expected = (
        engine.value_and_gradients(rows, (True,), row_weights=weights, ce_weights=weights + 1)
        for engine in (kernels, portable)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.smoke
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_long_row_without_a_softmax_is_nan(divergence, multiprocessors):
    student, teacher = (x.detach() for x in logits(3, LOOPED, torch.float32))
    student[0, 5] = math.nan
    teacher[2] = -math.inf
    (losses, _), (gradient,) = kernels.value_and_gradients(
        problem(divergence, student, teacher), (True,)
    )
    assert losses.isnan().tolist() == [True, False, True]
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("loss", [*DIVERGENCES, "kd"])
def test_rows_on_chip_are_read_once(loss):
    student, teacher = logits(3, ON_CHIP)
    labels = [torch.tensor([0, -100, 7])] if loss == "kd" else []
    forward, backward = metered(loss, student, teacher, *labels)
    read = 2 * student.numel()
    of_labels = 2 * 2 if labels else 0  # the two labels' own logits
    assert bytes_of(forward, "student.ptr", "teacher.ptr") == {
        "student.ptr": read + of_labels,
        "teacher.ptr": read,
    }
    assert bytes_of(backward, "student.ptr", "teacher.ptr", "gradient.ptr") == {
        "student.ptr": read,
        "teacher.ptr": read,
        "gradient.ptr": read,
    }
    assert len(forward.launches) == len(backward.launches) == 1


@pytest.mark.parametrize("loss", [*DIVERGENCES, "kd"])
def test_long_rows_are_read_once_a_sweep(loss, multiprocessors):
    student, teacher = logits(2, LOOPED)
    labels = [torch.tensor([LOOPED - 1, 5])] if loss == "kd" else []
    forward, backward = metered(loss, student, teacher, *labels)
    read = 2 * student.numel()
    of_labels = 2 * 2 if labels else 0
    sweeps = 2 if loss in MIXTURES else 1
    assert bytes_of(forward, "student.ptr", "teacher.ptr") == {
        "student.ptr": sweeps * read + of_labels,
        "teacher.ptr": sweeps * read,
    }
    assert bytes_of(backward, "student.ptr", "teacher.ptr", "gradient.ptr") == {
        "student.ptr": read,
        "teacher.ptr": read,
        "gradient.ptr": read,
    }
    # all else is a few numbers for each row
    assert sum(x.traffic for x in forward.launches) <= 2 * sweeps * read + of_labels + 1000
    assert sum(x.traffic for x in backward.launches) <= 3 * read + 1000


def problem(divergence, student, teacher, labels=None, row_mask=None):
    return Rows(student, teacher, labels, row_mask, 2.0, 1.5, 0.3, 4.0, divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
def test_value_and_gradients(divergence, n_cols):
    student, teacher = (x.detach() for x in logits(2, n_cols))
    with Meter() as meter:
        kernels.value_and_gradients(problem(divergence, student, teacher), (True,))
    moved = (
        sum(bytes_of(meter, "student.ptr", "teacher.ptr", "gradient.ptr").values())
        / student.numel()
    )
    assert moved == (6 if n_cols == ON_CHIP else 14 if divergence in MIXTURES else 10)
    unique = {
        name: max(x.arguments[name].unique_loaded + x.arguments[name].unique_stored
                  for x in meter.launches)
        for name in ("student.ptr", "teacher.ptr", "gradient.ptr")
    }  # fmt: skip
    assert sum(unique.values()) == 6 * student.numel()


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
def test_rows_left_out_are_not_read(n_cols, multiprocessors):
    student, teacher = logits(4, n_cols)
    weights = torch.tensor([True, False, False, True])
    forward, backward = metered("forward_kl", student, teacher, weights=weights)
    if n_cols == LOOPED:  # on chip their reads cost nothing that shows
        assert bytes_of(forward, "teacher.ptr") == {"teacher.ptr": student.numel()}
        assert bytes_of(backward, "teacher.ptr") == {"teacher.ptr": student.numel()}
    assert bytes_of(backward, "gradient.ptr") == {"gradient.ptr": 2 * student.numel()}
    assert not student.grad[1:3].any()


VIEWS = {
    "contiguous": lambda rows, n: torch.randn(rows, n),
    "padded": lambda rows, n: torch.randn(rows, n + 24)[:, :n],
    "padded off the boundary": lambda rows, n: torch.randn(rows, n + 3)[:, :n],
    "all but the last": lambda rows, n: torch.randn(1, rows + 1, n)[:, :-1],
    "all but the first": lambda rows, n: torch.randn(1, rows + 1, n)[:, 1:],
    "inside a row": lambda rows, n: torch.randn(rows, n + 9)[:, 5 : n + 5],
    "transposed": lambda rows, n: torch.randn(n, rows).T,
}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", ["padded off the boundary", "inside a row"])
def test_vectors_start_on_their_boundary(view, dtype, multiprocessors, monkeypatch):
    """The compiler is told so: on a GPU any other address would stop the kernel."""
    places = []

    def watched(pointer, offset, aligned):
        moved = pointer + offset
        if getattr(aligned, "value", aligned):
            places.extend(moved.handle.data.ravel() % 16)
        return moved

    monkeypatch.setattr(sweeps, "at_boundary", watched)
    student = VIEWS[view](3, LOOPED).to(dtype)
    room = torch.empty(3, LOOPED + 3, dtype=dtype)[:, :LOOPED].copy_(student)
    fastkd.forward_kl(room.requires_grad_(), VIEWS[view](3, LOOPED).to(dtype)).backward()
    assert len(places) > 6 and not any(places)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("teacher_is_contiguous", [True, False])
@pytest.mark.parametrize("n_cols", [7, 257, LOOPED - 1, LOOPED + 6])
def test_every_access_is_inside_and_every_output_written(
    view, teacher_is_contiguous, n_cols, multiprocessors
):
    student = VIEWS[view](3, n_cols).requires_grad_()
    teacher = VIEWS["contiguous" if teacher_is_contiguous else view](3, n_cols).bfloat16()
    labels = torch.tensor([0, n_cols - 1, -100]).view(student.shape[:-1])
    forward, backward = metered(
        "kd", student, teacher.view_as(student) if teacher_is_contiguous else teacher, labels,
        divergence="jensen_shannon" if n_cols % 2 else "forward_kl",
    )  # fmt: skip
    assert not forward.races
    assert not backward.races
    assert sum(x.arguments["losses_ptr"].unique_stored for x in forward.launches) == 3 * 4
    written = backward.launches[-1].arguments["gradient.ptr"]
    assert written.unique_stored == written.stored == student.numel() * 4


@pytest.mark.parametrize("n_cols", [ON_CHIP, LOOPED])
def test_in_place_no_program_disturbs_another(n_cols, multiprocessors):
    student, teacher = (x.detach() for x in logits(3, n_cols))
    labels = torch.tensor([3, -1, n_cols - 1])
    rows = problem("reverse_kl", student, teacher, labels)
    weights = dict(row_weights=torch.ones(3), ce_weights=torch.ones(3))
    expected = kernels.value_and_gradients(rows, (True,), **weights)
    with Meter() as meter:
        found = kernels.value_and_gradients(rows, (True,), **weights, in_place=True)
    assert not meter.races
    assert found[1][0] is student
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

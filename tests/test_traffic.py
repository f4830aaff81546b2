"""Every loss of the benchmarks' table in the interpreter: the bytes it moves, safety of memory."""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counted in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import budgets
from choice import quick_if
from counts import FUSED, metered, scaled_down

POINTS = [
    pytest.param(case, shape, id=f"{case.name}-{shape[0]}x{shape[1]}")
    for case in FUSED
    for i, shape in enumerate(case.family.compiled_sizes)
    if case.family.independent or not i  # of related examples a few are the same for all shapes
]
each_point = pytest.mark.parametrize("case, shape", POINTS)
# long rows of a KL, of a mixture and with labels, and short rows of all
LONG = (4096, 151669)
quick = quick_if(
    lambda case, shape: (
        not case.family.independent
        or shape in ((256, 1000), (16, 64, 8, 8))
        or (shape == LONG and case.name in ("forward_kl", "jensen_shannon", "kd"))
    )
)


@each_point
@quick
def test_bytes_stay_within_the_budget(case, shape):
    name = budgets.name_of(shape, torch.bfloat16)
    recorded = budgets.read()["counts"].get(case.name, {}).get(name, {}).get("traffic", {})
    found = budgets.changes(recorded, budgets.of_traffic(case, shape))
    worse = [str(change) for change in found if change.is_worse]
    assert not worse, "\n".join([f"{name}: python tests/budgets.py --write", *worse])


def inside_a_row(x: Tensor) -> Tensor:
    """Return rows that start off every boundary."""
    return x.new_zeros((*x.shape[:-1], x.shape[-1] + 9))[..., 5 : x.shape[-1] + 5].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


@pytest.fixture
def poisoned():
    """Let what is allocated hold NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@each_point
@quick
def test_every_access_is_inside_and_every_output_written_once(case, shape, poisoned):
    def lay_out(inputs: list[Tensor]) -> list[Tensor]:
        trained, *rest = (x.detach() for x in inputs)
        return [inside_a_row(trained).requires_grad_(), *map(transposed, rest)]

    # an odd number of columns, for which the launch sites still choose the same code
    (n, *columns), device = scaled_down(case, shape, n=3)
    with device:
        odd = (n, *((min(size, 10244) - 1) | 1 for size in columns))
        if case.problem == "tokens":
            odd = (*odd[:-1], 12 * 5)  # of heads with an odd width
        forward, backward, results = metered(case, odd, torch.bfloat16, lay_out)
    for launch in forward.launches + backward.launches:
        assert not launch.races
        for argument in launch.arguments.values():
            assert argument.stored == argument.unique_stored
    for result in results:
        assert result.isfinite().all()

"""Every problem that a GPU run measures can be made and started, as meta tensors show."""

import sys
from pathlib import Path

import pytest
from choice import quick_if
from gate import launch_nothing
from torch.fx.experimental import _config

import fastkd

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from devices import Gpu
from plan import all_others, headlines
from runner import DIRECTIONS, least_bytes, step_of
from workloads import WORKLOADS


class Planned:
    """A GPU as far as a plan asks for it."""

    dtypes = Gpu.dtypes
    shapes, headlines = Gpu.shapes, Gpu.headlines


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("problems", [headlines, all_others])
# uld alone takes as long as all others
@quick_if(lambda problems, workload: problems is headlines and workload.name != "uld")
def test_each_problem_of_a_loss_can_be_made_and_started(problems, workload):
    planned = problems([workload], Planned())
    both = [problem for problem in planned if problem.direction == DIRECTIONS[0]]
    assert len(both) == len(planned) / 2
    for problem in both:
        inputs = workload.inputs(problem.shape, problem.dtype, "meta")
        assert least_bytes(problem, inputs) > 0
        with launch_nothing() as started, fastkd.backend("triton"):
            step_of(workload.fastkd, inputs, problem.direction)()
        assert inputs[0].grad.shape == inputs[0].shape
        assert started or not workload.case.has_kernels or workload.problem == "tokens"
        # what people write may look for what is not 0
        with _config.patch(meta_nonzero_assume_all_nonzero=True):
            step_of(workload.eager, inputs, problem.direction)()

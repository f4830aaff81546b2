"""Every kernel once, on small problems: the first that a GPU runs, so that it soon says enough."""

import pytest
from exactness import assert_exact
from first_light import LIGHTS

pytestmark = [pytest.mark.gpu, pytest.mark.first_light, pytest.mark.full]


@pytest.mark.parametrize("light", LIGHTS, ids=str)
def test_as_exact_as_the_formula(light):
    times = 4 if light.case.problem == "pairs" else 2  # whose products cuBLAS sums in its order
    assert_exact(light.case, light.inputs(), times, rounds_halves=True)

"""The first light on a GPU reaches every kernel, as counted at the launch sites without one."""

import ast
from pathlib import Path

import pytest
import torch
from first_light import LIGHTS
from gate import launch_nothing

import fastkd

KERNELS = Path(__file__).parents[2] / "kernels"
N_FIRST = 25  # of the lights, which reach every kernel by themselves


def started_from_python():
    """Return the names of all functions of @triton.jit that are called as name[grid](...)."""
    defined, started = set(), set()
    for file in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                if any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                    defined.add(node.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                started.add(ast.unparse(node.func.value).split(".")[-1])
    return defined & started


@pytest.mark.parametrize("light", LIGHTS, ids=str)
def test_a_light_starts_its_kernels(light):
    with launch_nothing() as started, fastkd.backend("triton"):
        inputs = light.inputs(device="meta")
        torch.autograd.grad(light.case(*inputs).sum(), inputs[0])
    assert {*started} == {*light.kernels}


def test_no_kernel_is_left_out():
    reached = {name for light in LIGHTS[:N_FIRST] for name in light.kernels}
    assert reached == started_from_python()
    assert len({str(light) for light in LIGHTS}) == len(LIGHTS)

"""`fastkd doctor` says what runs and why, and notices a wrong engine."""

import contextvars
import os
import re
import subprocess
import sys

import pytest
import torch
from choice import full

import fastkd
from fastkd import __main__ as program
from fastkd import _backend, _doctor
from fastkd.portable import rows as portable
from fastkd.portable import softened

ON_CPU = {"cpu": ""}


def doctor(monkeypatch, capsys, devices=ON_CPU):
    monkeypatch.setattr(_doctor, "_devices", lambda: devices)
    status = program.main(["doctor"])
    return status, capsys.readouterr().out


def lines_of(page):
    """Return loss -> the rest of its line."""
    rows = (line.split(maxsplit=2) for line in page.splitlines())
    names = {loss.__name__ for loss in _doctor.LOSSES}
    return {row[0]: row[1:] for row in rows if row and row[0] in names}


def console_script(*arguments, without=(), **environment):
    """Run the program in another process, in which some packages cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({without!r}))"
    run = "from fastkd.__main__ import main; raise SystemExit(main())"
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", f"{hide}; {run}", *arguments],
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_public_loss_is_examined():
    public = {getattr(fastkd, name) for name in fastkd.__all__ if name.islower()}
    losses = {f for f in public if hasattr(f, "formula")}
    assert losses == set(_doctor.LOSSES) and fastkd.forward_kl in losses


def test_a_healthy_cpu(monkeypatch, capsys):
    with fastkd.backend("auto"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 0
    engines = {x.__name__: "portable" if x.has_engines else "formula" for x in _doctor.LOSSES}
    assert lines_of(page) == {name: [engine, "ok"] for name, engine in engines.items()}
    formulas = {name for name, engine in engines.items() if engine == "formula"}
    assert {"attention_mse", "fsp", "nst"} <= formulas
    assert torch.__version__ in page
    assert fastkd.__version__ in page
    assert page.count("not triton") == 1  # the reason that all share, once
    assert page.count("portable: the best engine of losses that have no kernels") == 1


def test_without_triton_the_reason_says_so(monkeypatch, capsys):
    monkeypatch.setattr(_backend, "_no_triton", "Triton is not installed")
    with fastkd.backend("auto"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 0
    assert "portable, not triton: Triton is not installed" in page


def test_the_formula_as_backend(monkeypatch, capsys):
    with fastkd.backend("formula"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 0
    assert {engine for engine, _ in lines_of(page).values()} == {"formula"}
    assert "FASTKD_BACKEND asks for it" in page


def test_a_wrong_value_fails(monkeypatch, capsys):
    right = portable.forward

    def wrong(*arguments):
        (losses, cross_entropies), saved = right(*arguments)
        return (losses * (1 + 1e-3), cross_entropies), saved

    monkeypatch.setattr(portable, "forward", wrong)
    with fastkd.backend("portable"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 1
    assert "float32: its value is" in lines_of(page)["reverse_kl"][1]
    assert lines_of(page)["rkd"] == ["portable", "ok"]
    assert "21 wrong" in page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_fails(dtype, monkeypatch, capsys):
    """One dtype has a small problem and the other a large one, and both are examined."""
    forward, backward = portable.forward, portable.backward

    def spoilt(problem, gradient):
        if gradient is not None and str(problem.student.dtype) == f"torch.{dtype}":
            gradient[0, 0] += 1
        return gradient

    def wrong_forward(problem, needs_grad):
        losses, (statistics, *gradients) = forward(problem, needs_grad)
        return losses, (statistics, *(spoilt(problem, x) for x in gradients))

    monkeypatch.setattr(portable, "forward", wrong_forward)
    monkeypatch.setattr(portable, "backward", lambda x, *rest: spoilt(x, backward(x, *rest)))
    with fastkd.backend("portable"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 1
    assert f"{dtype}: its gradient is" in lines_of(page)["forward_kl"][1]


def test_a_wrong_gradient_of_the_teacher_fails(monkeypatch, capsys):
    right = softened.backward

    def wrong(*arguments):
        of_student, of_teacher, *others = right(*arguments)
        return of_student, of_teacher * (1 + 1e-3), *others

    monkeypatch.setattr(softened, "backward", wrong)
    with fastkd.backend("portable"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 1
    assert "its gradient in the teacher is" in lines_of(page)["forward_kl"][1]
    assert lines_of(page)["kd"] == ["portable", "ok"]


def test_an_error_is_reported(monkeypatch, capsys):
    def broken(*arguments):
        raise ZeroDivisionError("the engine is broken")

    monkeypatch.setattr(portable, "forward", broken)
    with fastkd.backend("portable"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 1
    assert "ZeroDivisionError: the engine is broken" in lines_of(page)["kd"][1]


def test_a_nan_is_wrong(monkeypatch):
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(_doctor, "_value_and_gradients", lambda *_: [nan, nan])
    assert "its value is nan" in _doctor._wrong(fastkd.logit_mse, _doctor._logits, "cpu")


def test_a_backend_that_can_run_on_no_device_explains():
    result = console_script("doctor", FASTKD_BACKEND="triton")
    assert result.returncode == 1, result.stderr
    assert lines_of(result.stdout)["forward_kl"] == ["cannot", "run"]
    assert lines_of(result.stdout)["logit_mse"] == ["portable", "ok"]  # has no kernels
    assert lines_of(result.stdout)["pkt"] == ["portable", "ok"]
    assert "triton (FASTKD_BACKEND: triton)" in result.stdout
    assert 'fastkd.backend("triton") cannot run here: ' in result.stdout
    assert 'Use "auto" or "portable"' in result.stdout
    unable = (
        "No device here can run attention_transfer, channel_wise, clip_contrastive, decoupled_kd"
    )
    assert unable in result.stdout


def test_a_backend_that_runs_on_one_of_the_devices_is_enough(monkeypatch, capsys):
    obstacle = "the tensors are on cpu, not on a GPU"
    monkeypatch.setattr(
        _doctor,
        "_engine_and_reason",
        lambda _, device: ("portable", "") if device == "cpu:0" else (None, obstacle),
    )
    status, page = doctor(monkeypatch, capsys, {"cpu": "", "cpu:0": "a second device"})
    assert status == 0
    assert "cpu:0  a second device" in page
    assert obstacle in page


@full
def test_works_with_torch_alone():
    others = ("matplotlib", "numpy", "rich", "sklearn", "triton")
    result = console_script("doctor", without=others, FASTKD_BACKEND="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "triton   not installed" in result.stdout
    assert "portable, not triton: Triton is not installed" in result.stdout


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "sklearn"])
def test_the_demo_names_a_missing_package(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in [name for name in sys.modules if name.startswith((f"{missing}.", "fastkd.demo"))]:
        monkeypatch.delitem(sys.modules, module)
    assert program.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert f"but {missing} is not installed" in message
    assert 'pip install "fastkd[demo]"' in message


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "required"),
        (["train"], "train"),
        (["demo", "--seeds", "0"], "at least 1, got 0"),
        (["demo", "--device", "meta"], "cannot compute on 'meta': .*leave it out for the CPU"),
        (["demo", "--device", "nowhere"], "cannot compute on 'nowhere': .*leave it out"),
    ],
)
def test_a_wrong_command_line_explains(arguments, told, capsys):
    with pytest.raises(SystemExit) as error:
        program.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "usage: fastkd" in message and re.search(told, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_the_demo_on_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        program.main(["demo", "--device", "cuda"])
    assert "cannot compute on 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "demo"])
@pytest.mark.parametrize("name", ["", "fast"])
def test_a_default_that_is_no_backend_is_told_in_a_sentence(command, name, monkeypatch, capsys):
    monkeypatch.setattr(_backend, "_default", name)
    assert contextvars.Context().run(program.main, [command]) == 1
    told = f"fastkd: got the backend '{name}', need one of auto, triton, portable, formula; set or"
    assert capsys.readouterr().err.startswith(told)


def test_a_demo_that_cannot_run_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastkd.demo.report", reason="needs the extra `demo`")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/folder"):
        assert program.main(["demo", "--out", str(out)]) == 1
        message = capsys.readouterr().err
        assert re.match(rf"fastkd: --out {out} cannot be a folder for the results: \w+", message)
    monkeypatch.setattr(_backend, "_no_triton", "Triton is not installed")
    with fastkd.backend("triton"):
        assert program.main(["demo", "--out", str(tmp_path / "results")]) == 1
    assert "cannot run here: Triton is not installed. Use" in capsys.readouterr().err


def test_an_interpreter_as_shipped_is_examined_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(_backend, "_interpreted", True)
    monkeypatch.setattr(_backend, "interpreter_knows_bfloat16", False)
    monkeypatch.setattr(_doctor, "LOSSES", {fastkd.forward_kl: _doctor._logits})
    examined = []
    monkeypatch.setattr(
        _doctor,
        "_value_and_gradients",
        lambda _, x: examined.append(x[0].dtype) or [torch.ones(1)] * 2,
    )
    with fastkd.backend("triton"):
        status, page = doctor(monkeypatch, capsys)
    assert status == 0 and {*examined} == {torch.float32, torch.float64}
    assert "triton, but not of bfloat16: the interpreter of TRITON_INTERPRET=1" in page

"""The console script: `fastkd demo` shows what the losses gain, `fastkd doctor` how they run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import fastkd
from fastkd import _backend, _doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 1 if something does not work."""
    parser = argparse.ArgumentParser(prog="fastkd", description=fastkd.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "train a teacher and students on real data: what each loss gains, in a minute or two"
    demo = commands.add_parser("demo", help=about, description=about)
    demo.add_argument(
        "name", nargs="?", choices=[*_DEMOS], default="digits",
        help="digits (the default), logits: variants and a committee of teachers, mutual: students "
        "that teach each other, ema: a network that its average teaches, text: paragraphs of "
        "Python's documentation, segmentation: scenes drawn from digits, or lm: a language model "
        "of Python's reference",
    )  # fmt: skip
    demo.add_argument(
        "--out", type=Path, default=Path("fastkd-demo"), help="folder for the results"
    )
    demo.add_argument(
        "--seeds", type=_count, help="students for each loss (5, or 3 of text, segmentation and lm)"
    )
    demo.add_argument(
        "--steps",
        type=_count,
        help="training steps of a student (250, of text 200, of ema 400, of lm 500)",
    )
    demo.add_argument(
        "--device", type=_device, default="cpu", help="cpu (the default) or for example cuda"
    )
    about = "say which engine computes each loss on each device, why, and whether it does it right"
    commands.add_parser("doctor", help=about, description=about)
    options = vars(parser.parse_args(arguments))
    try:
        _backend.chosen()
    except ValueError as error:
        return _complain(str(error))
    return _demo(**options) if options.pop("command") == "demo" else _doctor.doctor()


_DEMOS = {  # seeds and steps
    "digits": (5, 250),
    "logits": (5, 250),
    "text": (3, 200),
    "segmentation": (3, 250),
    "mutual": (5, 250),
    "ema": (5, 400),
    "lm": (3, 500),
}


def _complain(sentence: str) -> int:
    """Print what is wrong, and return the exit status for it."""
    print(f"fastkd: {sentence}", file=sys.stderr)
    return 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"need a whole number of at least 1, got {text}")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.zeros((), device=text).item()
    except (AssertionError, RuntimeError) as error:  # the former where torch has no CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(
            f"cannot compute on {text!r}: {reason.rstrip('.')}; leave it out for the CPU"
        ) from error
    return text


def _demo(name: str, out: Path, seeds: int | None, steps: int | None, device: str) -> int:
    try:
        from fastkd.demo import logits, online, report, scenes, study, text
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in ("matplotlib", "rich", "sklearn"):
            raise
        return _complain(
            f"the demo needs matplotlib, rich and scikit-learn, but {missing} is not installed. "
            f'Run: pip install "fastkd[demo]"'
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        _backend.choose([torch.empty(0, device=device)])
    except OSError as error:
        return _complain(f"--out {out} cannot be a folder for the results: {error.strerror}")
    except RuntimeError as error:
        return _complain(str(error))
    seeds, steps = seeds or _DEMOS[name][0], steps or _DEMOS[name][1]
    if name == "digits":
        return report.run(out, seeds, steps, device)
    if name == "lm":
        from fastkd.demo import lm_report  # whose text no other demo needs

        return lm_report.run(out, seeds, steps, device)
    studies = logits.STUDY, text.STUDY, scenes.STUDY, online.MUTUAL, online.EMA
    (chosen,) = (x for x in studies if x.name == name)
    return study.run(chosen, out, seeds, steps, device)


if __name__ == "__main__":
    sys.exit(main())

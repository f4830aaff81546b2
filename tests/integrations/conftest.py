"""Tiny random models, trained offline: with fastkd the curve must be the framework's own.

A curve has one row for each step: the loss and, where it is logged, the norm of the gradient. The
tolerance is relative. Training amplifies the rounding of float32 to about 1e-6 (measured: 2e-7 to
4e-6); a wrong factor, divisor or mask changes the curves by more than 1e-2.
"""

import importlib.util
import os
import socket

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # read by imports further on

# where the frameworks are missing nothing is collected, which pytest reports as a failure
if not all(map(importlib.util.find_spec, ("lightning", "transformers", "trl"))):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def connect(*_):
        raise AssertionError("the test wants the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def tiny_llama():
    def build(seed, width):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,  # the default is so small that every prediction is uniform
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)

    return build


@pytest.fixture
def trainer_options(tmp_path):
    """Return what the trainers of transformers and TRL are given."""
    return dict(
        output_dir=tmp_path,
        max_steps=12,
        optim="sgd",  # unlike Adam it does not hide the scale of the gradient
        bf16=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )


@pytest.fixture
def curve_of():
    def train(trainer):
        trainer.train()
        return [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]

    return train


@pytest.fixture
def same_curve():
    def check(curve, expected):
        curve, expected = torch.tensor(curve), torch.tensor(expected)
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=0)
        first, last = expected[0, 0], expected[-1, 0]
        assert last < 0.95 * first, "nothing was learned: the curve proves nothing"

    return check


@pytest.fixture
def one_rank():
    """Make a process group of this process alone, which needs no network."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

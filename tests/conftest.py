"""Without a GPU the kernels run in Triton's interpreter, corrected to round as a GPU does."""

import os

import torch

torch.set_num_threads(1)  # the tests run in two processes on two cores

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.correct()

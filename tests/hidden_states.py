"""Networks of nine positions for the tests of losses from hidden states and heads."""

import torch
from inputs import heads, normal
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd

N_ENTRIES = 13


def nine_positions():
    """Return hidden states and heads of 9 positions, and their labels."""
    *tensors, labels, _ = heads((9,), 5)
    return tensors, labels


def three_teachers():
    """Return hidden states, heads and biases of three teachers of other widths and dtypes."""
    hidden = [normal(9, width, seed=20 + width) for width in (3, 7, 4)]
    weights = [normal(N_ENTRIES, width, seed=30 + width) for width in (3, 7, 4)]
    hidden[1], weights[2] = hidden[1].float(), weights[2].bfloat16()
    return hidden, weights, [normal(N_ENTRIES, seed=40), None, normal(N_ENTRIES, seed=41)]


def trained(tensors):
    student, weight, *teacher = (x.detach().clone() for x in tensors)
    return [student.requires_grad_(), weight.requires_grad_(), *teacher]


def results(tensors, *more, loss=fastkd.linear_kd, **options):
    """Return the loss and the gradients of the student's hidden states and head."""
    tensors = trained(tensors)
    value = loss(*tensors, *more, **options)
    upstream = normal(*value.shape, dtype=value.dtype, seed=99)
    return [value.detach(), *torch.autograd.grad(value, tensors[:2], upstream)]


class Products(TorchDispatchMode):
    """The products of a region, and how many rows of hidden states the first ones have."""

    def __init__(self):
        super().__init__()
        self.n, self.rows = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            if self.n < 1:
                self.rows.add(len(args[0]))
            self.n += 1
        return function(*args, **(kwargs or {}))


def compiled(loss, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(loss, backend=backend, fullgraph=True)

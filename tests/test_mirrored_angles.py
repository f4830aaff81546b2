"""The portable engine spares the angles that mirror others, from 256 examples on."""

import torch
from inputs import normal

import fastkd


def test_mirrored_angles_have_their_share_in_the_loss_and_the_gradient():
    student, teacher = normal(257, 3).requires_grad_(), normal(257, 4, seed=1)
    results = []
    for engine in ("formula", "portable"):
        with fastkd.backend(engine):
            loss = fastkd.rkd_angle(student, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)

"""Channel-wise distillation against a literal loop."""

import numpy as np
import pytest
import torch

from distill.losses import channel_wise_loss


def literal(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher):
        for n in range(s.shape[0]):
            for c in range(s.shape[1]):
                p, q = (np.exp(x[n, c] / temperature) for x in (t, s))
                p, q = p / p.sum(), q / q.sum()
                total += temperature**2 * (p * np.log(p / q)).sum() / (s.shape[0] * s.shape[1])
    return total


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_a_loop_over_channels(temperature):
    rng = np.random.default_rng()
    student, teacher = ([rng.normal(size=(2, 3, h, w)) for h, w in ((5, 7), (2, 1))] for _ in range(2))
    args = [[torch.from_numpy(x) for x in side] for side in (student, teacher)]
    loss = channel_wise_loss(*args, temperature)
    assert loss.item() == pytest.approx(literal(student, teacher, temperature), rel=1e-9)
    assert channel_wise_loss(args[0], args[0]).item() == pytest.approx(0, abs=1e-12)
    shifted = [x + 3 for x in args[1]]  # a channel's offset plays no part
    assert channel_wise_loss(args[0], shifted, temperature).item() == pytest.approx(loss.item(), rel=1e-9)


def test_gradient_is_that_of_finite_differences_and_half_precision_is_widened():
    x, y = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: channel_wise_loss([x], [y], 2.0), x)
    assert channel_wise_loss([x.half()], [y.half()]).dtype == torch.float32
    with pytest.raises(ValueError, match="at least one level"):
        channel_wise_loss([], [])

"""The loss of aligned distillation against a literal loop in numpy."""

import numpy as np
import pytest
import torch

from distill.losses import aligned_loss


def test_equals_the_literal_formula():
    shapes = [(2, 5, 8, 6), (2, 5, 4, 3), (2, 5, 2, 2)]
    student, teacher = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected = sum(np.abs(x.numpy() - y.numpy()).mean() for x, y in zip(student, teacher))
    np.testing.assert_allclose(aligned_loss(student, teacher).item(), expected, rtol=1e-5)


def test_is_float32_inside_autocast_and_refuses_other_shapes():
    features = [torch.randn(1, 2, 4, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert aligned_loss([features[0].bfloat16()], features).dtype == torch.float32
    with pytest.raises(ValueError, match="same shapes"):
        aligned_loss(features, [torch.randn(1, 2, 2, 2)])
    with pytest.raises(ValueError, match="at least one level"):
        aligned_loss([], [])

"""Crossing feature-level fusion against a literal transcription in numpy."""

import numpy as np
import pytest
import torch

from distill.modeling import CrossFeatureFusion


def test_equals_the_literal_formula():
    fusion = CrossFeatureFusion(32).double()
    high, low = torch.randn(2, 3, 32, 5, 7, dtype=torch.float64)
    a, b = (p.detach().numpy() for p in (fusion.squeeze.weight, fusion.weigh.weight))
    assert a.shape == (4, 64) and b.shape == (2, 4)
    for n in range(3):
        x = np.concatenate([high[n].numpy().mean((1, 2)), low[n].numpy().mean((1, 2))])
        logits = b @ np.maximum(a @ x, 0)
        w = np.exp(logits) / np.exp(logits).sum()
        expected = w[0] * high[n].numpy() + w[1] * low[n].numpy()
        np.testing.assert_allclose(fusion(high, low)[n].detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(fusion.weights(high, low)[n].detach().numpy(), w, rtol=1e-9, atol=1e-12)


def test_weights_sum_to_one_and_get_gradients():
    fusion = CrossFeatureFusion(64, reduction=4)
    high, low = torch.randn(2, 2, 64, 6, 6)
    torch.testing.assert_close(fusion.weights(high, low).sum(1), torch.ones(2))
    (fusion(high, low) * torch.randn(2, 64, 6, 6)).sum().backward()
    assert [name for name, _ in fusion.named_parameters()] == ["squeeze.weight", "weigh.weight"]  # no biases
    assert fusion.weigh.weight.grad.abs().sum() > 0


def test_refuses_maps_that_are_not_aligned():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 8, 6, 6\) and \(1, 8, 3, 3\)"):
        CrossFeatureFusion(8)(torch.zeros(1, 8, 6, 6), torch.zeros(1, 8, 3, 3))

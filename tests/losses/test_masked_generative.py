"""Masked generative distillation: the loss against a sum, and which cells are masked."""

import numpy as np
import pytest
import torch

from distill.losses import generation_loss, random_cells


def test_equals_the_sum_of_squares_of_an_image():
    rng = np.random.default_rng()
    made, teacher = ([rng.normal(size=(3, 2, h, w)) for h, w in ((5, 7), (2, 1))] for _ in range(2))
    expected = sum(((a - b) ** 2).sum() / 3 for a, b in zip(made, teacher))
    loss = generation_loss(*([torch.from_numpy(x) for x in side] for side in (made, teacher)))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_masks_cells_in_all_channels_and_in_the_asked_share():
    features = torch.randn(4, 8, 50, 60, dtype=torch.float16)
    for ratio in (0.0, 0.45, 0.65):
        cells = random_cells(features, ratio)
        assert cells.shape == (4, 1, 50, 60) and cells.dtype == torch.float16
        assert set(cells.unique().tolist()) <= {0.0, 1.0}
        assert (cells == 0).float().mean().item() == pytest.approx(ratio, abs=0.03)
    assert not torch.equal(random_cells(features, 0.5), random_cells(features, 0.5))
    same = [random_cells(features, 0.5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)

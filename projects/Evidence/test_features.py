"""What features.py says of a detector's features."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from features import describe


def test_where_features_vary_is_what_a_literal_computation_says():
    features, inside = (
        torch.randn(2, 3, 4, 5) * torch.tensor([1.0, 4.0, 0.5])[:, None, None] + 7,
        torch.rand(2, 4, 5) > 0.6,
    )
    cells = {True: [], False: []}
    for n, y, x in np.ndindex(2, 4, 5):
        cells[inside[n, y, x].item()].append(features[n, :, y, x].double().numpy())
    mean = np.mean(cells[True] + cells[False], axis=0)
    values = np.linalg.svd(np.array(cells[True] + cells[False]) - mean, compute_uv=False) ** 2
    expected = [np.mean((np.array(cells[side]) - mean) ** 2) for side in (True, False)] + [values[0] / values.sum()]
    images = np.array([[channel.mean() for channel in image] for image in features.double().numpy()])
    expected.append(np.mean((images - mean) ** 2) / (values.sum() / 120))  # 2 images of 3 channels of 4 x 5 cells
    assert describe(features, inside) == pytest.approx(expected, rel=1e-6)

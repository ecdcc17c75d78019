"""Norms of the difference and region weights against literal loops."""

import math

import numpy as np
import pytest
import torch

from distill.losses import imitation_loss, region_weights

DISTANCES = {
    "l1": abs,
    "l2": lambda d: d * d,
    "smooth_l1": lambda d: d * d / 2 if abs(d) < 1 else abs(d) - 0.5,
}


@pytest.mark.parametrize("norm", list(DISTANCES))
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_the_literal_formula(norm, weighted):
    rng = np.random.default_rng()
    shapes = [(2, 3, 5, 4), (2, 2, 1, 3)]
    student, teacher = ([2 * rng.normal(size=shape) for shape in shapes] for _ in range(2))
    weights = [rng.random((2, 1, *shape[2:])) * (rng.random((2, 1, *shape[2:])) < 0.6) for shape in shapes]
    expected = []
    for s, t, w in zip(student, teacher, weights):
        total = norming = 0.0
        for n, c, i, j in np.ndindex(s.shape):
            weight = w[n, 0, i, j] if weighted else 1.0
            total += weight * DISTANCES[norm](s[n, c, i, j] - t[n, c, i, j])
            norming += weight
        expected.append(total / norming if norming else 0.0)
    sides = [[torch.from_numpy(x) for x in side] for side in (student, teacher)]
    loss = imitation_loss(*sides, norm, [torch.from_numpy(w) for w in weights] if weighted else None)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_no_weight_at_all_is_zero_with_zero_gradient():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = imitation_loss([x], [torch.randn(1, 2, 3, 3)], weights=[torch.zeros(1, 1, 3, 3)])
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


def literal_weights(boxes, size, stride, region):
    out = np.zeros((len(boxes), 1, *size))
    for n, corners in enumerate(boxes):
        for i, j in np.ndindex(*size):
            values = [0.0]
            for x0, y0, x1, y1 in corners.tolist():
                if region == "boxes":
                    across = min(x1, (j + 1) * stride) - max(x0, j * stride)
                    down = min(y1, (i + 1) * stride) - max(y0, i * stride)
                    values.append(float(across > 0 and down > 0))
                else:
                    w, h = max(x1 - x0, stride), max(y1 - y0, stride)
                    dx = ((j + 0.5) * stride - (x0 + x1) / 2) / (w / 4)
                    dy = ((i + 0.5) * stride - (y0 + y1) / 2) / (h / 4)
                    values.append(math.exp(-(dx * dx + dy * dy) / 2))
            out[n, 0, i, j] = 1.0 if region == "all" else max(values)
    return out


@pytest.mark.parametrize("region", ["all", "boxes", "gaussian"])
def test_region_weights_equal_a_loop_over_boxes_and_cells(region):
    corners = torch.rand(5, 2) * 60
    boxes = [torch.cat([corners, corners + torch.rand(5, 2) * 40], 1), torch.zeros(0, 4)]
    boxes[0][0] = torch.tensor([17.2, 9.1, 17.9, 9.3])  # smaller than a cell
    weights = region_weights(boxes, (9, 13), 8, region)
    np.testing.assert_allclose(weights.numpy(), literal_weights(boxes, (9, 13), 8, region), atol=2e-6)
    assert weights.dtype == torch.float32 and weights.shape == (2, 1, 9, 13)
    if region != "all":
        assert weights[1].abs().max() == 0


def test_every_box_has_a_cell():
    box = torch.tensor([[33.0, 20.0, 33.5, 20.25]])
    for stride in (4, 8, 16, 32):
        weights = region_weights([box], (128 // stride, 128 // stride), stride, "boxes")
        assert weights.sum() == 1 and weights[0, 0, int(20 // stride), int(33 // stride)] == 1


def test_refuses_unknown_names():
    x = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match="norm is 'l3', expected one of l1, l2, smooth_l1"):
        imitation_loss([x], [x], "l3")
    with pytest.raises(ValueError, match="region is 'box'"):
        region_weights([torch.zeros(0, 4)], (2, 2), 8, "box")
    with pytest.raises(ValueError, match="same shapes"):
        imitation_loss([x], [x[:, :1]])

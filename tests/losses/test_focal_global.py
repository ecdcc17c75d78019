"""Focal and global distillation against literal loops."""

import math

import numpy as np
import pytest
import torch

from distill.losses import attention_maps, focal_losses, focal_weights


def literal_attention(features, temperature):
    n, c, h, w = features.shape
    spatial, channel = np.empty((n, h, w)), np.empty((n, c))
    for i in range(n):
        e = np.exp(np.abs(features[i]).mean(0) / temperature)
        spatial[i] = h * w * e / e.sum()
        e = np.exp(np.abs(features[i]).mean((1, 2)) / temperature)
        channel[i] = c * e / e.sum()
    return spatial, channel


def literal_weights(boxes, size, stride):
    foreground, background = np.zeros((len(boxes), *size)), np.zeros((len(boxes), *size))
    for i, own in enumerate(boxes):
        for x0, y0, x1, y1 in own:
            left, right = math.floor(x0 / stride), math.ceil(x1 / stride)
            top, bottom = math.floor(y0 / stride), math.ceil(y1 / stride)
            share = 1 / ((bottom - top + 1) * (right - left + 1))
            for y in range(top, min(bottom, size[0] - 1) + 1):
                for x in range(left, min(right, size[1] - 1) + 1):
                    foreground[i, y, x] = max(foreground[i, y, x], share)
        outside = foreground[i] == 0
        background[i] = outside / max(outside.sum(), 1)
    return foreground, background


def random_boxes(number, height, width):
    corners = np.random.default_rng().uniform(0, 0.7, (number, 2)) * [width, height]
    extents = np.random.default_rng().uniform(0.02, 0.5, (number, 2)) * [width, height]
    return np.concatenate([corners, np.minimum(corners + extents, [width, height])], 1)


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_attention_equals_the_formula(temperature):
    features = np.random.default_rng().normal(size=(2, 3, 4, 5))
    for ours, theirs in zip(
        attention_maps(torch.from_numpy(features), temperature), literal_attention(features, temperature)
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9)


@pytest.mark.parametrize("stride", [4, 16, 64])
def test_weights_equal_a_loop_over_boxes_and_cells(stride):
    height, width = 96, 128
    size = (math.ceil(height / stride), math.ceil(width / stride))
    boxes = [random_boxes(number, height, width) for number in (5, 0, 1)]
    ours = focal_weights([torch.from_numpy(x).float() for x in boxes], size, stride)
    for own, theirs in zip(ours, literal_weights([x.astype(np.float32) for x in boxes], size, stride)):
        np.testing.assert_allclose(own[:, 0].numpy(), theirs, rtol=1e-6)
    assert ours[0][1].sum() == 0 and ours[1][1].sum() == pytest.approx(1)


def test_no_background_where_a_box_is_the_image():
    foreground, background = focal_weights([torch.tensor([[0.0, 0.0, 64.0, 64.0]])], (4, 4), 16)
    assert (foreground > 0).all() and (background == 0).all()


def test_losses_equal_the_formula():
    rng = np.random.default_rng()
    student, teacher = rng.normal(size=(2, 2, 3, 6, 8))
    masks = literal_weights([random_boxes(3, 96, 128), random_boxes(0, 96, 128)], (6, 8), 16)
    spatial, channel = literal_attention(teacher, 0.5)
    own_spatial, own_channel = literal_attention(student, 0.5)
    weighted = (student - teacher) ** 2 * spatial[:, None] * channel[:, :, None, None]
    expected = [(weighted * mask[:, None]).sum() / 2 for mask in masks]
    expected.append((np.abs(own_spatial - spatial).sum() + np.abs(own_channel - channel).sum()) / 2)
    got = focal_losses(
        *(torch.from_numpy(x) for x in (student, teacher)), *(torch.from_numpy(m)[:, None] for m in masks)
    )
    np.testing.assert_allclose([x.item() for x in got], expected, rtol=1e-9)


def test_gradient_is_that_of_finite_differences():
    student, teacher = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64)
    masks = focal_weights([torch.tensor([[3.0, 3.0, 30.0, 40.0]])], (4, 5), 16)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_losses(x, teacher, *(m.double() for m in masks)), student)

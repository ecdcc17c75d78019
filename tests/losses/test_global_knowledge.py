"""The formulas of robust distillation against literal loops over boxes, cells and classes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from distill.losses import (
    box_levels,
    box_mask,
    box_means,
    global_knowledge_loss,
    local_knowledge_loss,
    prototype_robustness,
    prototype_similarity,
)


def random_boxes(n, height, width):
    """Boxes of which some are tiny and some leave the image."""
    corners = torch.rand(n, 2, dtype=torch.float64) * torch.tensor([width, height]) * 1.1 - 5
    extents = torch.rand(n, 2, dtype=torch.float64) ** 3 * torch.tensor([width, height])
    return torch.cat([corners, corners + extents], 1)


def literal_cells(box, height, width, stride):
    x0, y0, x1, y1 = (math.floor(v / stride) for v in box)
    columns = range(min(max(x0, 0), width - 1), min(max(x1, 0), width - 1) + 1)
    rows = range(min(max(y0, 0), height - 1), min(max(y1, 0), height - 1) + 1)
    return [(y, x) for y in rows for x in columns]


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_box_means_equal_a_loop_over_boxes_and_cells(stride):
    height, width = 96 // stride, 160 // stride
    features = torch.randn(3, 5, height, width, dtype=torch.float64)
    boxes = [random_boxes(12, 96, 160), torch.zeros(0, 4, dtype=torch.float64), random_boxes(5, 96, 160)]
    expected = []
    for image, corners in zip(features.numpy(), boxes):
        for box in corners.tolist():
            cells = literal_cells(box, height, width, stride)
            expected.append(np.mean([image[:, y, x] for y, x in cells], axis=0))
    means = box_means(features, boxes, stride)
    assert means.shape == (17, 5)
    np.testing.assert_allclose(means.numpy(), np.array(expected), rtol=1e-9, atol=1e-12)


def test_box_means_are_exact_enough_in_float32_for_a_cell_of_a_large_map():
    features = 50 + torch.rand(1, 2, 200, 334)
    boxes = torch.tensor([[1320.0, 780.0, 1321.0, 781.0], [0.0, 0.0, 1335.0, 799.0]])
    means = box_means(features, [boxes], 4)
    torch.testing.assert_close(means[0], features[0, :, 195, 330], rtol=0, atol=2e-3)
    torch.testing.assert_close(means[1], features.double().mean((0, 2, 3)).float(), rtol=1e-5, atol=0)


def test_box_means_pass_the_gradient_to_the_cells():
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    boxes = [random_boxes(4, 48, 56), random_boxes(2, 48, 56)]
    assert torch.autograd.gradcheck(lambda x: box_means(x, boxes, 8), features)


def test_box_levels_equal_the_formula():
    sides = [1.0, 55.9, 56.0, 110.9, 111.1, 222.0, 223.5, 900.0, 5000.0]  # a side counts one pixel more
    boxes = torch.tensor([[3.0, 4.0, 3.0 + s, 4.0 + s] for s in sides] + [[5.0, 5.0, 5.0, 9.0]])
    expected = [min(max(math.floor(math.log2((s + 1) / 56)), 0), 3) for s in sides] + [0]
    assert box_levels(boxes, 4).tolist() == expected == [0, 0, 0, 0, 1, 1, 2, 3, 3, 0]


def literal_mask_cells(box, height, width, stride):
    """The published cells, ends exclusive; a box that spans none in a direction has its first cell there."""
    x0, y0, x1, y1 = (math.floor(v / stride) for v in box)
    first = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    end = max(min(max(x1, 0), width), first[0] + 1), max(min(max(y1, 0), height), first[1] + 1)
    return [(y, x) for y in range(first[1], end[1]) for x in range(first[0], end[0])]


def test_box_mask_leaves_the_last_cell_out():
    boxes = [torch.tensor([[8.0, 16.0, 31.0, 40.0], [49.0, 0.0, 50.0, 30.0], [100.0, 60.0, 999.0, 999.0]])]
    mask = box_mask(boxes, [torch.tensor([0.5, 0.25, 1.0])], (12, 20), 8)[0, 0]
    expected = torch.full((12, 20), -1.0)
    expected[2:5, 1:3] = 0.5
    expected[0:3, 6:7] = 0.25  # narrower than a cell
    expected[7:12, 12:20] = 1.0  # up to the border
    assert torch.equal(mask, expected)


def test_box_mask_paints_the_larger_value_where_boxes_overlap():
    boxes = [random_boxes(9, 96, 160), torch.zeros(0, 4)]
    values = [torch.rand(9), torch.zeros(0)]
    mask = box_mask(boxes, values, (12, 20), 8)
    expected = np.full((2, 1, 12, 20), -1.0)
    for box, value in zip(boxes[0].tolist(), values[0].tolist()):
        for y, x in literal_mask_cells(box, 12, 20, 8):
            expected[0, 0, y, x] = max(expected[0, 0, y, x], value)
    np.testing.assert_allclose(mask.numpy(), expected, rtol=1e-6)


def random_similarities(n=20, p=9):
    return (torch.rand(n, p, dtype=torch.float64) * 2 - 1 for _ in range(2))


def test_similarity_is_the_cosine():
    features, prototypes = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    features[2] = 0
    expected = [
        [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if np.linalg.norm(a) else 0.0 for b in prototypes.numpy()]
        for a in features.numpy()
    ]
    np.testing.assert_allclose(prototype_similarity(features, prototypes).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_robustness_equals_the_literal_formula():
    student, teacher = random_similarities()
    labels, prototype_labels = torch.randint(5, (20,)), torch.randint(4, (9,))
    got = prototype_robustness(student.requires_grad_(), teacher, labels, prototype_labels)
    assert not got.requires_grad
    for n, label in enumerate(labels.tolist()):
        own = [p for p in range(9) if prototype_labels[p] == label]
        best = [max(side[n, p].item() for p in own) if own else None for side in (student, teacher)]
        expected = max(0.0, 1 - abs(best[0] - best[1])) if own else 0.0
        assert got[n].item() == pytest.approx(expected, abs=1e-12)


def test_robustness_without_any_prototype_is_zero():
    got = prototype_robustness(torch.zeros(3, 0), torch.zeros(3, 0), torch.arange(3), torch.zeros(0).long())
    assert got.tolist() == [0, 0, 0]


def test_global_loss_equals_the_literal_formula():
    student, teacher = random_similarities()
    robustness = torch.rand(20, dtype=torch.float64)
    terms = []
    for n in range(20):
        for p in range(9):
            d = abs(student[n, p].item() - teacher[n, p].item()) * robustness[n].item()
            terms.append(d * d / 2 if d < 1 else d - 0.5)
    assert global_knowledge_loss(student, teacher, robustness).item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_local_loss_equals_the_literal_formula():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.where(torch.rand(2, 1, 4, 5) < 0.5, torch.rand(2, 1, 4, 5), -1.0)
    sums = {"in": 0.0, "out": 0.0}
    norms = {"in": 0.0, "out": 0.0}
    for n, c, y, x in np.ndindex(2, 3, 4, 5):
        m = mask[n, 0, y, x].item()
        part, weight = ("in", m) if m >= 0 else ("out", 1.0)
        sums[part] += weight * (student[n, c, y, x] - teacher[n, c, y, x]).item() ** 2
        norms[part] += weight
    for given, weights in (((3.0, 0.7), (3.0, 0.7)), ((), (1.0, 4.0))):  # published: inside times 1, outside times 4
        expected = sum(w * sums[k] / max(2 * norms[k], 1) for k, w in zip(("in", "out"), weights))
        assert local_knowledge_loss(student, teacher, mask, *given).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_local_loss_with_an_empty_part_is_finite(value):
    loss = local_knowledge_loss(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.full((1, 1, 3, 3), value))
    assert loss.item() == pytest.approx({-1.0: 2.0, 0.0: 0.0, 1.0: 0.5}[value])


def test_local_loss_divides_by_twice_the_mask_or_one():
    mask = torch.full((1, 1, 3, 3), -1.0)
    for value, norm in ((0.3, 2 * 2 * 0.3), (0.1, 1.0)):  # a cell of two channels: 1.2, and 0.4, which counts as 1
        mask[0, 0, 1, 1] = value
        loss = local_knowledge_loss(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), mask, 1.0, 0.0)
        assert loss.item() == pytest.approx(2 * value / norm)


def test_nothing_to_compare_is_zero_with_a_gradient():
    none = nn.Parameter(torch.zeros(0, 4))
    assert global_knowledge_loss(none, torch.zeros(0, 4), torch.zeros(0)).item() == 0
    assert box_means(torch.zeros(1, 3, 4, 4), [torch.zeros(0, 4)], 8).shape == (0, 3)


def test_half_precision_is_widened():
    features = torch.rand(1, 2, 8, 8).half()
    assert box_means(features, [torch.tensor([[0.0, 0.0, 20.0, 20.0]])], 4).dtype == torch.float32
    assert local_knowledge_loss(features, features, torch.ones(1, 1, 8, 8)).dtype == torch.float32

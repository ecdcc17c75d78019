"""CrossKD's losses against literal transcriptions in numpy."""

import numpy as np
import pytest
import torch

from distill.losses import align_scale, cross_box_loss, cross_class_loss


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_class_loss_equals_the_literal_formula():
    cross, teacher = torch.randn(2, 2, 7, 3, dtype=torch.float64) * 2
    p, t = sigmoid(cross.numpy()), sigmoid(teacher.numpy())
    expected = (np.abs(t - p) ** 1.5 * -(t * np.log(p) + (1 - t) * np.log(1 - p))).sum()
    assert cross_class_loss(cross, teacher, 1.5).item() == pytest.approx(expected, rel=1e-9)


def test_the_scale_is_aligned_by_the_literal_formula():
    student = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 7, 5, dtype=torch.float64) * 3 + 1
    expected = np.empty(student.shape)
    for channel in range(3):
        own, given = (x.detach().numpy()[:, channel] for x in (student, teacher))
        shared, given = own[:, :, :5], given[:, :4]  # the cells that both have
        standardised = (own - shared.mean()) / (shared.std(ddof=1) + 1e-6)
        expected[:, channel] = standardised * given.std(ddof=1) + given.mean()
    aligned = align_scale(student, teacher)
    np.testing.assert_allclose(aligned.detach().numpy(), expected, rtol=1e-9)
    aligned.square().sum().backward()
    assert student.grad.abs().sum() > 0


def test_of_a_single_cell_the_teachers_is_taken():
    student, teacher = torch.randn(2, 1, 3, 1, 1)
    torch.testing.assert_close(align_scale(student, teacher), teacher)


def giou(a, b):
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union - (hull - union) / hull


def test_the_box_loss_equals_the_literal_formula():
    corners = torch.rand(2, 2, 7, 2, dtype=torch.float64) * 20
    cross, teacher = torch.cat([corners, corners + 1 + torch.rand(2, 2, 7, 2, dtype=torch.float64) * 20], 3)
    logits = torch.randn(2, 7, 3, dtype=torch.float64)
    weights = sigmoid(logits.numpy()).max(2)
    expected = sum(
        weights[n, r] * (1 - giou(cross[n, r].tolist(), teacher[n, r].tolist())) for n in range(2) for r in range(7)
    )
    assert cross_box_loss(cross, teacher, logits).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_aligned_scale_is_that_of_the_whole_formula():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: align_scale(x, teacher), student.requires_grad_())

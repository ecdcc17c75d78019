"""Distillation of classifications against literal transcriptions in numpy."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from distill.losses import box_overlap, decoupled_divergence, quality_focal_loss, soft_label_divergence


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_soft_labels_equal_the_literal_formula():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64) * 3
    expected = [2.5**2 * kl(softmax(t.numpy() / 2.5), softmax(s.numpy() / 2.5)) for s, t in zip(student, teacher)]
    torch.testing.assert_close(soft_label_divergence(student, teacher, 2.5), torch.tensor(expected).double())


def test_decoupled_divergence_equals_the_literal_formula():
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64) * 3
    student.requires_grad_()
    labels = torch.randint(5, (7,))
    expected = []
    for s, t, label in zip(student.detach().numpy(), teacher.numpy(), labels.tolist()):
        p, q = softmax(t / 1.7), softmax(s / 1.7)
        either = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = kl(softmax(np.delete(t, label) / 1.7), softmax(np.delete(s, label) / 1.7))
        expected.append((0.8 * either + 3.0 * others) * 1.7**2)
    result = decoupled_divergence(student, teacher, labels, 0.8, 3.0, 1.7)
    torch.testing.assert_close(result.detach(), torch.tensor(expected).double())
    assert torch.autograd.gradcheck(lambda x: decoupled_divergence(x, teacher, labels, 0.8, 3.0, 1.7), (student,))


def test_decoupled_parts_make_up_the_soft_labels():
    # arXiv 2203.08679, equation 6: KD = TCKD + (1 - p_true) NCKD
    student, teacher = torch.randn(2, 9, 4, dtype=torch.float64)
    labels = torch.randint(4, (9,))
    parts = [decoupled_divergence(student, teacher, labels, *factors) for factors in ((1.0, 0.0), (0.0, 1.0))]
    true = teacher.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(parts[0] + (1 - true) * parts[1], soft_label_divergence(student, teacher))


def test_decoupled_divergence_of_one_other_class_is_that_of_either():
    student, teacher = torch.randn(2, 5, 2, dtype=torch.float64)
    result = decoupled_divergence(student, teacher, torch.randint(2, (5,)), 1.0, 7.0)
    torch.testing.assert_close(result, soft_label_divergence(student, teacher))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_loss_equals_the_literal_formula(beta):
    student, scores = torch.randn(4, 3, dtype=torch.float64) * 2, torch.rand(4, 3, dtype=torch.float64)
    p, t = 1 / (1 + np.exp(-student.numpy())), scores.numpy()
    expected = np.abs(t - p) ** beta * -(t * np.log(p) + (1 - t) * np.log(1 - p))
    torch.testing.assert_close(quality_focal_loss(student, scores, beta), torch.from_numpy(expected))


def test_box_overlap_is_that_of_detectron2():
    corners = torch.rand(2, 30, 2, dtype=torch.float64) * 20
    first, second = torch.cat([corners, corners + torch.rand(2, 30, 2, dtype=torch.float64) * 20], 2)
    expected = pairwise_iou(Boxes(first), Boxes(second)).diagonal()
    assert (expected > 0).any()
    torch.testing.assert_close(box_overlap(first, second).float(), expected.float())
    empty = torch.zeros(1, 4, requires_grad=True)
    box_overlap(empty, torch.zeros(1, 4)).sum().backward()
    assert torch.isfinite(empty.grad).all()


def test_half_precision_is_widened():
    x = torch.randn(3, 4).half()
    assert (
        soft_label_divergence(x, x).dtype == torch.float32 and quality_focal_loss(x, x.sigmoid()).dtype == torch.float32
    )


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_gradient_of_the_quality_focal_loss_is_that_of_the_whole_formula(beta):
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, teacher.sigmoid(), beta), student.requires_grad_())

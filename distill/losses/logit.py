"""Distillation of classifications: soft labels (Hinton et al., arXiv 1503.02531), decoupled ones (DKD: Zhao et al.,
CVPR 2022, arXiv 2203.08679), and quality focal loss (Li et al., NeurIPS 2020, arXiv 2006.04388) with the teacher's
scores, as in BCKD (Yang et al., ICCV 2023, arXiv 2308.14286) and CrossKD (Wang et al., CVPR 2024, arXiv 2306.11369)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32


@in_float32
def soft_label_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² Σ_k p_k (log p_k - log q_k), p = softmax(teacher / T), q = softmax(student / T), of each box.

    arXiv 1503.02531, section 2, with the teacher's entropy taken off.

    Args:
        student: ``Tensor[R, K]``, logits.
        teacher: ``Tensor[R, K]``, logits of the same boxes.
        temperature: T.

    Returns:
        ``Tensor[R]``.
    """
    logs = [(x / temperature).log_softmax(1) for x in (student, teacher)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1) * temperature**2


@in_float32
def decoupled_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0
) -> Tensor:
    """T² (α TCKD + β NCKD) of each box: the divergence of "the true class or another", and that among the others.

    arXiv 2203.08679, equation 7.

    Args:
        student: ``Tensor[R, K]``, logits, K of 2 or more.
        teacher: ``Tensor[R, K]``, logits of the same boxes.
        labels: ``LongTensor[R]``, the true classes.
        alpha: factor of the first part.
        beta: factor of the second part.
        temperature: T.

    Returns:
        ``Tensor[R]``.
    """
    is_true = F.one_hot(labels, student.shape[1]).bool()
    either, others = [], []
    for logits in (student, teacher):
        logs = (logits / temperature).log_softmax(1)
        rest = logs.masked_fill(is_true, -torch.inf)
        true = logs.masked_fill(~is_true, 0.0).sum(1)
        either.append(torch.stack([true, rest.logsumexp(1)], 1))
        others.append(rest.masked_fill(is_true, torch.finfo(logs.dtype).min).log_softmax(1).masked_fill(is_true, 0.0))
    target = F.kl_div(*either, reduction="none", log_target=True).sum(1)
    # the true class counts e^0 (0 - 0) = 0
    rest = F.kl_div(*others, reduction="none", log_target=True).sum(1)
    return (alpha * target + beta * rest) * temperature**2


@in_float32
def quality_focal_loss(student: Tensor, scores: Tensor, beta: float = 1.0) -> Tensor:
    """|t - σ(s)|^β BCE(σ(s), t), element by element.

    arXiv 2006.04388, equation 2; β = 1 is arXiv 2308.14286's binary classification distillation.

    Args:
        student: a tensor of logits.
        scores: t, the teacher's scores, from 0 to 1, of the same shape.
        beta: β.

    Returns:
        A tensor of the same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(student, scores, reduction="none")
    return (scores - student.sigmoid()).abs().pow(beta) * entropy


@in_float32
def box_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes, pair by pair.

    Args:
        first: ``Tensor[..., 4]``, corners.
        second: a tensor of the same shape.

    Returns:
        ``Tensor[...]``, from 0 to 1; 0 where both boxes are empty.
    """
    corners = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (corners[1] - corners[0]).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (first, second)]
    return shared / (sum(areas) - shared).clamp(min=1e-7)

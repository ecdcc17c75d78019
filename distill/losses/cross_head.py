"""Cross-head distillation (CrossKD): Wang, Chen, Zheng, Li, Cheng, Hou, CVPR 2024, arXiv 2306.11369."""

import torch
from fvcore.nn import giou_loss
from torch import Tensor

from .logit import quality_focal_loss
from .precision import in_float32


@in_float32
def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of the student's features the mean and the standard deviation of the teacher's, both taken in
    the cells that both sides have.

    As the published code of arXiv 2306.11369 has it; the paper does not mention it.

    Args:
        student: ``Tensor[N, C, H, W]``.
        teacher: ``Tensor[N, C, H', W']``.

    Returns:
        ``Tensor[N, C, H, W]``. Means and (sample) standard deviations are over images and cells.
    """
    height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:]))
    (own_std, own_mean), (std, mean) = (_statistics(x[:, :, :height, :width]) for x in (student, teacher))
    return (student - own_mean) / (own_std + 1e-6) * std + mean


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    number = features.numel() // features.shape[1]
    # a single cell has no sample deviation
    return torch.std_mean(features, (0, 2, 3), correction=min(1, number - 1), keepdim=True)


@in_float32
def cross_class_loss(cross: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss of the cross-head classification, the teacher's scores as targets, summed.

    arXiv 2306.11369, equation 5, with S = 1 everywhere.

    Args:
        cross: ``Tensor[N, R, K]``, logits of the teacher's head on the student's features.
        teacher: ``Tensor[N, R, K]``, its logits on its own.
        beta: see :func:`distill.losses.quality_focal_loss`.

    Returns:
        ``Tensor[]``, to be divided by the number of positive anchors.
    """
    return quality_focal_loss(cross, teacher.sigmoid(), beta).sum()


@in_float32
def cross_box_loss(cross: Tensor, teacher: Tensor, logits: Tensor) -> Tensor:
    """1 - GIoU of the cross-head boxes and the teacher's, times the teacher's best score there, summed.

    arXiv 2306.11369, equation 5, with the scores as S.

    Args:
        cross: ``Tensor[N, R, 4]``, corners of the boxes of the teacher's head on the student's features.
        teacher: ``Tensor[N, R, 4]``, its boxes on its own.
        logits: ``Tensor[N, R, K]``, the teacher's.

    Returns:
        ``Tensor[]``, to be divided by the number of positive anchors.
    """
    weights = logits.amax(2).sigmoid().flatten()
    return (giou_loss(cross.flatten(0, 1), teacher.flatten(0, 1)) * weights).sum()

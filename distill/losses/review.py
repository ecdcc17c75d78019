"""Formulas of knowledge review (Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32
from .pyramid import check_pyramids


@in_float32
def hierarchical_context_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pool_sizes: Sequence[int] = (4, 2, 1)
) -> Tensor:
    """Hierarchical context loss (HCL): squared error of two feature pyramids at several scales of context.

    Each level is compared at its own size (weight 1) and average-pooled to each of ``pool_sizes`` that is smaller
    than its height, the weight halving from one used size to the next; the weighted mean is the level's loss, and
    the levels are summed. arXiv 2104.09044, section 3.4.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: tensors of the same shapes.
        pool_sizes: heights (and widths) to pool to, in descending order.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the numbers of levels or the shapes of a level differ, or there is no level.
    """
    check_pyramids(student, teacher)
    total = 0.0
    for student_level, teacher_level in zip(student, teacher):
        # Pooling is linear: the difference of the pooled maps is the pooled difference.
        difference = student_level - teacher_level
        loss, weight, weights = difference.square().mean(), 1.0, 1.0
        for size in pool_sizes:
            if size >= difference.shape[-2]:
                continue
            weight /= 2
            loss = loss + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
            weights += weight
        total = total + loss / weights
    return total

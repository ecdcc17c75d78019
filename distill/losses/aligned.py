"""The loss of aligned distillation: Qi, Kuen, Gu et al., CVPR 2021, arXiv 2109.04875."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32
from .pyramid import check_pyramids


@in_float32
def aligned_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Absolute difference of two pyramids: the mean over each level, summed over the levels.

    arXiv 2109.04875, section 3.3.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: tensors of the same shapes.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the shapes differ, or there is no level.
    """
    check_pyramids(student, teacher)
    return torch.stack([F.l1_loss(x, y) for x, y in zip(student, teacher)]).sum()

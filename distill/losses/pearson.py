"""Pearson-correlation distillation (PKD): Cao, Zhang, Gao, Cheng, Zeng, Guo, Zhang, NeurIPS 2022, arXiv 2207.02039."""

import torch
from torch import Tensor

from .precision import in_float32


@in_float32
def pearson_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 minus the correlation of the two maps, averaged over channels.

    Both are standardised per channel over batch and space, then compared by their mean squared error / 2. A channel
    that deviates by less than 1e-6 counts as 0: it would have a gradient of a million. arXiv 2207.02039, equation 4.

    Args:
        student: ``Tensor[N, C, H, W]``.
        teacher: a tensor of the same shape.
        weights: ``Tensor[N, 1, H, W]``, not negative; cells count so much in all averages over batch and space.

    Returns:
        ``Tensor[]``, a scalar.
    """
    weights = torch.ones_like(teacher[:, :1]) if weights is None else weights
    weights = weights / weights.sum().clamp(min=1e-6)

    def average(x: Tensor) -> Tensor:
        return (x * weights).sum((0, 2, 3), keepdim=True)

    # 1e-6 is added to the deviation, not inside its root, where it would drown one of 0.001
    standardized = []
    for x in (student - average(student), teacher - average(teacher)):
        deviation = average(x.square()).clamp(min=1e-14).sqrt()
        standardized.append(torch.where(deviation > 1e-6, x / (deviation + 1e-6), 0.0))
    return average((standardized[0] - standardized[1]).square()).mean() / 2

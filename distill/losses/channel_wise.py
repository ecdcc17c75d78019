"""Channel-wise knowledge distillation (CWD): Shu, Liu, Gao, Yan, Shen, ICCV 2021, arXiv 2011.13256."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32
from .pyramid import check_pyramids


@in_float32
def channel_wise_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of channels, each as a distribution over the cells, summed over the levels.

    T² Σ_i φ(t_i) log(φ(t_i) / φ(s_i)), φ the softmax of a channel's map divided by T, averaged over channels and
    images. arXiv 2011.13256, equations 4 and 5.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: tensors of the same shapes.
        temperature: T; the larger, the more cells count.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the numbers of levels or the shapes of a level differ, or there is no level.
    """
    check_pyramids(student, teacher)
    losses = []
    for x, y in zip(student, teacher):
        logs = [(side.flatten(2) / temperature).log_softmax(2) for side in (x, y)]
        divergence = F.kl_div(*logs, reduction="sum", log_target=True)
        losses.append(divergence * temperature**2 / (x.shape[0] * x.shape[1]))
    return torch.stack(losses).sum()

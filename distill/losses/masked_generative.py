"""Masked generative distillation (MGD): Yang, Li, Shao, Shi, Yuan, Yuan, ECCV 2022, arXiv 2205.01529."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import in_float32
from .pyramid import check_pyramids


@in_float32
def generation_loss(generated: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared difference, summed over channels and cells, divided by the number of images; the levels are summed.

    arXiv 2205.01529, equation 3.

    Args:
        generated: a ``Tensor[N, C, H, W]`` for each level, made from the student's masked features.
        teacher: tensors of the same shapes.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the numbers of levels or the shapes of a level differ, or there is no level.
    """
    check_pyramids(generated, teacher)
    return torch.stack([(x - y).square().sum() / len(x) for x, y in zip(generated, teacher)]).sum()


def random_cells(features: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Chooses the cells that stay: each is masked, in all channels, with a probability of ``ratio``.

    Args:
        features: ``Tensor[N, C, H, W]``.
        ratio: from 0 to 1.
        generator: of random numbers, on the features' device; by default torch's own.

    Returns:
        ``Tensor[N, 1, H, W]``: 0 where a cell is masked, 1 elsewhere. arXiv 2205.01529, equation 2.
    """
    number, _, height, width = features.shape
    drawn = torch.rand(number, 1, height, width, device=features.device, generator=generator)
    return (drawn >= ratio).to(features.dtype)

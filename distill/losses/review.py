"""Formulas of knowledge review (Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044)."""

import functools
from collections.abc import Sequence

import torch
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
        sizes = [size for size in pool_sizes if size < difference.shape[-2]]
        for pooled in _pool(difference, sizes):
            weight /= 2
            loss = loss + weight * pooled.square().mean()
            weights += weight
        total = total + loss / weights
    return total


def _pool(maps: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Adaptive average pooling to all sizes at once, by one matrix product over columns and one over rows: torch's own
    pooling works on one output cell after the other."""
    if not sizes:
        return []
    rows, columns = (_pooling_matrix(length, tuple(sizes), maps.dtype, maps.device) for length in maps.shape[-2:])
    blocks = (rows @ (maps @ columns.T)).split(list(sizes), -2)
    return [block.split(list(sizes), -1)[index] for index, block in enumerate(blocks)]


@functools.lru_cache(maxsize=512)  # images have few sizes, and to a GPU these are more steps than the loss itself
@torch.inference_mode(False)  # what is kept may be needed in training
def _pooling_matrix(length: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``Tensor[sum of sizes, length]``: output i of a size s is the mean of the cells from floor(i L / s) to
    ceil((i + 1) L / s)."""
    cells, matrices = torch.arange(length, device=device), []
    for size in sizes:
        outputs = torch.arange(size, device=device)[:, None]
        first, end = outputs * length // size, ((outputs + 1) * length + size - 1) // size
        inside = ((cells >= first) & (cells < end)).to(dtype)
        matrices.append(inside / inside.sum(1, keepdim=True))
    return torch.cat(matrices)

"""Focal and global distillation (FGD): Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, CVPR 2022, arXiv 2111.11837."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .global_knowledge import _between
from .precision import in_float32


@in_float32
def attention_maps(features: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Where and in which channels a level is large, as distributions times their number of places.

    A^S = H W softmax(mean_c |F| / T) over the cells, A^C = C softmax(mean_hw |F| / T) over the channels. arXiv
    2111.11837, equations 5 to 8.

    Args:
        features: ``Tensor[N, C, H, W]``.
        temperature: T.

    Returns:
        ``Tensor[N, H, W]`` and ``Tensor[N, C]``.
    """
    size = features.abs()
    spatial = (size.mean(1).flatten(1) / temperature).softmax(1) * features[0, 0].numel()
    channel = (size.mean((2, 3)) / temperature).softmax(1) * features.shape[1]
    return spatial.view(len(features), *features.shape[2:]), channel


def focal_weights(boxes: Sequence[Tensor], size: tuple[int, int], stride: float) -> tuple[Tensor, Tensor]:
    """How much each cell counts as foreground and as background.

    A cell of a box counts 1 / (the box's number of cells), where boxes overlap that of the smallest; a box's cells are
    those from floor(x0 / stride) to ceil(x1 / stride), both included, y alike. All other cells of an image share a
    weight of 1. arXiv 2111.11837, equations 2 to 4.

    Args:
        boxes: for each image a ``Tensor[M, 4]``, corners in pixels.
        size: height and width of the level, in cells.
        stride: of the level, in pixels.

    Returns:
        Foreground and background, ``Tensor[N, 1, H, W]`` each.
    """
    maps = []
    for corners in boxes:
        scaled = corners.float() / stride
        first, last = scaled[:, :2].floor(), scaled[:, 2:].ceil()
        share = 1 / (last - first + 1).prod(1)
        columns, rows = (_between(first[:, i], last[:, i], size[1 - i]) for i in (0, 1))
        painted = (rows[:, :, None] & columns[:, None, :]) * share[:, None, None]
        maps.append(painted.amax(0) if len(corners) else painted.new_zeros(size))
    foreground = torch.stack(maps)[:, None]
    outside = (foreground == 0).to(foreground.dtype)
    return foreground, outside / outside.sum((2, 3), keepdim=True).clamp(min=1)


@in_float32
def focal_losses(
    student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor, temperature: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """The focal part of a level, before its factors: Σ M A^S A^C (t - s)² by both masks, A of the teacher, and
    Σ |A^S_s - A^S_t| + Σ |A^C_s - A^C_t|, each divided by the number of images.

    arXiv 2111.11837, equations 9 and 10.

    Args:
        student: ``Tensor[N, C, H, W]``, adapted to the teacher's channels.
        teacher: a tensor of the same shape.
        foreground: ``Tensor[N, 1, H, W]``, see :func:`focal_weights`.
        background: a tensor of the same shape.
        temperature: of the attention maps.

    Returns:
        Foreground, background and attention loss, ``Tensor[]`` each.
    """
    own, (spatial, channel) = (attention_maps(x, temperature) for x in (student, teacher))
    number = len(student)
    errors = torch.einsum("nchw,nc->nhw", (student - teacher).square(), channel) * spatial
    parts = [(errors * mask[:, 0]).sum() / number for mask in (foreground, background)]
    attention = sum((x - y).abs().sum() for x, y in zip(own, (spatial, channel))) / number
    return parts[0], parts[1], attention

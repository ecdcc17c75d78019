"""Norms of the difference of features, the baselines of distillation, and which cells they count."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32
from .pyramid import check_pyramids

NORMS = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
REGIONS = ("all", "boxes", "gaussian")


@in_float32
def imitation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], norm: str = "l2", weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Difference of two pyramids, cell by cell: the weighted mean over a level, then the mean over the levels.

    With weights w, a level's loss is Σ w d / (C Σ w), d being |s - t|, (s - t)² or smooth l1 (β = 1); a level without
    weight counts as zero. l_p norms as compared in arXiv 2211.13133, section 4; weights inside boxes as in fine-grained
    imitation (Wang, Yuan, Zhang, Feng, CVPR 2019, arXiv 1906.03609), whose cells are chosen by anchors.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: tensors of the same shapes.
        norm: "l1", "l2" or "smooth_l1".
        weights: a ``Tensor[N, 1, H, W]`` for each level, not negative; None for 1 everywhere.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the shapes differ, there is no level, or ``norm`` is unknown.
    """
    check_pyramids(student, teacher)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    if weights is None:
        return torch.stack([NORMS[norm](x, y) for x, y in zip(student, teacher)]).mean()
    losses = []
    for x, y, weight in zip(student, teacher, weights, strict=True):
        difference = NORMS[norm](x, y, reduction="none")
        total = (x.shape[1] * weight.sum()).clamp(min=torch.finfo(difference.dtype).tiny)
        losses.append((difference * weight).sum() / total)
    return torch.stack(losses).mean()


def region_weights(boxes: Sequence[Tensor], size: tuple[int, int], stride: float, region: str) -> Tensor:
    """Weight of each cell of a level by the boxes of each image; where boxes overlap, the largest.

    "all" is 1 everywhere; "boxes" is 1 at cells that share some area with a box, so that every box has a cell;
    "gaussian" is exp(-(((u - cx) / w)² + ((v - cy) / h)²) · 8) at a cell's centre (u, v), a deviation of a quarter of
    the box's width w and height h (of one stride at least) around its centre (cx, cy).

    Args:
        boxes: for each image a ``Tensor[M, 4]``, corners x0, y0, x1, y1 in pixels.
        size: height and width of the level, in cells.
        stride: of the level, in pixels.
        region: "all", "boxes" or "gaussian".

    Returns:
        ``Tensor[N, 1, H, W]``, float32, from 0 to 1.

    Raises:
        ValueError: ``region`` is unknown.
    """
    if region not in REGIONS:
        raise ValueError(f"region is {region!r}, expected one of {', '.join(REGIONS)}")
    maps = []
    for corners in boxes:
        sides = []  # y, then x; both kinds of weight are a product over the two
        for axis, length in ((1, size[0]), (0, size[1])):
            low, high = corners[:, axis, None].float(), corners[:, axis + 2, None].float()
            cells = torch.arange(length, device=corners.device) * float(stride)
            if region == "all":
                sides.append(torch.ones(1, length, device=corners.device))
            elif region == "boxes":
                sides.append(((cells < high) & (cells + stride > low)).float())
            else:
                distances = cells + stride / 2 - (low + high) / 2
                sides.append(torch.exp(-8 * (distances / (high - low).clamp(min=stride)).square()))
        weights = sides[0][:, :, None] * sides[1][:, None, :]
        maps.append(weights.amax(0) if len(weights) else weights.new_zeros(size))
    return torch.stack(maps)[:, None]

"""Global knowledge: Tang, Zhang, Cheng et al., ECCV 2022, arXiv 2210.09022, section 3.3 (robust distillation, RDM)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_float32


@in_float32
def box_means(features: Tensor, boxes: Sequence[Tensor], stride: float) -> Tensor:
    """Averages a level over boxes: over the cells from floor(x0 / stride) to floor(x1 / stride) inclusive, y alike.

    The columns of all boxes are summed by one matrix product with their mask, the rows of each box by another: no loop
    over boxes, and no running sum over the map, whose rounding would drown a small box.

    Args:
        features: ``Tensor[N, C, H, W]``.
        boxes: for each image a ``Tensor[M, 4]``, corners x0, y0, x1, y1 in pixels. What lies outside is clipped; a box
            that lies outside as a whole is averaged over the nearest cells.
        stride: of the level, in pixels.

    Returns:
        ``Tensor[R, C]``, R counting the boxes of all images.
    """
    means = []
    for level, corners in zip(features, boxes, strict=True):
        (first_x, last_x), (first_y, last_y) = _cells(corners, level.shape[1:], stride)
        columns, rows = (
            _between(first, last, length).to(level.dtype)
            for first, last, length in ((first_x, last_x, level.shape[2]), (first_y, last_y, level.shape[1]))
        )
        sums = torch.einsum("chm,mh->mc", level @ columns.T, rows)
        count = (last_x - first_x + 1) * (last_y - first_y + 1)
        means.append(sums / count[:, None])
    return torch.cat(means)


def box_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """The level that a box belongs to by its size: floor(log2(sqrt((w + 1) (h + 1)) / 56 + 1e-6)), clamped.

    The extra pixel of each side is that of the published code.

    Args:
        boxes: ``Tensor[R, 4]``, corners in pixels.
        num_levels: how many levels there are.

    Returns:
        ``LongTensor[R]``: 0 for the finest.
    """
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    level = torch.log2(area.sqrt() / 56 + 1e-6).floor()
    return level.clamp(0, num_levels - 1).long()


def box_mask(boxes: Sequence[Tensor], values: Sequence[Tensor], size: tuple[int, int], stride: float) -> Tensor:
    """Paints each box's value over its cells; the larger value where boxes overlap.

    A box's cells are those from floor(x0 / stride) to floor(x1 / stride) exclusive, but at least one; y alike.

    Args:
        boxes: for each image a ``Tensor[M, 4]``, corners in pixels.
        values: for each image a ``Tensor[M]``; a box with -1 is left out, other values are not negative.
        size: height and width of the level, in cells.
        stride: of the level, in pixels.

    Returns:
        ``Tensor[N, 1, H, W]``, the value, and -1 in cells that no box touches.
    """
    masks = []
    for corners, value in zip(boxes, values, strict=True):
        cells = _cells(corners, size, stride, exclusive=True)
        inside = [_between(*ends, length) for ends, length in zip(cells[::-1], size)]
        painted = torch.where(inside[0][:, :, None] & inside[1][:, None, :], value[:, None, None].float(), -1.0)
        masks.append(painted.amax(0) if len(painted) else painted.new_full(size, -1.0))
    return torch.stack(masks)[:, None]


def _cells(
    corners: Tensor, size: tuple[int, int], stride: float, exclusive: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """First and last column, and first and last row, of each box; ``exclusive``: without the cell of its end, if it has
    another one."""
    cells = (corners / stride).floor().long()
    x0, y0 = (cells[:, i].clamp(0, size[1 - i] - 1) for i in (0, 1))
    x1, y1 = ((cells[:, 2 + i] - int(exclusive)).clamp(max=size[1 - i] - 1) for i in (0, 1))
    return (x0, x1.maximum(x0)), (y0, y1.maximum(y0))


def _between(first: Tensor, last: Tensor, length: int) -> Tensor:
    """``BoolTensor[M, length]``: which cells lie between the first and the last of each box."""
    cells = torch.arange(length, device=first.device)
    return (cells >= first[:, None]) & (cells <= last[:, None])


@in_float32
def prototype_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of each instance to each prototype of a level; 0 for a zero vector.

    Args:
        features: ``Tensor[N, D]``.
        prototypes: ``Tensor[P, D]``.

    Returns:
        ``Tensor[N, P]``.
    """
    return F.normalize(features) @ F.normalize(prototypes).T


@torch.no_grad()
@in_float32
def prototype_robustness(
    student_similarity: Tensor, teacher_similarity: Tensor, labels: Tensor, prototype_labels: Tensor
) -> Tensor:
    """How well both spaces agree on an instance: 1 - |best own-class cosine of the student - the same of the teacher|.

    Args:
        student_similarity: ``Tensor[N, P]``, cosines to the prototypes in the student's space.
        teacher_similarity: ``Tensor[N, P]``, the same in the teacher's space.
        labels: ``LongTensor[N]``, classes of the instances.
        prototype_labels: ``LongTensor[P]``, classes of the prototypes.

    Returns:
        ``Tensor[N]``, without gradient, from 0 to 1 (cosines further apart than 1 count as 0); 0 for a class without
        prototypes.
    """
    if not len(prototype_labels):
        return student_similarity.new_zeros(len(labels))
    own = labels[:, None] == prototype_labels
    best = [x.masked_fill(~own, -torch.inf).amax(1) for x in (student_similarity, teacher_similarity)]
    known = own.any(1)
    return torch.where(known, 1 - (best[0] - best[1]).abs(), 0.0).clamp(min=0)


@in_float32
def global_knowledge_loss(
    student_similarity: Tensor, teacher_similarity: Tensor, robustness: Tensor, known: Tensor | None = None
) -> Tensor:
    """Smooth l1 distance (β = 1, mean) of both sides' cosines, both times the instance's robustness.

    Args:
        student_similarity: ``Tensor[N, P]``.
        teacher_similarity: ``Tensor[N, P]``.
        robustness: ``Tensor[N]``.
        known: ``BoolTensor[N]``, which instances count; by default all.

    Returns:
        ``Tensor[]``, a scalar; 0 where there is nothing to compare.
    """
    if not student_similarity.numel():
        return student_similarity.sum()
    weight = robustness[:, None]
    if known is None:
        return F.smooth_l1_loss(student_similarity * weight, teacher_similarity * weight)
    # products instead of indexing, whose result has a size that the host would wait for
    counted = known[:, None].to(weight.dtype)
    distance = F.smooth_l1_loss(student_similarity * weight, teacher_similarity * weight, reduction="none")
    return (distance * counted).sum() / (counted.sum() * distance.shape[1]).clamp(min=1)


@in_float32
def local_knowledge_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, foreground_weight: float = 1.0, background_weight: float = 4.0
) -> Tensor:
    """Squared difference of a level's features, by robustness inside instances and by 1 outside.

    Each part is Σ m (s - t)² / max(2 Σ m, 1) over images, channels and cells, m its mask.

    Args:
        student: ``Tensor[N, C, H, W]``, adapted to the teacher's channels.
        teacher: ``Tensor[N, C, H, W]``.
        mask: ``Tensor[N, 1, H, W]``: the robustness, and -1 outside, as :func:`box_mask` returns it.
        foreground_weight: factor of the part inside.
        background_weight: factor of the part outside.

    Returns:
        ``Tensor[]``, a scalar.
    """
    errors = (student - teacher).square().sum(1, keepdim=True)
    total = 0.0
    for weight, part in ((foreground_weight, mask.clamp(min=0)), (background_weight, (mask < 0).to(errors.dtype))):
        norm = (2 * student.shape[1] * part.sum()).clamp(min=1)
        total = total + weight * (errors * part).sum() / norm
    return total

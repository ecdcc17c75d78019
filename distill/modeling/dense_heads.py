"""The two towers of Detectron2's dense heads (RetinaNet's, FCOS's), whole and in parts."""

from collections.abc import Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..errors import DistillError


def has_towers(head: nn.Module | None) -> bool:
    """Whether a head is one of Detectron2's own, of which parts can be run.

    Args:
        head: of any detector.
    """
    return type(head) is RetinaNetHead or type(head) is FCOSHead


def tower_convs(head: nn.Module) -> tuple[list[nn.Conv2d], list[nn.Conv2d]]:
    """The convolutions of the tower of classes and of that of boxes, the predicting one last.

    Args:
        head: with towers.
    """
    towers = ((head.cls_subnet, head.cls_score), (head.bbox_subnet, head.bbox_pred))
    return tuple([*(x for x in tower if isinstance(x, nn.Conv2d)), last] for tower, last in towers)


def check_towers(detector: nn.Module, num_convs: int, channels: int) -> None:
    """Checks that a dense detector's head has two towers that features can be taken from, or sent through.

    Args:
        detector: any detector.
        num_convs: how many convolutions each has at least, before the one that predicts.
        channels: what the last so many of them take.

    Raises:
        DistillError: it is otherwise.
    """
    name = type(detector).__name__
    head = getattr(detector, "head", None)
    if not has_towers(head):
        raise DistillError(
            f"{name} has no head with a tower of classes and one of boxes: Detectron2's RetinaNet and FCOS have."
        )
    for convs in tower_convs(head):
        if num_convs >= len(convs):
            raise DistillError(
                f"The last {num_convs} convolutions of the towers are asked for, before the one that predicts, and the "
                f"{name}'s head has {len(convs) - 1}."
            )
        if convs[-1 - num_convs].in_channels != channels:
            raise DistillError(
                f"The towers of the {name}'s head have {convs[-1 - num_convs].in_channels} channels and its features "
                f"{channels}: expected as many."
            )


def class_logits(head: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """The classification alone, where the head has towers.

    Args:
        head: of a dense detector.
        features: by level, ``Tensor[N, C, H, W]``.

    Returns:
        By level, ``Tensor[N, A K, H, W]``.
    """
    if has_towers(head):
        return [head.cls_score(head.cls_subnet(level)) for level in features]
    return head(features)[0]


def box_deltas(head: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """The boxes alone, where the head has towers.

    Args:
        head: of a dense detector.
        features: by level, ``Tensor[N, C, H, W]``.

    Returns:
        By level, ``Tensor[N, 4 A, H, W]``.
    """
    if has_towers(head):
        return [head.bbox_pred(head.bbox_subnet(level)) for level in features]
    return head(features)[1]


def start_towers(head: nn.Module, features: list[Tensor], num_convs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sends features through the first layers of both towers, up to an activation.

    Args:
        head: with towers.
        features: by level, ``Tensor[N, C, H, W]``.
        num_convs: how many convolutions of a tower are left, before the predicting one.

    Returns:
        For the tower of classes and for that of boxes, by level ``Tensor[N, C, H, W]``, not activated; the features
        themselves where all convolutions are left.
    """
    starts = [tower[: _cut(tower, num_convs, is_activated=False)] for tower in (head.cls_subnet, head.bbox_subnet)]
    return tuple([start(level) for level in features] for start in starts)


def finish_towers(
    head: nn.Module, classes: Sequence[Tensor], boxes: Sequence[Tensor], num_convs: int, is_activated: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Sends features through the last layers of both towers.

    Args:
        head: with towers.
        classes: for the tower of classes, by level ``Tensor[N, C, H, W]``.
        boxes: for the tower of boxes.
        num_convs: how many convolutions of a tower they go through, before the predicting one.
        is_activated: whether they are what these convolutions take, rather than what :func:`start_towers` returns.

    Returns:
        Logits, by level ``Tensor[N, A K, H, W]``, and deltas, ``Tensor[N, 4 A, H, W]``.
    """
    outputs = []
    ends = ((head.cls_subnet, head.cls_score, classes), (head.bbox_subnet, head.bbox_pred, boxes))
    for tower, predict, features in ends:
        end = tower[_cut(tower, num_convs, is_activated) :]
        outputs.append([predict(end(level)) for level in features])
    return tuple(outputs)


def tower_activations(head: nn.Module, num_convs: int) -> list[nn.Module]:
    """The activation before the last convolutions, of the tower of classes and of that of boxes.

    Args:
        head: with towers.
        num_convs: how many convolutions of a tower follow, before the predicting one.

    Returns:
        Two modules; none where no convolution precedes, or a tower has fewer than ``num_convs``.
    """
    towers = (head.cls_subnet, head.bbox_subnet)
    return [tower[cut] for tower in towers if (cut := _cut(tower, num_convs, False)) < _cut(tower, num_convs, True)]


def _cut(tower: nn.Sequential, num_convs: int, is_activated: bool) -> int:
    """Index of the first of the last so many convolutions, or of the activation before it."""
    starts = [i for i, layer in enumerate(tower) if isinstance(layer, nn.Conv2d)] + [len(tower)]
    start = starts[max(0, len(starts) - 1 - num_convs)]
    return start if is_activated else max(0, start - 1)


def logits_at(levels: Sequence[Tensor], rows: Sequence[Tensor], num_classes: int) -> Tensor:
    """Some anchors' logits; the others are not copied.

    Args:
        levels: ``Tensor[N, A K, H, W]`` each.
        rows: for each image a ``LongTensor[P]``, anchors in the order of Detectron2's dense heads.
        num_classes: K.

    Returns:
        ``Tensor[P', K]``, P' counting the rows of all images.
    """
    images = torch.cat([torch.full_like(own, index) for index, own in enumerate(rows)])
    wanted = torch.cat(list(rows))
    found, first = None, 0
    for level in levels:
        height, width = level.shape[2:]
        by_anchor = level.unflatten(1, (-1, num_classes))
        number = by_anchor.shape[1] * height * width
        inside = (wanted >= first) & (wanted < first + number)
        here = (wanted - first).clamp(0, number - 1)  # what is elsewhere is thrown away: no wait for the GPU
        cell, anchor = here // by_anchor.shape[1], here % by_anchor.shape[1]
        own = by_anchor[images, anchor, :, cell // width, cell % width]
        found = own if found is None else torch.where(inside[:, None], own, found)
        first += number
    return found


def corner_anchors(detector: nn.Module) -> Tensor:
    """What a dense detector's outputs stand for in the first 2 x 2 cells of each of its levels.

    Args:
        detector: a dense detector.

    Returns:
        ``Tensor[R, 4]``: the anchors, or the points as empty boxes, in pixels of the image as the detector sees it.
    """
    numbers = detector.anchor_generator.num_cell_anchors
    return decode_boxes(detector, [torch.zeros(1, 4 * number, 2, 2, device=detector.device) for number in numbers])[0]


def decode_boxes(detector: nn.Module, deltas: Sequence[Tensor]) -> Tensor:
    """The boxes of a dense detector's anchors (or points).

    Args:
        detector: a dense detector.
        deltas: by level, ``Tensor[N, 4 A, H, W]``.

    Returns:
        ``Tensor[N, R, 4]``, corners in pixels of the padded image as the detector sees it.
    """
    anchors = torch.cat([x.tensor for x in detector.anchor_generator(list(deltas))])
    flat = torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], 1).float()
    boxes = detector.box2box_transform.apply_deltas(flat.flatten(0, 1), anchors.repeat(len(flat), 1))
    return boxes.view_as(flat)

"""Which boxes or anchors have their classifications compared, and what both sides say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import DistillError
from ..modeling.views import DetectorView

INSTANCES = ("proposals", "ground_truth")

_SAME_ANCHORS = (
    "Give both the same anchors and levels (MODEL.ANCHOR_GENERATOR, IN_FEATURES), or leave the comparison of "
    "classifications out (LogitDistiller; DISTILL.GLOBAL.RESPONSE_ON False)."
)


@dataclass(frozen=True)
class PairedLogits:
    """The classifications of the same boxes or anchors by both sides.

    Attributes:
        student: ``Tensor[R, K]``, logits; of box heads that score it the last is the background's.
        teacher: a tensor of the same shape.
        labels: ``LongTensor[R]``, the true classes, columns of the logits.
        instances: ``LongTensor[R]``, the instance that each belongs to, counted over all images.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    instances: Tensor


def mean_over_processes(number: int | Tensor, device: torch.device) -> Tensor:
    """What a sum over boxes is divided by, so that several processes compute what one with all images would.

    Args:
        number: how many boxes this process has.
        device: of the result.

    Returns:
        ``Tensor[]``: the mean over the processes, but at least so much that all of them together have 1.
    """
    mean = torch.full((), float(number), device=device) if isinstance(number, int) else number.float()
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1:
        mean = mean.clone()
        dist.all_reduce(mean)
        mean = mean / count
    return mean.clamp(min=1 / count)


def instance_boxes(student: DetectorView, instances: str) -> tuple[list[Tensor], Tensor]:
    """The boxes that are compared, and their classes.

    Args:
        student: the student's view.
        instances: "proposals" (the sampled positive ones, where the student has a box head; else the annotations) or
            "ground_truth".

    Returns:
        For each image ``Tensor[M, 4]``, corners in pixels, and the classes of all images' boxes, ``LongTensor[R]``.
    """
    if instances == "proposals" and student.has_box_head:
        rows, sizes = _positive_rows(student.proposals, student.num_classes)
        boxes = torch.cat([x.proposal_boxes.tensor for x in student.proposals])[rows]
        return list(boxes.split(sizes)), torch.cat([x.gt_classes for x in student.proposals])[rows]
    truth = student.ground_truth
    return [x.gt_boxes.tensor for x in truth], torch.cat([x.gt_classes for x in truth])


def _positive_rows(proposals: Sequence[Instances], num_classes: int) -> tuple[Tensor, list[int]]:
    """Which of all images' proposals are positive, and how many each image has. The host waits once."""
    classes = torch.cat([x.gt_classes for x in proposals])
    positive = (classes >= 0) & (classes < num_classes)
    sizes = torch.stack([x.sum() for x in positive.split([len(x) for x in proposals])]).tolist()
    # the positive ones first, each kind in its order
    return positive.logical_not().to(torch.uint8).argsort(stable=True)[: sum(sizes)], sizes


def paired_logits(
    student: DetectorView,
    teacher: DetectorView,
    instances: str,
    boxes: Sequence[Tensor],
    labels: Tensor,
    class_map: Mapping[int, int] | None = None,
) -> PairedLogits:
    """What both sides' heads say of the same boxes or, if they are dense, of the anchors that belong to them.

    Args:
        student: the student's view.
        teacher: the teacher's view.
        instances: what :func:`instance_boxes` was called with.
        boxes: what it returned.
        labels: what it returned.
        class_map: by the student's class, the teacher's; others are left out. By default both have the same classes.

    Returns:
        The classifications of the boxes or anchors whose class both sides know.

    Raises:
        DistillError: student and teacher have different anchors.
    """
    if student.has_box_head:
        theirs = teacher.box_head([Boxes(x) for x in boxes])[0]
        if instances == "proposals":  # its own forward has been there, and a second one would move batch norms
            own = student.proposal_logits[_positive_rows(student.proposals, student.num_classes)[0]]
        else:
            own = student.box_head([Boxes(x) for x in boxes])[0]
        pairs = PairedLogits(own, theirs, labels, torch.arange(len(labels), device=labels.device))
    else:
        check_anchors(student, teacher)
        matches = student.match_anchors()
        own, theirs = (view.anchor_logits_at([anchors for anchors, _ in matches]) for view in (student, teacher))
        first = [0]
        for own_boxes in boxes:
            first.append(first[-1] + len(own_boxes))
        rows = torch.cat([truth + start for (_, truth), start in zip(matches, first)])
        pairs = PairedLogits(own, theirs, labels[rows], rows)
    has_background = student.scores_background and teacher.scores_background
    if class_map is not None:
        return _known(pairs, class_map, has_background)
    if student.has_box_head and not has_background:
        return replace(pairs, student=pairs.student[:, :-1], teacher=pairs.teacher[:, :-1])
    return pairs


def check_anchors(student: DetectorView, teacher: DetectorView) -> None:
    """Refuses dense detectors whose anchors do not lie on each other.

    Args:
        student: the student's view.
        teacher: the teacher's view.

    Raises:
        DistillError: their numbers differ.
    """
    if student.num_anchors != teacher.num_anchors:
        raise DistillError(
            f"The student has {student.num_anchors} anchors in this batch and the teacher {teacher.num_anchors}, so "
            f"their classifications cannot be compared. {_SAME_ANCHORS}"
        )


def check_corner_anchors(student: DetectorView, teacher: DetectorView) -> None:
    """Refuses dense detectors of as many anchors that mean other boxes. A GPU waits for it: call it once.

    Args:
        student: the student's view.
        teacher: the teacher's view.

    Raises:
        DistillError: an anchor or point differs by more than 1 % of its size, or half a pixel if that is more.
    """
    if not (student.is_dense and teacher.is_dense):
        return
    own, theirs = student.corner_anchors, teacher.corner_anchors
    tolerance = (0.01 * (theirs[:, 2:] - theirs[:, :2]).amax(1, keepdim=True)).clamp(min=0.5)  # points have no size
    if own.shape == theirs.shape and ((own - theirs).abs() <= tolerance).all():
        return
    raise DistillError(
        "The anchors of student and teacher differ in size, shape, order or stride, so what they say of one row is of "
        f"different boxes. {_SAME_ANCHORS}"
    )


def _known(pairs: PairedLogits, class_map: Mapping[int, int], has_background: bool) -> PairedLogits:
    """The boxes and the classes that both sides know."""
    device = pairs.labels.device
    background = [-1] if has_background else []
    own = torch.tensor([*class_map, *background], device=device)
    theirs = torch.tensor([*class_map.values(), *background], device=device)
    is_label = pairs.labels[:, None] == own
    rows = is_label.any(1).nonzero()[:, 0]
    return PairedLogits(
        pairs.student[rows][:, own],
        pairs.teacher[rows][:, theirs],
        is_label[rows].int().argmax(1),
        pairs.instances[rows],
    )


def check_classifications(
    student: DetectorView,
    teacher: DetectorView,
    class_map: Mapping[int, int] | None,
    what: str,
    otherwise: str,
    with_softmax: bool = True,
) -> None:
    """Refuses detectors whose classifications cannot be compared.

    Args:
        student: the student's view.
        teacher: the teacher's view.
        class_map: see :func:`paired_logits`.
        what: compares them, for the message.
        otherwise: what to do instead, for the message.
        with_softmax: whether classes are compared with each other, so that one alone says nothing.

    Raises:
        DistillError: they are of different families, or have different classes and no map, or there is one class.
    """
    differences = []
    for side, view in (("student", student), ("teacher", teacher)):
        if not (view.has_box_head or view.is_dense):
            differences.append(f"the {side} has no box head that takes boxes by themselves (C4 has none)")
    if not differences and student.has_box_head != teacher.has_box_head:
        kinds = ["boxes" if view.has_box_head else "anchors" for view in (student, teacher)]
        differences.append(f"the student classifies {kinds[0]} and the teacher {kinds[1]}")
    if class_map is None and student.num_classes != teacher.num_classes:
        differences.append(f"the student has {student.num_classes} classes and the teacher {teacher.num_classes}")
    if differences:
        raise DistillError(
            f"{what} compares classifications, but {' and '.join(differences)}. Use a teacher of the same family and "
            f"classes, say which classes are the same by DISTILL.CLASS_MAP, or {otherwise}."
        )
    for side, view, classes in (("student", student, class_map), ("teacher", teacher, (class_map or {}).values())):
        beyond = [index for index in classes or () if not 0 <= index < view.num_classes]
        if beyond:
            raise DistillError(
                f"DISTILL.CLASS_MAP names class {beyond[0]} of the {side}, which has {view.num_classes}: expected 0 to "
                f"{view.num_classes - 1}."
            )
    has_background = student.scores_background and teacher.scores_background
    if with_softmax and len(class_map or range(student.num_classes)) + has_background < 2:
        raise DistillError(
            f"{what} compares classes with each other, and there is one class only, without background: for RetinaNet "
            f"and FCOS choose BCKD, or {otherwise}."
        )

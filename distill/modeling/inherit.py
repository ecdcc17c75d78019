"""Which weights a student can take over from its teacher."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import DistillError

logger = logging.getLogger(__name__)

_COUNTER = ".num_batches_tracked"  # of a batch norm that trains; a frozen one has none


def inheritable_weights(
    student: nn.Module,
    teacher: nn.Module,
    prefixes: Sequence[str],
    scale: float = 1.0,
    flip_channels: bool = False,
) -> dict[str, Tensor]:
    """Finds the teacher's weights for the parts of the student that ``prefixes`` name.

    Args:
        student: the student.
        teacher: the teacher.
        prefixes: beginnings of weight names, such as "backbone.fpn_" or "roi_heads".
        scale: the size at which the student sees the images, relative to the teacher.
        flip_channels: whether one side's images are RGB and the other's BGR.

    Returns:
        The teacher's weights by name.

    Raises:
        DistillError: a prefix names nothing; a weight that one names is missing in the teacher or has another shape
            there; a head is named whose anchors are not the teacher's at the scale; or the first convolution is, and
            the images that it sees differ in the order of channels, in their mean or in their standard deviation.
    """
    own, given = student.state_dict(), teacher.state_dict()
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in own):
            parts = sorted({".".join(key.split(".")[:2]) for key in own})
            raise DistillError(
                f"DISTILL.STUDENT.INHERIT names {prefix!r}, but no weight of the student begins so. Its parts are: "
                f"{', '.join(parts)}."
            )
    wanted = [key for key in own if key.startswith(tuple(prefixes)) and (key in given or not key.endswith(_COUNTER))]
    misfits = [
        f"{key} is {tuple(own[key].shape)} in the student and "
        f"{tuple(given[key].shape) if key in given else 'missing'} in the teacher"
        for key in wanted
        if key not in given or given[key].shape != own[key].shape
    ]
    if misfits:
        raise DistillError(
            f"DISTILL.STUDENT.INHERIT: {len(misfits)} of {len(wanted)} weights do not fit: {'; '.join(misfits)}. Name "
            "only parts that both have in the same shape."
        )
    if scale != 1:
        _check_anchors(student, teacher, wanted, scale)
    if any(key.startswith("backbone.") and own[key].dim() == 4 and own[key].shape[1] == 3 for key in wanted):
        _check_images(student, teacher, flip_channels)
    return {key: given[key] for key in wanted}


def warn_of_other_anchors(student: nn.Module, teacher: nn.Module, keys: Sequence[str]) -> None:
    """Warns where a head is inherited whose anchors are not the teacher's, though it fits.

    Args:
        student: which sees the images as large as the teacher does.
        teacher: the teacher.
        keys: of the weights.
    """
    sides = _anchor_generators(student, teacher, keys)
    if not sides:
        return
    own, given = ([x.cpu() for x in side.cell_anchors] for side in sides)
    is_same = list(sides[0].strides) == list(sides[1].strides) and len(own) == len(given)
    if not (is_same and all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-2) for x, y in zip(own, given))):
        logger.warning(
            "DISTILL.STUDENT.INHERIT names a head that the teacher trained for anchors of other sizes or strides: its "
            "outputs mean other boxes here. Give the student the teacher's anchors (MODEL.ANCHOR_GENERATOR, and "
            "IN_FEATURES of its heads), or leave the head out."
        )


def _check_images(student: nn.Module, teacher: nn.Module, flip_channels: bool) -> None:
    """Refuses a first convolution that would see other images than it learned from."""
    problems = ["one side's are RGB and the other's BGR"] if flip_channels else []
    for name in ("pixel_mean", "pixel_std"):
        own, given = (getattr(side, name, None) for side in (student, teacher))
        if own is not None and given is not None and not torch.allclose(own.cpu(), given.cpu(), rtol=1e-2):
            texts = [[round(x, 2) for x in side.flatten().tolist()] for side in (own, given)]
            problems.append(f"{name} is {texts[0]} in the student and {texts[1]} in the teacher")
    if problems:
        raise DistillError(
            "DISTILL.STUDENT.INHERIT names the first convolution, and the images that it sees differ: "
            f"{'; '.join(problems)}. Give the student the teacher's INPUT.FORMAT, MODEL.PIXEL_MEAN and "
            "MODEL.PIXEL_STD, or inherit only what is behind the backbone's bottom-up network."
        )


def _anchor_generators(student: nn.Module, teacher: nn.Module, keys: Sequence[str]) -> list[nn.Module]:
    """Both sides', where weights are inherited that learned their anchors."""
    if not any(key.startswith(("head.", "proposal_generator.")) for key in keys):
        return []
    heads = [getattr(side, "proposal_generator", side) for side in (student, teacher)]
    found = [head.anchor_generator for head in heads if hasattr(head, "anchor_generator")]
    return found if len(found) == 2 else []


def _check_anchors(student: nn.Module, teacher: nn.Module, keys: Sequence[str], scale: float) -> None:
    sides = _anchor_generators(student, teacher, keys)
    if not sides:
        return
    strides = [[round(stride / scale) for stride in sides[0].strides], list(sides[1].strides)]
    if strides[0] != strides[1]:
        raise DistillError(
            f"DISTILL.STUDENT.INHERIT names a head that stands on levels of strides {strides[1]} in the teacher. The "
            f"student's have strides {strides[0]} in pixels of the whole image, which it sees at {scale:g} the size: "
            "shift the IN_FEATURES of its heads to finer levels, by one for each halving."
        )
    own, given = (list(side.cell_anchors) for side in sides)
    if any(x.shape != y.shape or not torch.allclose(x, y * scale, rtol=1e-3) for x, y in zip(own, given)):
        raise DistillError(
            f"DISTILL.STUDENT.INHERIT names a head whose anchors must be {scale:g} times the teacher's, since the "
            f"student sees the images at that size. They are not: set "
            f"MODEL.ANCHOR_GENERATOR.SIZES to {scale:g} times the teacher's."
        )

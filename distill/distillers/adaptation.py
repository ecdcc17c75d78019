"""The convolutions between the student's features and the teacher's."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from ..errors import DistillError

KERNELS = {"auto": None, "1x1": 1, "3x3": 3}


def build_adaptation(
    levels: Sequence[str],
    student_shape: Mapping[str, ShapeSpec],
    teacher_shape: Mapping[str, ShapeSpec],
    kind: str = "auto",
    key: str = "kind",
) -> nn.ModuleDict:
    """Builds, for each level, what brings the student's features to the teacher's number of channels.

    Where the channels agree a convolution starts as the identity, since a random one would undo features that fit
    already; where they differ it starts Kaiming-uniform with a = 1, as Detectron2's FPN does. The bias starts at zero.

    Args:
        levels: names of levels.
        student_shape: the student's features, by level.
        teacher_shape: the teacher's.
        kind: "1x1", "3x3", or "auto": 1x1 where the channels differ, nothing where they agree.
        key: the config key of ``kind``, for the message.

    Returns:
        By level, a module from ``Tensor[N, C_student, H, W]`` to ``Tensor[N, C_teacher, H, W]``.

    Raises:
        DistillError: ``kind`` is unknown.
    """
    if kind not in KERNELS:
        raise DistillError(f"{key} is {kind!r}: expected one of {', '.join(KERNELS)}.")
    modules = {}
    for level in levels:
        given, wanted = student_shape[level].channels, teacher_shape[level].channels
        if kind == "auto" and given == wanted:
            modules[level] = nn.Identity()
            continue
        size = KERNELS[kind] or 1
        conv = nn.Conv2d(given, wanted, size, padding=size // 2)
        with torch.no_grad():
            if given == wanted:
                nn.init.dirac_(conv.weight)
            else:
                nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        modules[level] = conv
    return nn.ModuleDict(modules)

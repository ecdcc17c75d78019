"""Which weights a student can take over from its teacher."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import DistillError


def inheritable_weights(student: nn.Module, teacher: nn.Module, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Finds the teacher's weights for the parts of the student that ``prefixes`` name.

    Args:
        student: the student.
        teacher: the teacher.
        prefixes: beginnings of weight names, such as "backbone.fpn_" or "roi_heads".

    Returns:
        The teacher's weights by name.

    Raises:
        DistillError: a prefix names nothing, or a weight that one names is missing in the teacher or has another
            shape there.
    """
    own, given = student.state_dict(), teacher.state_dict()
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in own):
            parts = sorted({".".join(key.split(".")[:2]) for key in own})
            raise DistillError(
                f"DISTILL.STUDENT.INHERIT names {prefix!r}, but no weight of the student begins so. Its parts are: "
                f"{', '.join(parts)}."
            )
    wanted = [key for key in own if key.startswith(tuple(prefixes))]
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
    return {key: given[key] for key in wanted}

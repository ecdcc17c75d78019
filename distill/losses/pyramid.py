"""What the losses of whole pyramids ask of their arguments."""

from collections.abc import Sequence

from torch import Tensor


def check_pyramids(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Checks that two pyramids can be compared cell by cell.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: the same.

    Raises:
        ValueError: the numbers of levels or the shapes of a level differ, or there is no level.
    """
    shapes = [[tuple(level.shape) for level in side] for side in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise ValueError(f"expected the same shapes of features, at least one level; got {shapes[0]} and {shapes[1]}")

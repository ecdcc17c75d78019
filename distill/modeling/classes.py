"""Which of the teacher's classes is which of the student's."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import DistillError
from .teacher import teacher_recipe

_EXPECTED = (
    "expected [] (both have the same classes), ['names'] (classes of one name are the same), or pairs "
    "'STUDENT=TEACHER' of names or numbers, such as 'pedestrian=person' or '0=14'"
)


def build_class_map(cfg: CfgNode) -> dict[int, int] | None:
    """The classes that student and teacher share, as ``DISTILL.CLASS_MAP`` says.

    Args:
        cfg: the full config.

    Returns:
        By the student's class, the teacher's, counted from 0; None where both have the same ones.

    Raises:
        DistillError: a pair cannot be read, a name is unknown or names two classes, no class is shared, or the names of
            a side's classes are not known.
    """
    pairs = list(cfg.DISTILL.CLASS_MAP)
    if not pairs:
        return None
    given = [pair.split("=") for pair in pairs]
    if pairs != ["names"] and not all(len(pair) == 2 and all(pair) for pair in given):
        raise DistillError(f"DISTILL.CLASS_MAP is {pairs!r}: {_EXPECTED}.")
    sets = {"student": cfg.DATASETS.TRAIN, "teacher": teacher_recipe(cfg).cfg.DATASETS.TRAIN}
    if pairs != ["names"] and all(side.isdigit() for pair in given for side in pair):
        names = [_known(datasets) for datasets in sets.values()]  # a digit may be the name of a class
    else:
        names = [_names(datasets, side) for side, datasets in sets.items()]
    if pairs == ["names"]:
        shared = [(own, names[1].index(name)) for own, name in enumerate(names[0]) if name in names[1]]
        if not shared:
            raise DistillError(
                "DISTILL.CLASS_MAP is ['names'], but no class of the student is called as one of the teacher's: the "
                f"student has {', '.join(names[0])}, the teacher {', '.join(names[1])}. Give pairs 'STUDENT=TEACHER'."
            )
        return dict(shared)
    found = [tuple(_index(name, known) for name, known in zip(pair, names)) for pair in given]
    return _unique(found, pairs)


def _index(name: str, known: Sequence[str]) -> int:
    if name in known:
        return known.index(name)
    if name.isdigit():
        return int(name)
    raise DistillError(f"DISTILL.CLASS_MAP names the class {name!r}: expected one of {', '.join(known)}, or a number.")


def _unique(found: list[tuple[int, int]], pairs: list[str]) -> dict[int, int]:
    if len(dict(found)) < len(found) or len({theirs for _, theirs in found}) < len(found):
        raise DistillError(f"DISTILL.CLASS_MAP is {pairs!r}: it names a class twice.")
    return dict(found)


def _known(datasets: Sequence[str]) -> list[str]:
    """The names of the classes of a side's first training dataset, as far as it says them without being read."""
    is_registered = bool(datasets) and datasets[0] in DatasetCatalog.list()
    return list(MetadataCatalog.get(datasets[0]).get("thing_classes") or []) if is_registered else []


def _names(datasets: Sequence[str], side: str) -> list[str]:
    name = datasets[0] if datasets else ""
    if name in DatasetCatalog.list() and not _known(datasets):
        DatasetCatalog.get(name)  # a COCO file says its classes once it is read
    names = _known(datasets)
    if names:
        return names
    raise DistillError(
        f"DISTILL.CLASS_MAP compares names of classes, and those of the {side} are not known, since its dataset "
        f"{name!r} (DATASETS.TRAIN of its config) is not registered here: give pairs of numbers, such as '0=14'."
    )

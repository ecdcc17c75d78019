"""Which of the teacher's classes is which of the student's."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import register_from_config
from ..errors import DistillError
from .teacher import teacher_recipe

logger = logging.getLogger(__name__)

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
        _warn_of_other_names(cfg)
        return None
    given = [pair.split("=") for pair in pairs]
    if pairs != ["names"] and not all(len(pair) == 2 and all(pair) for pair in given):
        raise DistillError(f"DISTILL.CLASS_MAP is {pairs!r}: {_EXPECTED}.")
    sets = _datasets(cfg)
    if pairs != ["names"] and all(side.isdigit() for pair in given for side in pair):
        names = [_known(name) for name in sets.values()]  # a digit may be the name of a class
    else:
        _register_teachers(cfg, sets["teacher"])
        names = [_names(name, side) for side, name in sets.items()]
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


def _datasets(cfg: CfgNode) -> dict[str, str]:
    """The name of each side's first training dataset; the teacher's is not that of this run's where both configs
    register another one by it."""
    own = teacher_recipe(cfg).cfg.DATASETS
    sets = {side: node.TRAIN[0] if node.TRAIN else "" for side, node in (("student", cfg.DATASETS), ("teacher", own))}
    entries = [{str(entry).partition("=")[0]: str(entry) for entry in node.REGISTER} for node in (cfg.DATASETS, own)]
    name = sets["teacher"]
    if name in entries[0] and entries[1].get(name, entries[0][name]) != entries[0][name]:
        sets["teacher"] = f"{name} as the teacher's config registers it"
    return sets


def _register_teachers(cfg: CfgNode, name: str) -> None:
    """Registers the teacher's dataset as its own config does, where this run does not know it."""
    own = teacher_recipe(cfg).cfg
    if name not in DatasetCatalog.list() and name in {str(x).partition("=")[0] for x in own.DATASETS.REGISTER}:
        register_from_config(own, [name])


def _warn_of_other_names(cfg: CfgNode) -> None:
    try:
        names = [_known(name) for name in _datasets(cfg).values()]
    except DistillError:  # there is no config of the teacher: somebody builds it otherwise
        return
    if all(names) and len(names[0]) == len(names[1]) and names[0] != names[1]:
        index = next(i for i, (own, given) in enumerate(zip(*names)) if own != given)
        logger.warning(
            f"Class {index} is {names[0][index]!r} in the student's dataset and {names[1][index]!r} in the teacher's. "
            "Classifications are compared by number: set DISTILL.CLASS_MAP ['names'] to compare those of one name."
        )


def _known(name: str) -> list[str]:
    """The names of a dataset's classes, as far as it says them without being read."""
    return list(MetadataCatalog.get(name).get("thing_classes") or []) if name in DatasetCatalog.list() else []


def _names(name: str, side: str) -> list[str]:
    if name in DatasetCatalog.list() and not _known(name):
        DatasetCatalog.get(name)  # a COCO file says its classes once it is read
    names = _known(name)
    if names:
        return names
    raise DistillError(
        f"DISTILL.CLASS_MAP compares names of classes, and those of the {side} are not known, since its dataset "
        f"{name!r} (DATASETS.TRAIN of its config) is not registered here: give pairs of numbers, such as '0=14'."
    )

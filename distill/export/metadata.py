"""What an exported file says of itself: its classes, how images become its input, and what it returns."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
from detectron2.data import DatasetMapper, MetadataCatalog
from PIL import Image
from torch import nn

from ..config import num_classes
from ..data import CheckedMapper
from ..errors import DistillError
from ..recipes import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileMetadata:
    """The metadata of an exported file. In the file, each field is JSON under its own name.

    Attributes:
        class_names: the name of each class, in the order of ``pred_classes``.
        pixel_mean: subtracted from each channel, inside the file.
        pixel_std: each channel is divided by it, inside the file.
        channel_order: of the input, "BGR" or "RGB".
        size: height and width of the input of a file of fixed size, in pixels; None: images of any size.
        short_edge: the length that the shorter side of an image is resized to before; 0: images stay as they are; None:
            not known.
        max_size: the most that the longer side may have then; None: no limit.
        outputs: the names of the outputs, in order.
        device: what a TorchScript file runs on; an ONNX file runs anywhere.
    """

    class_names: list[str]
    pixel_mean: list[float]
    pixel_std: list[float]
    channel_order: str
    size: list[int] | None
    short_edge: int | None
    max_size: int | None
    outputs: list[str]
    device: str = "cpu"

    def to_strings(self) -> dict[str, str]:
        """As a file holds it: JSON by field."""
        return {key: json.dumps(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str) -> FileMetadata:
        """Reads what :meth:`to_strings` wrote.

        Args:
            strings: JSON by field; others may be among them.
            path: the file, for the message.

        Raises:
            DistillError: a field is missing or is no JSON.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        lacking = [name for name in names if name not in strings]
        if lacking:
            raise DistillError(
                f"{path} lacks the metadata {', '.join(lacking)}: expected a file that tools/export_student.py wrote."
            )
        try:
            return cls(**{name: json.loads(strings[name]) for name in names})
        except ValueError as error:
            raise DistillError(f"The metadata of {path} is damaged: {error}. Export it again.") from error

    @property
    def knows_resizing(self) -> bool:
        """Whether it says how images are resized."""
        return self.size is not None or self.short_edge is not None


def build_input_mapper(metadata: FileMetadata) -> CheckedMapper:
    """What reads an image as an exported file takes it.

    Args:
        metadata: of the file. For a fixed size, images are scaled until they touch its border from inside, with their
            shape kept; :class:`DeployedDetector` pads them. Of unknown sizes, images stay as they are.

    Returns:
        A mapper of Detectron2's dataset dicts, of which ``file_name`` is required.
    """
    if metadata.size is not None:
        resize = [T.ResizeScale(1.0, 1.0, *metadata.size)]
    elif metadata.short_edge:
        limit = {} if metadata.max_size is None else {"max_size": metadata.max_size}
        resize = [T.ResizeShortestEdge(metadata.short_edge, **limit)]
    else:
        resize = []
    return CheckedMapper(DatasetMapper(False, augmentations=resize, image_format=metadata.channel_order))


def describe(recipe: Recipe, model: nn.Module, size: Sequence[int] | None = None, device: str = "cpu") -> FileMetadata:
    """The metadata of a file of a detector, but for its outputs: see :func:`distill.export.output_names`.

    Args:
        recipe: the detector's; its datasets are registered, if they are to name the classes.
        model: the detector.
        size: height and width, of a file of fixed size.
        device: what a TorchScript file is for.

    Returns:
        The metadata.

    Raises:
        DistillError: the detector does not normalise images as Detectron2's do, or the number of classes is unknown.
    """
    if not all(hasattr(model, name) for name in ("pixel_mean", "pixel_std")):
        raise DistillError(
            f"A {type(model).__name__} has no pixel_mean and pixel_std: only detectors that normalise images as "
            "Detectron2's do can be exported as files. Use --format detectron2."
        )
    return FileMetadata(
        class_names=class_names(recipe),
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
        size=None if size is None else list(size),
        outputs=[],
        device=device,
        **_describe_test_mapper(recipe),
    )


def _describe_test_mapper(recipe: Recipe) -> dict[str, Any]:
    """The fields that say how a config reads images for testing."""
    found: dict[str, Any] = {"channel_order": recipe.cfg.INPUT.FORMAT, "short_edge": None, "max_size": None}
    if not recipe.has_test_mapper:
        return found
    mapper = recipe.build_mapper().mapper
    found["channel_order"] = getattr(mapper, "image_format", found["channel_order"])
    augmentations = getattr(getattr(mapper, "augmentations", None), "augs", [None])
    if not augmentations:
        found["short_edge"] = 0
    resize = augmentations[0] if len(augmentations) == 1 else None
    is_usual = isinstance(resize, T.ResizeShortestEdge) and resize.interp == Image.BILINEAR
    if is_usual and len(set(resize.short_edge_length)) == 1:
        found["short_edge"] = resize.short_edge_length[0]
        if found["short_edge"] and resize.max_size < sys.maxsize:  # which is Detectron2's for no limit
            found["max_size"] = resize.max_size
    return found


def class_names(recipe: Recipe) -> list[str]:
    """The names of a detector's classes, from its datasets; numbers, with a warning, where they do not tell.

    Args:
        recipe: the detector's; its datasets are registered where that is possible.

    Returns:
        A name for each class.

    Raises:
        DistillError: no dataset names the classes, and their number is not known either.
    """
    names = (*recipe.cfg.DATASETS.TEST, *recipe.cfg.DATASETS.TRAIN)
    known = [MetadataCatalog.get(name).get("thing_classes") for name in names if name in MetadataCatalog.list()]
    known = [classes for classes in known if classes]
    try:
        number = num_classes(recipe.cfg)
    except DistillError:  # a meta-architecture that only its author knows
        if not known:
            raise
        number = len(known[0])
    for classes in known:
        if len(classes) == number:
            return list(classes)
    logger.warning(
        f"The classes are called by their numbers, 0 to {number - 1}: no dataset of DATASETS.TEST and DATASETS.TRAIN "
        f"({', '.join(names) or 'none'}) is registered with the names of {number} classes."
    )
    return [str(index) for index in range(number)]

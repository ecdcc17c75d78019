"""YOLO's text files: by a data.yaml (Ultralytics, Roboflow, CVAT), or in a folder with a list of classes (LabelImg,
Label Studio, CVAT's "YOLO 1.1")."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.structures import BoxMode

from ...errors import DistillError
from .source import (
    IMAGE_TYPES,
    Fault,
    Source,
    absolute,
    check_classes,
    read_classes,
    read_names,
    require,
    select,
    walk,
)

logger = logging.getLogger(__name__)

_CLASS_LISTS = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")


def read_yolo(name: str, root: str, split: str) -> Source:
    """Reads a dataset of text files, one an image: ``class x y w h`` in shares of the image, or a polygon. Keypoints
    behind a box, which a ``data.yaml`` with ``kpt_shape`` has, are left out.

    Args:
        name: of the dataset, for errors.
        root: a ``data.yaml`` with ``names``; or a folder with images, text files, and a list of the classes
            (``classes.txt``, ``obj.names`` or ``_darknet.labels``).
        split: a key of the ``data.yaml``, such as "train" or "val"; else, and of a folder, see :func:`.source.select`.

    Returns:
        The dataset. Boxes are in shares of the image until :func:`distill.data.check.check_source` knows its size. An
        image without a text file has no object, as YOLO has it.

    Raises:
        DistillError: a path does not exist, or the yaml or the list of classes is of another form.
    """
    path = Path(root)
    require(path.exists(), name, f"'{root}' does not exist: expected a data.yaml, or a folder.")
    if path.is_dir() and (path / "data.yaml").is_file():
        path = path / "data.yaml"
    num_extra = 0
    if path.is_dir():
        classes, images = _from_folder(name, path, split)
    else:
        classes, images, num_extra = _from_yaml(name, path, split)
    check_classes(name, classes)
    require(bool(images), name, f"the split {split!r} has no image ({', '.join(IMAGE_TYPES)}).")
    source, has_labels = Source(classes, [], "coco"), False
    for index, image in enumerate(images):
        record = {"file_name": absolute(image), "image_id": index + 1, "height": 0, "width": 0, "annotations": []}
        source.records.append(record)
        file = next((path for path in _label_files(image) if path.is_file()), None)
        has_labels |= file is not None
        if file is not None:
            _read_labels(source, record, file, num_extra)
    places = " and ".join(f"'{path}'" for path in _label_files(images[0]))
    require(
        has_labels, name, f"none of its {len(images)} images has a text file; of the first, {places} was looked for."
    )
    masks = [a for r in source.records for a in r["annotations"] if "segmentation" in a]
    boxes = [r["file_name"] for r in source.records for a in r["annotations"] if "segmentation" not in a]
    if masks and boxes:
        for annotation in masks:  # a polygon here and there is no dataset of masks
            del annotation["segmentation"]
        logger.warning(
            f"{name}: {len(masks)} objects are polygons and {len(boxes)} are boxes, such as of {boxes[0]}: all are "
            "taken for boxes."
        )
    return source


def _from_yaml(name: str, path: Path, split: str) -> tuple[list[str], list[Path], int]:
    """Classes, images, and how many numbers follow a box."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        names = content["names"]
        classes = [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else [str(n) for n in names]
        is_dense = not isinstance(names, dict) or sorted(names) == list(range(len(names)))
        num_extra = math.prod(int(n) for n in content["kpt_shape"]) if content.get("kpt_shape") else 0
    except yaml.YAMLError as error:
        require(False, name, f"'{path}' is not YAML: {error}.")
    except (KeyError, TypeError, ValueError) as error:
        require(False, name, f"'{path}' is not YOLO's data.yaml (names, train, val): {error!r}.")
    require(is_dense, name, f"'{path}': expected names of the classes 0, 1, 2, ... without a gap.")
    number = content.get("nc")
    require(
        number in (None, len(classes)), name, f"'{path}' has nc {number} and {len(classes)} names: expected as many."
    )
    split = "val" if split == "valid" and "valid" not in content else split
    keys = [key for key in ("train", "val", "test") if content.get(key)]
    base = path.parent / str(content.get("path") or "")
    base = base if base.is_dir() else path.parent  # where it was written for another machine
    places = [content[key] for key in ([split] if content.get(split) else keys)]
    places = [place for own in places for place in (own if isinstance(own, list) else [own])]
    images = list(dict.fromkeys(image for place in places for image in _images_of(name, base, str(place))))
    if not content.get(split):
        images = _select(name, split, images, path.parent, keys)
    return classes, images, num_extra


def _images_of(name: str, base: Path, place: str) -> list[Path]:
    # Roboflow writes ../train/images for a folder beside the yaml
    place = place if (base / place).exists() else place.replace("\\", "/")
    candidates = [base / place, base / place.removeprefix("../"), base / place.lstrip("./")]
    found = next((path for path in candidates if path.exists()), None)
    require(found is not None, name, f"the split '{base / place}' does not exist.")
    if found.is_dir():
        return walk(found)
    return [_listed(base, line) for line in read_names(found)]


def _listed(base: Path, line: str) -> Path:
    # CVAT writes data/obj_train_data/... for obj_train_data
    line = line if (base / line).is_file() else line.replace("\\", "/")
    return next((p for p in (base / line, base / line.removeprefix("data/")) if p.is_file()), base / line)


def _from_folder(name: str, folder: Path, split: str) -> tuple[list[str], list[Path]]:
    lists = [folder / file for file in _CLASS_LISTS if (folder / file).is_file()]
    lists = lists or sorted(p for file in _CLASS_LISTS for p in folder.glob(f"*/{file}"))
    require(
        bool(lists),
        name,
        f"the folder '{folder}' has no list of classes: expected {', '.join(_CLASS_LISTS[:3])}, or give a data.yaml.",
    )
    return read_classes(lists[0]), _select(name, split, walk(folder), folder)


def _select(name: str, split: str, images: Sequence[Path], folder: Path, own: Sequence[str] = ()) -> list[Path]:
    """Images of a split, by their names; by their paths from the folder where names are not unique."""
    by_path = {os.path.relpath(path.with_suffix(""), folder): path for path in images}
    by_name = {path.stem: path for path in images}
    table = by_name if len(by_name) == len(by_path) else by_path
    return [table.get(stem, folder / stem) for stem in select(name, split, list(table), folder, own)]


def _label_files(image: Path) -> list[Path]:
    """Where an image's text file may be: in the folder "labels" that stands beside the last folder "images", or beside
    the image."""
    parts = list(image.parent.parts)
    for index in reversed(range(len(parts))):
        if parts[index] == "images":
            return [
                Path(*parts[:index], "labels", *parts[index + 1 :]) / f"{image.stem}.txt",
                image.with_suffix(".txt"),
            ]
    return [image.with_suffix(".txt")]


def _read_labels(source: Source, record: dict, path: Path, num_extra: int) -> None:
    try:
        lines = read_names(path)
    except DistillError:
        lines = ["not text"]
    for line in lines:
        try:
            number, *values = (float(text) for text in line.split())
            if num_extra and len(values) == 4 + num_extra:
                del values[4:]
            is_box = len(values) == 4
            is_polygon = len(values) >= 6 and len(values) % 2 == 0
            if not (is_box or is_polygon) or any(abs(value) > 2 for value in values):  # pixels
                raise ValueError(line)
        except ValueError:
            source.faults.append(Fault("annotation unreadable", record, str(path)))
            continue
        if not (number.is_integer() and 0 <= number < len(source.classes)):
            source.faults.append(Fault("class unknown", record, str(path)))
            continue
        annotation = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": int(number), "iscrowd": 0, "relative": True}
        if is_box:
            x, y, w, h = values
            annotation["bbox"] = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        else:
            annotation["bbox"] = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
            annotation["segmentation"] = [values]
        record["annotations"].append(annotation)

"""COCO's JSON, as COCO itself, CVAT, Roboflow and Label Studio write it."""

import json
import logging
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from .source import Fault, Source, absolute, check_classes, enclosing, require, select

logger = logging.getLogger(__name__)


def read_coco(name: str, json_file: str, image_root: str, split: str = "all") -> Source:
    """Reads a dataset from one JSON.

    Args:
        name: of the dataset, for errors.
        json_file: with ``images``, ``annotations`` and ``categories``.
        image_root: the folder that its file names are relative to; an image that is not there is looked for by its
            name alone, if no other has that name.
        split: see :func:`.source.select`, by the images' file names.

    Returns:
        The dataset. Categories are in the order of their ids.

    Raises:
        DistillError: a path does not exist, the file is of another form, or it has no image or no annotation.
    """
    path, folder = Path(json_file), Path(image_root)
    require(path.is_file(), name, f"the file '{json_file}' does not exist.")
    require(folder.is_dir(), name, f"the folder of images '{image_root}' does not exist.")
    try:
        raw = path.read_bytes()
        content = json.loads(raw.decode("utf-8-sig"))
        images, annotations = content["images"], content["annotations"]
        categories = sorted(content["categories"], key=lambda category: _order(category["id"]))
        root = _find_root(categories, annotations)
        categories = [category for category in categories if category is not root]
        classes = [str(category["name"]) for category in categories]
        stems = [str(Path(str(image["file_name"])).with_suffix("")) for image in images]
        names = Counter(_name(str(image["file_name"])) for image in images)
        keys = [str(image["id"]) for image in images]
        sizes = [(int(image.get("height") or 0), int(image.get("width") or 0)) for image in images]
        by_image = defaultdict(list)
        for annotation in annotations:
            by_image[str(annotation["image_id"])].append(annotation)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        require(False, name, f"'{json_file}' is not COCO JSON (images, annotations, categories): {error!r}.")
    require(bool(images), name, f"the file '{json_file}' lists no image.")
    require(
        bool(annotations), name, f"the file '{json_file}' has no annotation: nothing to learn, nothing to evaluate."
    )
    if root:
        logger.info(f"{name}: the category {root['name']!r} is the name of the project (Roboflow's), and no class.")
    check_classes(name, classes)
    for what, ids in (("images", keys), ("categories", [str(category["id"]) for category in categories])):
        twice = sorted(key for key, number in Counter(ids).items() if number > 1)
        require(
            not twice, name, f"'{json_file}' has several {what} of the ids {', '.join(twice[:3])}: expected one each."
        )

    chosen = set(select(name, split, stems, path.parent))
    absent = sorted(chosen - set(stems))
    if absent:
        told = f"the split '{split}' names images that '{json_file}' does not list, such as {', '.join(absent[:3])}"
        require(len(absent) < len(chosen), name, f"{told}: expected file names such as {images[0]['file_name']}.")
        logger.warning(f"{name}: {told} ({len(absent)} of {len(chosen)}).")
    source = Source(classes, [], "coco")
    numbers = {str(category["id"]): index for index, category in enumerate(categories)}
    for key in by_image.keys() - set(keys):
        source.faults.append(Fault("image unknown", None, f"{json_file}, image_id {key}"))
    are_numbers = all(type(image["id"]) is int for image in images)
    for index, (image, key, stem, (height, width)) in enumerate(zip(images, keys, stems, sizes)):
        if stem not in chosen:
            continue
        record = {
            "file_name": _find(folder, str(image["file_name"]), names),
            "image_id": image["id"] if are_numbers else index + 1,
            "height": height,
            "width": width,
            "annotations": [],
        }
        source.records.append(record)
        for annotation in by_image[key]:
            _read_annotation(source, record, annotation, numbers)
    _complete_masks(source)
    is_whole = split == "all" and are_numbers and not raw.startswith(b"\xef\xbb\xbf")
    is_unique = len({str(a.get("id")) for a in annotations}) == len(annotations)
    are_standard = all(type(c["id"]) is int for c in categories) and all(_is_standard(a) for a in annotations)
    have_sizes = all(height and width for height, width in sizes)  # masks are evaluated in them
    if is_whole and is_unique and are_standard and have_sizes and not root:
        source.json_file = absolute(path)
        source.metadata["thing_dataset_id_to_contiguous_id"] = {c["id"]: i for i, c in enumerate(categories)}
    return source


def _order(number: object) -> tuple:
    return (0, number, "") if isinstance(number, int) else (1, 0, str(number))


def _find_root(categories: list[dict], annotations: list[dict]) -> dict | None:
    """Roboflow's first category: it has the project's name, which the others have as supercategory, and no object."""
    used = {str(annotation.get("category_id")) for annotation in annotations}
    for root in categories:
        others = [category.get("supercategory") for category in categories if category is not root]
        is_above = root.get("supercategory") == "none" and others and set(others) == {str(root["name"])}
        if is_above and str(root["id"]) not in used:
            return root
    return None


def _is_standard(annotation: dict) -> bool:
    """Whether Detectron2's evaluator reads an annotation as it is. To pycocotools the id 0, of Label Studio's first,
    means no object."""
    numbers = all(type(annotation.get(key)) is int for key in ("id", "image_id", "category_id", "iscrowd"))
    is_read = numbers and annotation["id"] > 0 and not annotation.get("ignore") and not _rotation(annotation)
    mask = annotation.get("segmentation")
    is_mask = not isinstance(mask, list) or all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in mask)
    return is_read and is_mask and "area" in annotation and len(annotation.get("bbox") or ()) == 4


def _rotation(annotation: dict) -> float:
    """In degrees, of a box without a mask: CVAT's."""
    attributes = annotation.get("attributes")
    has_angle = isinstance(attributes, dict) and not annotation.get("segmentation")
    try:
        return float(attributes.get("rotation") or 0) if has_angle else 0.0
    except (TypeError, ValueError):  # another tool's attribute of that name
        return 0.0


def _find(root: Path, file_name: str, names: Counter[str]) -> str:
    """Tools write paths of their own machine: what counts is where the image is here."""
    name = _name(file_name)
    places = [file_name, file_name.replace("\\", "/"), *([name] if names[name] == 1 else [])]
    return next((absolute(root / n) for n in places if (root / n).is_file()), absolute(root / file_name))


def _name(file_name: str) -> str:
    return Path(file_name.replace("\\", "/")).name


def _read_annotation(source: Source, record: dict, annotation: dict, numbers: dict[str, int]) -> None:
    category = numbers.get(str(annotation.get("category_id")))
    if category is None:
        source.faults.append(Fault("class unknown", record, record["file_name"]))
        return
    found = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": int(annotation.get("iscrowd") or 0)}
    try:
        mask = _read_mask(annotation.get("segmentation"))
        box = enclosing(_read_box(annotation.get("bbox"), mask), _rotation(annotation))
    except (ValueError, TypeError, KeyError, IndexError):
        source.faults.append(Fault("annotation unreadable", record, record["file_name"]))
        return
    if found["iscrowd"]:
        source.faults.append(Fault("crowd", record, record["file_name"]))
    if annotation.get("ignore"):  # as Detectron2 has it: neither learned nor evaluated
        return
    record["annotations"].append({**found, "bbox": box, **({"segmentation": mask} if mask else {})})


def _read_mask(mask: object) -> list | dict | None:
    """Polygons of three corners and more, or a compressed run-length encoding."""
    if not mask:
        return None
    if isinstance(mask, dict):
        size = [int(side) for side in mask["size"]]
        if isinstance(mask["counts"], list):
            if sum(mask["counts"]) != math.prod(size):
                raise ValueError(mask["counts"])
            return mask_util.frPyObjects({"counts": mask["counts"], "size": size}, *size)
        return {"counts": mask["counts"], "size": size}
    polygons = [mask] if isinstance(mask[0], int | float) else mask
    return [[float(x) for x in p] for p in polygons if len(p) >= 6 and len(p) % 2 == 0] or None


def _read_box(box: list | None, mask: list | dict | None) -> list[float]:
    """XYXY; of the mask where there is no box."""
    if box:
        x, y, w, h = (float(value) for value in box)
        return [x, y, x + w, y + h]
    if isinstance(mask, dict):
        x, y, w, h = (float(value) for value in mask_util.toBbox(mask))
        return [x, y, x + w, y + h]
    if mask:
        corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
        return [*corners.min(0).tolist(), *corners.max(0).tolist()]
    return [math.nan] * 4


def _complete_masks(source: Source) -> None:
    """Where some objects have a mask and others none, these get their box's; Detectron2 wants all or none."""
    objects = [(record, a) for record in source.records for a in record["annotations"]]
    if not any("segmentation" in a for _, a in objects):
        return
    for record, a in objects:
        if "segmentation" not in a:
            x0, y0, x1, y1 = a["bbox"]
            a["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            source.faults.append(Fault("mask missing", record, record["file_name"]))

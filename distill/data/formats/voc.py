"""PASCAL VOC's XML, in its own layout or flat, as LabelImg, CVAT and Roboflow write it."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from .source import (
    IMAGE_TYPES,
    Fault,
    Source,
    absolute,
    check_classes,
    enclosing,
    find_images,
    given_classes,
    require,
    select,
    walk,
)

_OF_2007 = re.compile(r"(.*voc[\W_]*)?2007([\W_].*)?", re.IGNORECASE)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(name: str, root: str, split: str, classes: str | Sequence[str] = "") -> Source:
    """Reads a dataset of XML files.

    Args:
        name: of the dataset, for errors.
        root: a folder in PASCAL VOC's layout, or with images and XML files together, or in folders below.
        split: of ``ImageSets/Main``; elsewhere see :func:`.source.select`. It may be a folder of root, too.
        classes: see :func:`.source.given_classes`; by default those of all XML files, sorted.

    Returns:
        The dataset.

    Raises:
        DistillError: a folder or the split is missing, two folders have XML files of one name, there is no class, or
            one that is not among those given.
    """
    folder = Path(root)
    require(folder.is_dir(), name, f"the folder '{root}' does not exist.")
    if not (folder / "ImageSets" / "Main").is_dir() and (folder / split).is_dir() and split not in ("", "."):
        folder, split = folder / split, "all"  # Roboflow's train, valid and test
    standard = folder / "JPEGImages"
    nested = _below(standard, IMAGE_TYPES)
    annotations = _annotations(name, folder, nested)
    require(
        bool(annotations),
        name,
        f"there is no XML file in '{folder}' or a folder below it: expected PASCAL VOC's layout (Annotations, "
        "ImageSets/Main, JPEGImages), or images and XML files in one folder or two.",
    )
    expected = standard if standard.is_dir() else folder
    # a class's or an object's pixels are pictures, too
    others = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("Segmentation"))
    others.sort(key=lambda p: p.name.lower() != "images")
    images = {**nested, **find_images([standard, folder, *others])}
    beside = {place: find_images([place]) for place in {path.parent for path in annotations.values()}}
    lists = folder / "ImageSets" / "Main"
    # of a flat folder what is annotated: an image without an XML file has not been looked at
    stems = select(name, split, list(annotations), lists if lists.is_dir() else folder)
    source = Source(
        [], [], "pascal_voc", metadata={"year": 2007 if _OF_2007.fullmatch(folder.resolve().name) else 2012}
    )
    parsed = {stem: _parse(path) for stem, path in annotations.items()}
    found = {c for tree in parsed.values() if tree is not None for c in _names(tree)}
    source.classes = given_classes(classes) or sorted(found)
    check_classes(name, source.classes)
    others = sorted(found - set(source.classes))
    require(
        not others,
        name,
        f"its annotations contain the classes {', '.join(others)}, which are not among {', '.join(source.classes)}. "
        "Name all of them, or none to take them from the annotations.",
    )
    for stem in stems:
        path = annotations.get(stem)
        image = beside[path.parent].get(stem) if path else None
        image = image or images.get(stem, expected / f"{stem}.jpg")
        record = {"file_name": absolute(image), "image_id": stem, "height": 0, "width": 0, "annotations": []}
        source.records.append(record)
        _read_xml(source, path, parsed.get(stem))
    return source


def _annotations(name: str, folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """XML files by their image's name; in folders below "Annotations", those of images in such folders alone; else in
    the folder itself; else in all folders below it."""
    found = {
        stem: path
        for stem, path in _below(folder / "Annotations", (".xml",)).items()
        if "/" not in stem or stem in images
    }
    found = found or {path.stem: path for path in sorted(folder.glob("*.xml"))}
    if found:
        return found
    for path in sorted(p for p in folder.glob("*/*.xml") if not p.parent.name.startswith(".")):
        other = found.setdefault(path.stem, path)
        require(other == path, name, f"'{other}' and '{path}' have the same name: give one of their folders as ROOT.")
    return found


def _below(folder: Path, types: Sequence[str]) -> dict[str, Path]:
    """Files by their name in PASCAL VOC's layout, which CVAT writes with the folders that images lay in."""
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk(folder, types)}


def _parse(path: Path) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError):
        return None


def _names(tree: ElementTree.Element) -> list[str]:
    return [text.strip() for node in tree.iter("object") if (text := node.findtext("name") or "").strip()]


def _read_xml(source: Source, path: Path | None, tree: ElementTree.Element | None) -> None:
    """Adds to the last record what its XML file holds."""
    record = source.records[-1]
    if tree is None:
        kind = "annotation missing" if path is None else "annotation unreadable"
        source.faults.append(Fault(kind, record, str(path or record["file_name"])))
        return
    for side in ("height", "width"):
        record[side] = _number(tree.findtext(f"size/{side}"))
    for node in tree.iter("object"):
        class_name = (node.findtext("name") or "").strip()
        try:
            x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{corner}") or "?") for corner in _CORNERS)
            # as Detectron2 does: pixels count from 1, the last one is inside
            box = enclosing([x0 - 1, y0 - 1, x1, y1], _rotation(node))
        except ValueError:
            source.faults.append(Fault("annotation unreadable", record, str(path)))
            continue
        if not class_name:
            source.faults.append(Fault("class unknown", record, str(path)))
            continue
        record["annotations"].append(
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": source.classes.index(class_name),
                "iscrowd": 0,
                "difficult": int(_is_true(node.findtext("difficult"))),
            }
        )


def _rotation(node: ElementTree.Element) -> float:
    """In degrees, as CVAT writes it."""
    for attribute in node.iterfind("attributes/attribute"):
        if attribute.findtext("name") == "rotation":
            try:
                return float(attribute.findtext("value") or 0)
            except ValueError:  # another tool's attribute of that name
                return 0.0
    return 0.0


def _number(text: str | None) -> int:
    try:
        return round(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _is_true(text: str | None) -> bool:
    """Whether a flag is set, written as a number or in words; "Unspecified" and nothing are not."""
    text = (text or "").strip().lower()
    try:
        return not math.isnan(float(text)) and float(text) != 0
    except ValueError:
        return text in ("true", "yes", "y")

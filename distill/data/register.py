"""Data sets of the user's own, registered from ``DATASETS.REGISTER``."""

import json
import os
from collections.abc import Sequence
from xml.etree import ElementTree

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc

from ..config import CLASS_NODES, detector_config
from ..errors import DistillError

_FORMS = "'name=voc:ROOT:SPLIT[:class,class,...]' or 'name=coco:JSON:IMAGE_ROOT'"
_NUM_FIELDS = {"voc": (2, 3), "coco": (2,)}
_VOC_TAGS = ("name", "pose", "truncated", "difficult", *(f"bndbox/{k}" for k in ("xmin", "ymin", "xmax", "ymax")))
_registered: dict[str, str] = {}  # name -> entry; a second registration of the same is fine


def register_datasets(entries: Sequence[str]) -> None:
    """Registers data sets with Detectron2.

    Args:
        entries: each ``name=voc:ROOT:SPLIT[:class,class,...]``, a folder in PASCAL VOC's layout, or
            ``name=coco:JSON:IMAGE_ROOT``. Classes that are not given are read from the annotations: sorted by name
            for VOC, by category id for COCO.

    Raises:
        DistillError: an entry has another form, a path does not exist, a split is empty, or a name is taken.
    """
    for entry in entries:
        name, _, source = str(entry).partition("=")
        kind, *fields = source.split(":")
        if _registered.get(name) == entry:
            continue
        if not name or kind not in ("voc", "coco") or not all(fields) or len(fields) not in _NUM_FIELDS[kind]:
            raise DistillError(f"DATASETS.REGISTER: {entry!r} is not of the form {_FORMS}.")
        if name in DatasetCatalog.list():
            raise DistillError(f"DATASETS.REGISTER: a data set named {name!r} exists already. Choose another name.")
        (_register_voc if kind == "voc" else _register_coco)(name, *fields)
        _registered[name] = entry


def check_datasets(cfg: CfgNode) -> None:
    """Checks the data sets that a config trains and tests on, before anything is loaded.

    Args:
        cfg: the full config; its data sets are registered.

    Raises:
        DistillError: there is no such data set, or its classes are not those of the others or not as many as the
            student's.
    """
    node = CLASS_NODES.get(detector_config(cfg).MODEL.META_ARCHITECTURE)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name in names:
        if name not in DatasetCatalog.list():
            raise DistillError(
                f"Unknown data set {name!r} in DATASETS. Register it in DATASETS.REGISTER as {_FORMS}, or use one that "
                f"Detectron2 knows (it looks below $DETECTRON2_DATASETS) or a digit_scenes one."
            )
        classes = MetadataCatalog.get(name).get("thing_classes")
        if node and classes and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise DistillError(
                f"The data set {name} has {len(classes)} classes ({', '.join(classes[:10])}"
                f"{', ...' if len(classes) > 10 else ''}), but MODEL.{node}.NUM_CLASSES is "
                f"{cfg.MODEL[node].NUM_CLASSES}. Set MODEL.{node}.NUM_CLASSES {len(classes)}."
            )
        others = MetadataCatalog.get(names[0]).get("thing_classes")
        if classes and others and list(classes) != list(others):
            raise DistillError(
                f"The data sets {names[0]} and {name} have different classes: {', '.join(others[:10])} and "
                f"{', '.join(classes[:10])}. Give both the same, in one order: name=voc:ROOT:SPLIT:class,class,..."
            )


def check_evaluators(names: Sequence[str]) -> None:
    """Checks that there is an evaluator for data sets.

    Args:
        names: of registered data sets.

    Raises:
        DistillError: one says neither "coco" nor "pascal_voc".
    """
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in ("coco", "pascal_voc"):
            raise DistillError(
                f"The data set {name} has the evaluator_type {kind!r}: expected 'coco' or 'pascal_voc' in its metadata."
            )


def _require(exists: bool, name: str, what: str, path: str, expected: str) -> None:
    if not exists:
        raise DistillError(f"DATASETS.REGISTER, {name}: the {what} {path!r} {expected}.")


def _register_voc(name: str, root: str, split: str, classes: str = "") -> None:
    _require(os.path.isdir(root), name, "folder", root, "does not exist")
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        path = os.path.join(root, folder)
        _require(os.path.isdir(path), name, "folder", path, "does not exist, which PASCAL VOC's layout has")
    list_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    splits = sorted(f.removesuffix(".txt") for f in os.listdir(os.path.dirname(list_file)))
    _require(os.path.isfile(list_file), name, "split", list_file, f"does not exist; there are: {', '.join(splits)}")
    with open(list_file) as f:
        ids = f.read().split()
    _require(bool(ids), name, "split", list_file, "is empty: expected the name of an image on each line")
    _require(len(ids) > 1, name, "split", list_file, "names one image; Detectron2 v0.6 reads two or more")
    for image_id in ids:
        image = os.path.join(root, "JPEGImages", f"{image_id}.jpg")
        _require(os.path.isfile(image), name, "image", image, "does not exist, but its split names it")
        annotation = os.path.join(root, "Annotations", f"{image_id}.xml")
        _require(os.path.isfile(annotation), name, "annotation", annotation, "does not exist, but its split names it")
    found = _voc_classes(name, root)  # of all splits, so that train and test agree
    class_names = classes.split(",") if classes else found
    others = [found_name for found_name in found if found_name not in class_names]
    if others:
        raise DistillError(
            f"DATASETS.REGISTER, {name}: its annotations contain the classes {', '.join(others)}, which are not among "
            f"{', '.join(class_names)}. Name all of them, or none to take them from the annotations."
        )
    # VOC 2007's metric differs from that of all later years
    year = 2007 if "2007" in os.path.basename(os.path.normpath(root)) else 2012
    register_pascal_voc(name, root, split, year, class_names)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"


def _voc_classes(name: str, root: str) -> list[str]:
    """The classes in all annotations of a folder; each must have what Detectron2's loader and evaluator read."""
    classes = set()
    for file in sorted(os.listdir(os.path.join(root, "Annotations"))):
        if not file.endswith(".xml"):
            continue
        path = os.path.join(root, "Annotations", file)
        try:
            for node in ElementTree.parse(path).iter("object"):
                lacking = [tag for tag in _VOC_TAGS if not node.findtext(tag)]
                _require(not lacking, name, "annotation", path, f"has an object without {', '.join(lacking)}")
                classes.add(node.findtext("name"))
        except ElementTree.ParseError as error:
            raise DistillError(f"DATASETS.REGISTER, {name}: the annotation {path!r} is not XML: {error}.") from error
    _require(bool(classes), name, "folder", root, "has no annotated object")
    return sorted(classes)


def _register_coco(name: str, json_file: str, image_root: str) -> None:
    _require(os.path.isfile(json_file), name, "file", json_file, "does not exist")
    _require(os.path.isdir(image_root), name, "folder of images", image_root, "does not exist")
    try:
        with open(json_file) as f:
            content = json.load(f)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        num_images, num_annotations = len(content["images"]), len(content["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(
            f"DATASETS.REGISTER, {name}: {json_file!r} is not COCO JSON (images, annotations, categories): {error!r}."
        ) from error
    _require(num_images > 0, name, "file", json_file, "lists no image")
    _require(num_annotations > 0, name, "file", json_file, "has no annotation: nothing to learn, nothing to evaluate")
    register_coco_instances(name, {}, json_file, image_root)
    MetadataCatalog.get(name).thing_classes = [category["name"] for category in categories]

"""Data sets of the user's own, registered from ``DATASETS.REGISTER``."""

import json
import os
from collections.abc import Sequence
from xml.etree import ElementTree

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc

from ..errors import DistillError

_FORMS = "'name=voc:ROOT:SPLIT[:class,class,...]' or 'name=coco:JSON:IMAGE_ROOT'"
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


_NUM_FIELDS = {"voc": (2, 3), "coco": (2,)}


def check_num_classes(cfg: CfgNode) -> None:
    """Compares the number of classes of the student with that of every data set it is trained and tested on.

    Args:
        cfg: the full config; its data sets are registered.

    Raises:
        DistillError: no such data set, or the numbers differ.
    """
    arch = cfg.MODEL.META_ARCHITECTURE
    if arch == "DistillationModel":
        arch = cfg.DISTILL.STUDENT.META_ARCHITECTURE
    node = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}.get(arch)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
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
    found = _voc_classes(name, root, ids)
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


def _voc_classes(name: str, root: str, ids: Sequence[str]) -> list[str]:
    classes = set()
    for image_id in ids:
        path = os.path.join(root, "Annotations", f"{image_id}.xml")
        _require(os.path.isfile(path), name, "annotation", path, "does not exist, but its split names it")
        try:
            classes.update(node.findtext("name") for node in ElementTree.parse(path).iter("object"))
        except ElementTree.ParseError as error:
            raise DistillError(f"DATASETS.REGISTER, {name}: the annotation {path!r} is not XML: {error}.") from error
    _require(bool(classes), name, "folder", root, "has no annotated object in this split")
    return sorted(classes)


def _register_coco(name: str, json_file: str, image_root: str) -> None:
    _require(os.path.isfile(json_file), name, "file", json_file, "does not exist")
    _require(os.path.isdir(image_root), name, "folder of images", image_root, "does not exist")
    try:
        with open(json_file) as f:
            content = json.load(f)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        num_images = len(content["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(
            f"DATASETS.REGISTER, {name}: {json_file!r} is not COCO JSON (images, annotations, categories): {error!r}."
        ) from error
    _require(num_images > 0, name, "file", json_file, "lists no image")
    register_coco_instances(name, {}, json_file, image_root)
    MetadataCatalog.get(name).thing_classes = [category["name"] for category in categories]

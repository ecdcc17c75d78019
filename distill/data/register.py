"""Datasets of the user's own, registered from ``DATASETS.REGISTER``."""

import logging
import pickle
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import CLASS_NODES, detector_config, family
from ..errors import DistillError
from .check import MODES, check_source
from .formats import Source, read_coco, read_voc, read_yolo

logger = logging.getLogger(__name__)

_FORMS = "'name=voc:ROOT:SPLIT[:class,class,...]', 'name=coco:JSON:IMAGE_ROOT[:SPLIT]' or 'name=yolo:data.yaml:SPLIT'"
_READERS = {"voc": (read_voc, (2, 3)), "coco": (read_coco, (2, 3)), "yolo": (read_yolo, (2,))}
_EVALUATORS = {"": "", "coco": "coco", "voc": "pascal_voc"}
_registered: dict[str, tuple] = {}  # name -> what was asked for; a second registration of the same is fine


def register_datasets(
    entries: Sequence[str], check: str = "error", metric: str = "", load_truncated: bool = False
) -> None:
    """Registers datasets with Detectron2, after a look at their images and boxes.

    Args:
        entries: each ``name=voc:ROOT:SPLIT[:class,class,...]``, ``name=coco:JSON:IMAGE_ROOT[:SPLIT]`` or
            ``name=yolo:data.yaml:SPLIT``. See :mod:`distill.data.formats` for the layouts that are read.
        check: DATASETS.CHECK, see :func:`distill.data.check.check_source`.
        metric: DATASETS.METRIC: "coco", "voc", or "" for the format's own (YOLO's is COCO's).
        load_truncated: whether images that are cut off are used as far as they go.

    Raises:
        DistillError: an entry has another form, its files are missing or faulty, or a name is taken.
    """
    if check not in MODES:
        raise DistillError(f"DATASETS.CHECK is {check!r}: expected one of {', '.join(MODES)}.")
    if metric not in _EVALUATORS:
        raise DistillError(f"DATASETS.METRIC is {metric!r}: expected coco, voc, or nothing for the format's own.")
    for entry in entries:
        name, _, text = str(entry).partition("=")
        kind, *fields = text.split(":")
        wanted = (entry, check, metric, load_truncated)
        if _registered.get(name) == wanted:
            continue
        if not name or kind not in _READERS or not all(fields) or len(fields) not in _READERS[kind][1]:
            raise DistillError(f"DATASETS.REGISTER: {entry!r} is not of the form {_FORMS}.")
        if name in DatasetCatalog.list():
            raise DistillError(f"DATASETS.REGISTER: a dataset named {name!r} exists already. Choose another name.")
        source = _READERS[kind][0](name, *fields)
        check_source(name, source, check, load_truncated)
        _register(name, source, _EVALUATORS[metric])
        _registered[name] = wanted


def register_from_config(cfg: CfgNode, names: Sequence[str] = ()) -> None:
    """Registers DATASETS.REGISTER as the config's other keys say.

    Args:
        cfg: the full config.
        names: the datasets that are needed, such as DATASETS.TEST; empty for all.

    Raises:
        DistillError: see :func:`register_datasets`, or INPUT.TRUNCATED is unknown.
    """
    truncated = cfg.INPUT.TRUNCATED
    if truncated not in ("error", "load"):
        raise DistillError(f"INPUT.TRUNCATED is {truncated!r}: expected error or load.")
    entries = [x for x in cfg.DATASETS.REGISTER if not names or str(x).partition("=")[0] in names]
    register_datasets(entries, cfg.DATASETS.CHECK, cfg.DATASETS.METRIC, truncated == "load")


def _register(name: str, source: Source, evaluator_type: str) -> None:
    records = source.records
    annotations = [a for record in records for a in record["annotations"]]
    objects = sum(not a.get("iscrowd") for a in annotations)
    if not objects:
        crowds = f" but {len(annotations)} crowds. CVAT marks brush masks so: set iscrowd to 0 in the JSON where an "
        raise DistillError(
            f"DATASETS.REGISTER, {name}: its {len(records)} images have no annotated object"
            + (f"{crowds}annotation is of one object." if annotations else ": expected one at least.")
        )
    # a copy each time, since mappers may change records; as bytes, which take a fifth of the memory meanwhile
    content = pickle.dumps(records, pickle.HIGHEST_PROTOCOL)
    DatasetCatalog.register(name, lambda: pickle.loads(content))
    metadata = {**source.metadata, **({"json_file": source.json_file} if source.json_file else {})}
    if not source.json_file:
        metadata.pop("thing_dataset_id_to_contiguous_id", None)
    encodings = {
        "rle" if isinstance(a["segmentation"], dict) else "polygon"
        for a in annotations
        if "segmentation" in a and not a.get("iscrowd")  # which no mapper uses
    }
    MetadataCatalog.get(name).set(
        thing_classes=source.classes,
        evaluator_type=evaluator_type or source.evaluator_type,
        masks=sorted(encodings),
        **metadata,
    )
    logger.info(f"{name}: {len(records)} images, {objects} objects of {len(source.classes)} classes")


def check_datasets(cfg: CfgNode, is_training: bool = True) -> None:
    """Checks the datasets that a config trains and tests on, before anything is loaded.

    Args:
        cfg: the full config; its datasets are registered.
        is_training: False if it is evaluated only, so that what it trains on need not be there.

    Raises:
        DistillError: there is no such dataset, its classes are not those of the others or not as many as the
            student's, or it has no masks as the student needs them, or no keypoints.
    """
    node = CLASS_NODES.get(family(detector_config(cfg).MODEL.META_ARCHITECTURE))
    trained_on = cfg.DATASETS.TRAIN if is_training else ()
    names = (*trained_on, *cfg.DATASETS.TEST)
    for name in names:
        if name not in DatasetCatalog.list():
            raise DistillError(
                f"Unknown dataset {name!r} in DATASETS. Register it in DATASETS.REGISTER as {_FORMS}, or use one that "
                f"Detectron2 knows (it looks below $DETECTRON2_DATASETS) or a digit_scenes one."
            )
    for name in names[1:]:
        _check_same_classes(names[0], name)
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if node and classes and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise DistillError(
                f"The dataset {name} has {len(classes)} classes ({', '.join(classes[:10])}"
                f"{', ...' if len(classes) > 10 else ''}), but MODEL.{node}.NUM_CLASSES is "
                f"{cfg.MODEL[node].NUM_CLASSES}. Set MODEL.{node}.NUM_CLASSES {len(classes)}."
            )
    for name in names if cfg.MODEL.KEYPOINT_ON else ():
        if MetadataCatalog.get(name).get("masks") is not None:  # read by us
            raise DistillError(
                f"The dataset {name} was read without keypoints, and MODEL.KEYPOINT_ON is True. Register it by "
                "Detectron2's register_coco_instances, with keypoint_names and keypoint_flip_map in its metadata, in a "
                "module of DISTILL.IMPORTS."
            )
    for name in names if cfg.MODEL.MASK_ON else ():
        masks = MetadataCatalog.get(name).get("masks")
        is_trained_on = name in trained_on
        if masks == [] and (is_trained_on or MetadataCatalog.get(name).evaluator_type == "coco"):
            raise DistillError(
                f"The dataset {name} has boxes alone, but the model has a mask head: expected polygons or masks to "
                f"{'train on' if is_trained_on else 'evaluate by'}. Set MODEL.MASK_ON False."
            )
        if is_trained_on and "rle" in (masks or []) and cfg.INPUT.MASK_FORMAT == "polygon":
            raise DistillError(
                f"The dataset {name} has run-length encoded masks, but INPUT.MASK_FORMAT is polygon. Set "
                "INPUT.MASK_FORMAT bitmask."
            )


def _check_same_classes(name: str, other: str) -> None:
    classes, others = (MetadataCatalog.get(x).get("thing_classes") for x in (name, other))
    if not (classes and others) or list(classes) == list(others):
        return
    differences = [
        f"{known} has {', '.join(alone[:10])}{', ...' if len(alone) > 10 else ''}, which {unknown} has not"
        for known, unknown, alone in (
            (name, other, [x for x in classes if x not in others]),
            (other, name, [x for x in others if x not in classes]),
        )
        if alone
    ]
    raise DistillError(
        f"The datasets {name} and {other} have different classes: {'; '.join(differences) or 'in another order'}. Give "
        "both the same, in one order: for VOC by name=voc:ROOT:SPLIT:class,class,..., in COCO's JSON the categories "
        "and their ids, for YOLO the names."
    )

"""The evaluator of each kind of dataset: Detectron2's own."""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.utils import comm

from .data.formats import read_voc
from .errors import DistillError

# evaluator_type: the packages that it needs
_TYPES = {
    "coco": (),
    "pascal_voc": (),
    "lvis": ("lvis",),
    "cityscapes_instance": ("cityscapesscripts",),
    "cityscapes_sem_seg": ("cityscapesscripts",),
    "sem_seg": (),
    "coco_panoptic_seg": ("panopticapi",),
}
_SOURCES = {"panopticapi": "git+https://github.com/cocodataset/panopticapi.git"}  # it is in no package index


def check_evaluators(names: Sequence[str]) -> None:
    """Checks that there is an evaluator for datasets.

    Args:
        names: of registered datasets.

    Raises:
        DistillError: a dataset says none that is known, or one whose package is not installed.
    """
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in _TYPES:
            raise DistillError(
                f"The dataset {name} has the evaluator_type {kind!r}: expected one of {', '.join(_TYPES)} in its "
                "metadata. To train without an evaluation, set DATASETS.TEST '()'."
            )
        for package in _TYPES[kind]:
            if importlib.util.find_spec(package) is None:
                raise DistillError(
                    f"To evaluate on {name} ({kind}), install the package {package}: "
                    f"pip install {_SOURCES.get(package, package)}"
                )


def forget_cached(name: str, folder: str) -> None:
    """Removes the ground truth that Detectron2's COCO evaluator wrote in an earlier run, and would take again though
    annotations or images have changed since. All processes call it.

    Args:
        name: a registered dataset.
        folder: where the evaluator writes.
    """
    if MetadataCatalog.get(name).get("json_file"):  # which it reads instead
        return
    if comm.is_main_process():
        Path(folder, f"{name}_coco_format.json").unlink(missing_ok=True)
    comm.synchronize()


def build_evaluator(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """The evaluator of a dataset's ``evaluator_type``, as in Detectron2's ``tools/train_net.py``.

    Args:
        cfg: the config.
        name: a registered dataset.
        folder: where it writes.

    Returns:
        Detectron2's evaluator.

    Raises:
        DistillError: see :func:`check_evaluators`.
    """
    check_evaluators([name])
    kind = MetadataCatalog.get(name).evaluator_type
    found: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        found.append(SemSegEvaluator(name, distributed=True, output_dir=folder))
    if kind in ("coco", "coco_panoptic_seg"):
        sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        forget_cached(name, folder)
        found.append(COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=sigmas))
    if kind == "coco_panoptic_seg":
        found.append(COCOPanopticEvaluator(name, folder))
    if kind == "cityscapes_instance":
        found.append(CityscapesInstanceEvaluator(name))
    if kind == "cityscapes_sem_seg":
        found.append(CityscapesSemSegEvaluator(name))
    if kind == "lvis":
        found.append(LVISEvaluator(name, output_dir=folder))
    if kind == "pascal_voc":
        found.append(VOCEvaluator(name))
    return found[0] if len(found) == 1 else DatasetEvaluators(found)


class VOCEvaluator(DatasetEvaluator):
    """PASCAL VOC's metric as Detectron2 computes it, on annotations of any tool.

    Detectron2's evaluator reads XML files by itself, with whole numbers and plain names. It is given such files, in a
    folder of its own. A class without an object in the test set has no average precision, as in COCO's metric; objects
    that are difficult, or crowds, are not looked for.

    Args:
        name: a registered dataset.
    """

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="voc_")
        meta = MetadataCatalog.get(name)
        if meta.get("dirname"):  # Detectron2's own registration drops what is difficult
            records = read_voc(name, meta.dirname, meta.split, meta.thing_classes).records
        else:
            records = DatasetCatalog.get(name)
        present = {a["category_id"] for record in records for a in record["annotations"] if not _is_difficult(a)}
        self._classes = {number: index for index, number in enumerate(sorted(present))}
        # images and classes are numbers there: names may have what it splits lines at, and be too long for a file's
        self._images = {str(record["image_id"]): str(index) for index, record in enumerate(records)}
        names = [str(index) for index in self._classes.values()]
        if comm.is_main_process():  # which alone reads them
            _write_voc(Path(self._folder.name), records, self._classes)
        plain = f"{name} (as VOC)"
        MetadataCatalog.get(plain).set(
            dirname=self._folder.name, split="test", year=meta.get("year", 2012), thing_classes=names
        )
        self._evaluator = PascalVOCDetectionEvaluator(plain)
        MetadataCatalog.remove(plain)

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for x, y in zip(inputs, outputs, strict=True):
            found = y["instances"].to("cpu")
            found = found[[number in self._classes for number in found.pred_classes.tolist()]]
            found.pred_classes = found.pred_classes.new_tensor([self._classes[n] for n in found.pred_classes.tolist()])
            image_id = self._images[str(x["image_id"])]
            self._evaluator.process([{**x, "image_id": image_id}], [{"instances": found}])

    def evaluate(self) -> dict | None:
        results = self._evaluator.evaluate()
        parse_rec.cache_clear()  # keeps what it read by the names of files, which are others the next time
        return results


def _is_difficult(annotation: dict) -> bool:
    return bool(annotation.get("difficult") or annotation.get("iscrowd"))


def _write_voc(folder: Path, records: list[dict], classes: dict[int, int]) -> None:
    """Images and classes under their numbers, of the classes those that are given."""
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{index}\n" for index in range(len(records))))
    for index, record in enumerate(records):
        tree = ElementTree.Element("annotation")
        for annotation in record["annotations"]:
            if annotation["category_id"] not in classes:
                continue
            node = ElementTree.SubElement(tree, "object")
            x0, y0, x1, y1 = annotation["bbox"]
            texts = {"name": classes[annotation["category_id"]], "pose": "", "truncated": 0}
            for key, value in {**texts, "difficult": int(_is_difficult(annotation))}.items():
                ElementTree.SubElement(node, key).text = str(value)
            box = ElementTree.SubElement(node, "bndbox")
            corners = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}
            for key, value in corners.items():
                ElementTree.SubElement(box, key).text = str(round(value))
        ElementTree.ElementTree(tree).write(folder / "Annotations" / f"{index}.xml")

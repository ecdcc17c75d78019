"""One dataset in three formats, by either metric: what is right has an AP of 100, what is missed counts."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, Instances

from distill.data import register_from_config
from distill.errors import DistillError
from distill.evaluation import build_evaluator
from tests.data.test_formats import H, W, draw, xml
from tests.data.test_register import unregister  # noqa: F401  a fixture
from tests.data.test_yolo import write_yolo
from tests.helpers import detector_cfg, set_all

BOXES = {"a": [4, 6, 20, 16], "b": [1, 2, 30, 22], "c": [10, 3, 25, 29]}


def write(folder, kind):
    """Three images with one object each; returns the entry to register without its name."""
    for name in BOXES:
        draw(folder / f"{name}.png")
    if kind == "voc":
        for name, (x0, y0, x1, y1) in BOXES.items():
            (folder / f"{name}.xml").write_text(xml(box=(x0 + 1, y0 + 1, x1, y1)))
        return f"voc:{folder}:all"
    if kind == "yolo":
        for name, (x0, y0, x1, y1) in BOXES.items():
            values = (x0 + x1) / 2 / W, (y0 + y1) / 2 / H, (x1 - x0) / W, (y1 - y0) / H
            (folder / f"{name}.txt").write_text("0 " + " ".join(map(str, values)))
        (folder / "classes.txt").write_text("cell")
        return f"yolo:{folder}:all"
    images = [{"id": name, "file_name": f"{name}.png", "width": W, "height": H} for name in BOXES]
    annotations = [
        {"image_id": name, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for name, (x0, y0, x1, y1) in BOXES.items()
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    return f"coco:{folder}/coco.json:{folder}"


def evaluate(cfg, name, folder, drop=0):
    evaluator = build_evaluator(cfg, name, str(folder))
    evaluator.reset()
    for index, record in enumerate(DatasetCatalog.get(name)):
        found = Instances((H, W))
        boxes = [annotation["bbox"] for annotation in record["annotations"]] if index >= drop else []
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.scores = torch.full((len(boxes),), 0.9)
        found.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("metric", ["", "coco", "voc"])
@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_every_format_by_every_metric(tmp_path, kind, metric, unregister):  # noqa: F811
    cfg = detector_cfg("retinanet", **{"DATASETS.METRIC": metric})
    cfg.DATASETS.REGISTER = [f"cells={write(tmp_path / 'data', kind)}"]
    register_from_config(cfg)
    is_voc = (metric or kind) == "voc"
    assert MetadataCatalog.get("cells").evaluator_type == ("pascal_voc" if is_voc else "coco")
    assert [r["annotations"][0]["bbox"] for r in DatasetCatalog.get("cells")] == [
        pytest.approx(box) for box in BOXES.values()
    ]
    assert evaluate(cfg, "cells", tmp_path)["AP"] == pytest.approx(100)
    assert evaluate(cfg, "cells", tmp_path, drop=1)["AP"] == pytest.approx(67, abs=1)
    assert parse_rec.cache_info().currsize == 0  # or every evaluation would add what it read


def test_an_earlier_runs_json_is_not_taken(tmp_path, unregister):  # noqa: F811
    cfg = detector_cfg("retinanet")
    cfg.DATASETS.REGISTER = [f"cells={write(tmp_path / 'data', 'yolo')}"]
    register_from_config(cfg)
    wrong = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "cell"}], "info": {}}
    (tmp_path / "cells_coco_format.json").write_text(json.dumps(wrong))
    assert evaluate(cfg, "cells", tmp_path)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("DATASETS.CHECK", "warn", "DATASETS.CHECK is 'warn': expected one of error, skip, off"),
        ("DATASETS.METRIC", "lvis", "DATASETS.METRIC is 'lvis': expected coco, voc"),
        ("INPUT.TRUNCATED", "yes", "INPUT.TRUNCATED is 'yes': expected error or load"),
    ],
)
def test_unknown_values_are_named(key, value, message):
    cfg = detector_cfg("retinanet")
    set_all(cfg, {key: value})
    with pytest.raises(DistillError, match=message):
        register_from_config(cfg)


def test_a_data_set_without_an_object_is_refused(tmp_path, unregister):  # noqa: F811
    path = write_yolo(tmp_path)
    (tmp_path / "valid/labels/c.txt").write_text("")
    cfg = detector_cfg("retinanet")
    cfg.DATASETS.REGISTER = [f"cells=yolo:{path}:valid"]
    with pytest.raises(DistillError, match="its 1 images have no annotated object"):
        register_from_config(cfg)


def test_an_object_of_id_0_is_found(tmp_path, unregister):  # noqa: F811
    """Label Studio counts from 0, which pycocotools takes for no object."""
    cfg = detector_cfg("retinanet")
    cfg.DATASETS.REGISTER = [f"cells={write(tmp_path / 'data', 'coco')}"]
    path = tmp_path / "data" / "coco.json"
    content = json.loads(path.read_text())
    for index, annotation in enumerate(content["annotations"]):
        annotation.update(id=index, image_id=index, area=1.0, iscrowd=0)
        content["images"][index]["id"] = index
    path.write_text(json.dumps(content))
    register_from_config(cfg)
    assert not getattr(MetadataCatalog.get("cells"), "json_file", None)  # which would be evaluated as it is
    assert evaluate(cfg, "cells", tmp_path)["AP"] == pytest.approx(100)

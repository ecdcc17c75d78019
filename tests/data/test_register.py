"""Datasets from the config, and the error of each mistake."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from distill.config import num_classes
from distill.data import CheckedMapper, check_datasets, register_datasets
from distill.errors import DistillError
from distill.evaluation import check_evaluators
from distill.recipes import YamlRecipe
from tests.helpers import NUM_CLASSES, detector_cfg, set_all
from tests.test_train_net import make_voc


@pytest.fixture(autouse=True)
def unregister():
    """Removes what a test registered."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        from distill.data import register

        register._registered.pop(name, None)


def write_coco(folder, num_images=1):
    content = {
        "images": [{"id": i + 1, "file_name": "a.jpg", "width": 8, "height": 8} for i in range(num_images)],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 4, "name": "apple"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return f"{folder}/coco.json"


def test_voc_classes_are_read_and_sorted(tmp_path):
    make_voc(tmp_path)
    xml = tmp_path / "Annotations" / "0.xml"
    xml.write_text(xml.read_text().replace("cell", "atom"))
    register_datasets([f"v=voc:{tmp_path}:train"])
    meta = MetadataCatalog.get("v")
    assert meta.thing_classes == ["atom", "cell"] and meta.evaluator_type == "pascal_voc" and meta.year == 2012
    records = DatasetCatalog.get("v")
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1, 1, 1]


def test_voc_2007_and_given_classes(tmp_path):
    make_voc(tmp_path / "VOC2007")
    register_datasets([f"v=voc:{tmp_path}/VOC2007/:train:other,cell"])
    assert MetadataCatalog.get("v").year == 2007 and MetadataCatalog.get("v").thing_classes == ["other", "cell"]


def test_coco_classes_are_sorted_by_id(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    register_datasets([f"c=coco:{write_coco(tmp_path)}:{tmp_path}"])
    assert MetadataCatalog.get("c").thing_classes == ["apple", "zebra"]
    assert MetadataCatalog.get("c").evaluator_type == "coco" and len(DatasetCatalog.get("c")) == 1


def test_classes_are_those_of_all_splits(tmp_path):
    make_voc(tmp_path, num_images=4)
    xml = tmp_path / "Annotations" / "0.xml"
    xml.write_text(xml.read_text().replace("cell", "atom"))
    (tmp_path / "ImageSets/Main/test.txt").write_text("2\n3\n")
    register_datasets([f"a=voc:{tmp_path}:train", f"b=voc:{tmp_path}:test"])
    assert MetadataCatalog.get("a").thing_classes == MetadataCatalog.get("b").thing_classes == ["atom", "cell"]


def test_train_and_test_of_different_classes_are_refused(tmp_path):
    make_voc(tmp_path / "a")
    make_voc(tmp_path / "b")
    register_datasets([f"a=voc:{tmp_path}/a:train", f"b=voc:{tmp_path}/b:train:cell"])
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DATASETS.TRAIN": ["a"], "DATASETS.TEST": ["b"], "MODEL.ROI_HEADS.NUM_CLASSES": 1})
    check_datasets(cfg)
    MetadataCatalog.remove("b")
    MetadataCatalog.get("b").set(thing_classes=["dog"], evaluator_type="pascal_voc")
    with pytest.raises(
        DistillError, match="a and b have different classes: a has cell, which b has not; b has dog, which a has not"
    ):
        check_datasets(cfg)
    for name, classes in (("a", ["cell", "dog"]), ("b", ["dog", "cell"])):  # the numbers mean other classes
        MetadataCatalog.remove(name)
        MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="pascal_voc")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(DistillError, match="a and b have different classes: in another order"):
        check_datasets(cfg)


def test_a_test_set_without_an_evaluator_is_refused(tmp_path):
    make_voc(tmp_path)
    register_datasets([f"a=voc:{tmp_path}:train"])
    MetadataCatalog.remove("a")
    MetadataCatalog.get("a").set(thing_classes=["cell"], evaluator_type="boundaries")
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DATASETS.TRAIN": [], "DATASETS.TEST": ["a"], "MODEL.ROI_HEADS.NUM_CLASSES": 1})
    check_datasets(cfg)
    with pytest.raises(DistillError, match="evaluator_type 'boundaries'"):
        check_evaluators(cfg.DATASETS.TEST)
    MetadataCatalog.remove("a")
    MetadataCatalog.get("a").set(thing_classes=["cell"], evaluator_type="cityscapes_instance")
    with pytest.raises(DistillError, match="install the package cityscapesscripts: pip install cityscapesscripts$"):
        check_evaluators(cfg.DATASETS.TEST)
    MetadataCatalog.remove("a")
    MetadataCatalog.get("a").set(thing_classes=["cell"], evaluator_type="coco_panoptic_seg")
    with pytest.raises(DistillError, match="install the package panopticapi: pip install git[+]https://github.com/"):
        check_evaluators(cfg.DATASETS.TEST)


def test_an_object_without_a_class_is_named(tmp_path):
    make_voc(tmp_path)
    xml = tmp_path / "Annotations" / "3.xml"
    xml.write_text(xml.read_text().replace("<name>", "<label>").replace("</name>", "</label>"))
    with pytest.raises(DistillError, match="1 annotations have no class, or one that is not declared: .*3.xml"):
        register_datasets([f"v=voc:{tmp_path}:train"])


def test_the_same_entry_twice_is_fine_and_another_of_that_name_is_not(tmp_path):
    make_voc(tmp_path)
    entry = f"v=voc:{tmp_path}:train"
    register_datasets([entry, entry])
    with pytest.raises(DistillError, match="'v' exists already"):
        register_datasets([entry + ":cell"])
    with pytest.raises(DistillError, match="'coco_2017_val' exists already"):
        register_datasets([f"coco_2017_val=voc:{tmp_path}:train"])


@pytest.mark.parametrize(
    "entry, message",
    [
        ("v=voc:{root}", "not of the form"),
        ("voc:{root}:train", "not of the form"),
        ("v=kitti:{root}:train", "not of the form 'name=voc:"),
        ("v=yolo:{root}:train", "has no list of classes"),
        ("v=voc:{root}/no:train", "folder '.*/no' does not exist"),
        ("v=voc:{root}/Annotations:train", "there is no split 'train': expected all, a share"),
        ("v=voc:{root}:val", "no split 'val': expected .* Lists in .*: bare, empty, lost, train"),
        ("v=voc:{root}:empty", "split '.*empty.txt' is empty"),
        ("v=voc:{root}:lost", "1 images do not exist: .*99.jpg"),
        ("v=voc:{root}:bare", "1 images of the split have no annotation: .*98.jpg"),
        ("v=coco:{root}/unlabelled.json:{root}", "has no annotation"),
        ("v=voc:{root}:train:dog", "contain the classes cell, which are not among dog"),
        ("v=coco:{root}/no.json:{root}", "file '.*no.json' does not exist"),
        ("v=coco:{root}/none.json:{root}", "lists no image"),
        ("v=coco:{root}/bad.json:{root}", "is not COCO JSON"),
        ("v=coco:{root}/none.json:{root}/no", "folder of images '.*no' does not exist"),
    ],
)
def test_mistakes_are_named(tmp_path, entry, message):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Main/empty.txt").write_text("\n")
    (tmp_path / "ImageSets/Main/lost.txt").write_text("0\n99\n")
    (tmp_path / "ImageSets/Main/bare.txt").write_text("0\n98\n")
    (tmp_path / "JPEGImages/98.jpg").write_bytes(b"")
    unlabelled = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [], "annotations": []}
    (tmp_path / "unlabelled.json").write_text(json.dumps(unlabelled))
    (tmp_path / "bad.json").write_text("{}")
    write_coco(tmp_path, num_images=0)
    (tmp_path / "coco.json").rename(tmp_path / "none.json")
    with pytest.raises(DistillError, match=message):
        register_datasets([entry.format(root=tmp_path)])


@pytest.mark.parametrize("kind, key", [("faster_rcnn", "ROI_HEADS"), ("retinanet", "RETINANET"), ("fcos", "FCOS")])
def test_another_number_of_classes_is_an_error_that_names_both_and_the_fix(kind, key):
    cfg = detector_cfg(kind)
    set_all(cfg, {"DATASETS.TRAIN": ["digit_scenes_train"], "DATASETS.TEST": []})
    expected = rf"10 classes .*MODEL.{key}.NUM_CLASSES is {NUM_CLASSES}. Set MODEL.{key}.NUM_CLASSES 10"
    with pytest.raises(DistillError, match=expected):
        check_datasets(cfg)
    cfg.MODEL[key].NUM_CLASSES = 10
    check_datasets(cfg)


@pytest.mark.parametrize(
    "masks, mask_format, splits, metric, message",
    [
        ("none", "polygon", ["TRAIN"], "", "m has boxes alone, .* to train on. Set MODEL.MASK_ON False"),
        ("none", "polygon", ["TEST"], "", "m has boxes alone, .* to evaluate by. Set MODEL.MASK_ON False"),
        ("none", "polygon", ["TEST"], "voc", None),  # PASCAL VOC's metric is that of boxes
        ("rle", "polygon", ["TRAIN"], "", "run-length encoded masks, .* Set INPUT.MASK_FORMAT bitmask"),
        ("rle", "polygon", ["TEST"], "", None),
        ("rle", "bitmask", ["TRAIN", "TEST"], "", None),
        ("polygon", "polygon", ["TRAIN", "TEST"], "", None),
        ("polygon and a crowd", "polygon", ["TRAIN", "TEST"], "", None),
    ],
)
def test_a_mask_rcnn_wants_masks_that_it_can_read(tmp_path, masks, mask_format, splits, metric, message):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    rle = mask_util.encode(np.asfortranarray(np.ones((30, 40), np.uint8)))
    mask = {"rle": {"size": [30, 40], "counts": rle["counts"].decode()}, "polygon": [[2, 2, 20, 2, 20, 20]]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 18, 18], "area": 9, "iscrowd": 0}
    crowd = {**annotation, "id": 2, "iscrowd": 1, "segmentation": mask["rle"]}  # as COCO's own are
    own = masks.split()[0]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{**annotation, **({"segmentation": mask[own]} if own in mask else {})}],
    }
    content["annotations"] += [crowd] * ("crowd" in masks)
    (tmp_path / "m.json").write_text(json.dumps(content))
    register_datasets([f"m=coco:{tmp_path}/m.json:{tmp_path}"], metric=metric)
    cfg = detector_cfg("mask_rcnn", **{"MODEL.ROI_HEADS.NUM_CLASSES": 1, "INPUT.MASK_FORMAT": mask_format})
    set_all(cfg, {"DATASETS.TRAIN": [], "DATASETS.TEST": [], **{f"DATASETS.{split}": ["m"] for split in splits}})
    if message:
        with pytest.raises(DistillError, match=message):
            check_datasets(cfg)
    else:
        check_datasets(cfg)


def test_keypoints_are_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    register_datasets([f"k=coco:{write_coco(tmp_path)}:{tmp_path}"])
    cfg = detector_cfg("faster_rcnn", **{"MODEL.ROI_HEADS.NUM_CLASSES": 2, "DATASETS.TRAIN": ["k"]})
    check_datasets(cfg)
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(DistillError, match="dataset k was read without keypoints, and MODEL.KEYPOINT_ON is True"):
        check_datasets(cfg)


def test_a_detector_that_is_derived_is_checked_like_its_parent(tmp_path):
    cfg = detector_cfg(
        "mask_rcnn", **{"MODEL.META_ARCHITECTURE": "PanopticFPN", "DATASETS.TRAIN": ["digit_scenes_train"]}
    )
    with pytest.raises(DistillError, match="10 classes .*MODEL.ROI_HEADS.NUM_CLASSES"):
        check_datasets(cfg)
    assert num_classes(cfg) == NUM_CLASSES


def test_crowds_alone_are_no_objects(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 18, 18], "area": 9, "iscrowd": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [annotation, {**annotation, "id": 2}],
    }
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(DistillError, match="1 images have no annotated object but 2 crowds. .* set iscrowd to 0 in"):
        register_datasets([f"m=coco:{tmp_path}/m.json:{tmp_path}"])


def test_an_unknown_data_set_is_named():
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DATASETS.TRAIN": ["nothing"]})
    with pytest.raises(DistillError, match="Unknown dataset 'nothing'"):
        check_datasets(cfg)


def test_an_unreadable_image_is_named(tmp_path):
    mapper = CheckedMapper(DatasetMapper(detector_cfg("faster_rcnn"), is_train=True))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(DistillError, match="Cannot read the image '.*bad.jpg'"):
        mapper({"file_name": str(tmp_path / "bad.jpg"), "annotations": []})
    tester = CheckedMapper(DatasetMapper(detector_cfg("faster_rcnn"), is_train=False))
    with pytest.raises(DistillError, match="Cannot read the image '.*gone.jpg'"):
        tester({"file_name": str(tmp_path / "gone.jpg")})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda record: int("no number"), r"The mapper failed on the image 'a.png': ValueError: .*no number.*test_reg"),
        (
            lambda record: Path("no_such_mask.png").read_bytes(),
            "The mapper failed on .*a.png': FileNotFoundError: .*no_such_mask.png",
        ),
        (lambda record: Image.open(record["truncated"]).convert("RGB"), "Cannot read the image 'a.png': "),
        (lambda record: Path(record["file_name"]).read_bytes(), "Cannot read the image 'a.png': .*No such file"),
        (lambda record: CheckedMapper(lambda x: int("x"))({"file_name": "b.png"}), "^The mapper failed on .*'b.png'"),
    ],
)
def test_what_a_mapper_of_ones_own_raises_is_not_blamed_on_the_image(tmp_path, call, message):
    Image.new("RGB", (400, 300), "red").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(DistillError, match=message):
        CheckedMapper(call)({"file_name": "a.png", "truncated": tmp_path / "cut.jpg"})


def test_a_recipes_own_mapper_reads_the_training_images(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 18, 18], "area": 9, "iscrowd": 0}],
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    register_datasets([f"own_mapper=coco:{tmp_path}/own.json:{tmp_path}"])
    cfg = detector_cfg("faster_rcnn", **{"DATASETS.TRAIN": ["own_mapper"], "SOLVER.IMS_PER_BATCH": 1})

    class MyRecipe(YamlRecipe):
        def build_train_mapper(self):
            return lambda record: {**record, "own": True}

    (read,) = next(iter(MyRecipe(cfg).build_train_loader(num_workers=0)))
    assert read["own"] and "image" not in read

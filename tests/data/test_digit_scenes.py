"""The composed dataset: deterministic, disjoint, consistent, and complete or absent."""

import contextlib
import json
import multiprocessing
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import distill.data  # noqa: F401  registers the dataset
from distill.data import digit_scenes
from distill.errors import DistillError


def test_same_index_same_scene():
    first, second = (digit_scenes.SceneComposer("train") for _ in range(2))
    second.compose(1)  # what was composed before plays no part
    for a, b in zip(first.compose(5), second.compose(5)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not np.array_equal(np.asarray(first.compose(5)[0]), np.asarray(first.compose(6)[0]))


def test_train_and_val_draw_from_disjoint_digits():
    train, val = (digit_scenes.SceneComposer(split) for split in ("train", "val"))
    assert not set(train.indices) & set(val.indices) and len(train.indices) + len(val.indices) == len(train.labels)
    assert set(val.labels[val.indices]) == set(range(10))


def test_masks_are_disjoint_and_small_and_crowded_digits_occur():
    composer = digit_scenes.SceneComposer("val")
    widths, counts = [], []
    for index in range(40):
        image, masks, classes = composer.compose(index)
        assert image.size == (128, 128) and len(masks) == len(classes)
        assert masks.sum(0).max() <= 1 and all(m.sum() > 0 for m in masks)
        boxes = [digit_scenes._bounding_box(m) for m in masks]
        widths += [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]
        counts.append(len(masks))
    assert min(widths) < 16 and max(widths) > 40 and max(counts) >= 6


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A dataset of a few images in a cache of its own."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setitem(digit_scenes.SETTINGS, "images", {"train": 3, "val": 4})
    return tmp_path


def test_coco_and_voc_describe_the_same(small):
    folder = digit_scenes.prepare_digit_scenes()
    coco = json.loads((folder / "instances_val.json").read_text())
    assert len(coco["images"]) == 4 and len(coco["categories"]) == 10
    for image in coco["images"]:
        stem = image["file_name"].removesuffix(".jpg")
        width, height = Image.open(folder / "JPEGImages" / image["file_name"]).size
        annotations = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        objects = list(ElementTree.parse(folder / "Annotations" / f"{stem}.xml").iter("object"))
        assert len(annotations) == len(objects)
        for annotation, node in zip(annotations, objects):
            assert node.findtext("name") == str(annotation["category_id"] - 1)
            x0, y0, w, h = annotation["bbox"]
            corners = [int(node.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [x0 + 1, y0 + 1, x0 + w, y0 + h] and x0 + w <= width and y0 + h <= height
            mask = mask_util.decode(annotation["segmentation"])
            assert mask.sum() == annotation["area"]
            assert list(mask_util.toBbox(annotation["segmentation"])) == annotation["bbox"]


def _prepare(queue):
    queue.put(str(digit_scenes.prepare_digit_scenes()))


def test_two_processes_at_once_make_one_complete_copy(small):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_prepare, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1 and [p.exitcode for p in processes] == [0, 0]
    left = sorted(p.name for p in small.iterdir() if p.is_dir())
    assert left == [digit_scenes.cache_dir().name]


def test_an_interrupted_composition_leaves_nothing(small, monkeypatch):
    def fail(folder, split):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(digit_scenes, "_write_split", fail)
    with pytest.raises(KeyboardInterrupt):
        digit_scenes.prepare_digit_scenes()
    assert not [p for p in small.iterdir() if p.is_dir()]


def test_a_draft_of_a_process_that_was_killed_goes(small):
    draft = small / f"{digit_scenes.cache_dir().name}.abc"
    draft.mkdir(parents=True)
    (draft / "half").write_text("")
    digit_scenes.prepare_digit_scenes()
    assert [p.name for p in small.iterdir() if p.is_dir()] == [digit_scenes.cache_dir().name]


def test_without_a_lock_the_faster_process_counts(small, monkeypatch):
    monkeypatch.setattr(digit_scenes, "waiting_lock", lambda *_: contextlib.nullcontext(False))
    write = digit_scenes._write_split

    def write_slowly(folder, split):
        write(folder, split)
        other = digit_scenes.cache_dir()
        other.mkdir(exist_ok=True)
        (other / "another's").write_text("")

    monkeypatch.setattr(digit_scenes, "_write_split", write_slowly)
    assert [p.name for p in digit_scenes.prepare_digit_scenes().iterdir()] == ["another's"]
    assert [p.name for p in small.iterdir() if p.is_dir()] == [digit_scenes.cache_dir().name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DistillError, match="cannot be written to .*file/cache: .*variable DISTILL_CACHE"):
        digit_scenes.prepare_digit_scenes()


def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("DISTILL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert digit_scenes.cache_dir().parent == tmp_path / ".cache" / "distill"
    monkeypatch.setenv("DISTILL_CACHE", "~/data")
    assert digit_scenes.cache_dir().parent == tmp_path / "data"
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("uid not found")))
    with pytest.raises(DistillError, match="no home folder .*set the variable DISTILL_CACHE"):
        digit_scenes.cache_dir()


def test_other_settings_have_another_folder(small):
    before = digit_scenes.cache_dir()
    digit_scenes.SETTINGS["images"]["val"] += 1
    assert digit_scenes.cache_dir() != before


def test_registered_as_both_coco_and_voc():
    assert MetadataCatalog.get("digit_scenes_val").evaluator_type == "coco"
    assert MetadataCatalog.get("digit_scenes_voc_val").evaluator_type == "pascal_voc"
    coco, voc = DatasetCatalog.get("digit_scenes_val"), DatasetCatalog.get("digit_scenes_voc_val")
    train = DatasetCatalog.get("digit_scenes_train")
    assert len(coco) == len(voc) == 300 and len(train) == 2000
    for number in (100, 200, 400):
        assert DatasetCatalog.get(f"digit_scenes_train_{number}") == train[:number]
        assert MetadataCatalog.get(f"digit_scenes_train_{number}").thing_classes == digit_scenes.CLASS_NAMES
    assert "segmentation" in coco[0]["annotations"][0]
    for a, b in zip(coco, voc):
        assert [x["category_id"] for x in a["annotations"]] == [x["category_id"] for x in b["annotations"]]

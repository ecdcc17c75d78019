"""COCO's JSON as tools write it, and what it must give."""

import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from distill.data.check import _run_lengths, check_source
from distill.data.formats import read_coco
from distill.errors import DistillError
from tests.data.test_formats import BOX, H, W, checked, draw, only_box, turned_corners


def coco(**changes):
    content = {
        "images": [{"id": 3, "file_name": "a.png", "width": W, "height": H}],
        "categories": [{"id": 7, "name": "cell"}],
        "annotations": [
            {"id": 5, "image_id": 3, "category_id": 7, "bbox": [4, 6, 16, 10], "area": 160, "iscrowd": 0},
        ],
    }
    content.update(changes)
    return content


def write_coco(root, content, bom=False):
    draw(root / "a.png")
    path = root / "coco.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig" if bom else "utf-8")
    return read_coco("x", str(path), str(root))


def test_a_complete_json_is_evaluated_as_it_is(tmp_path):
    source = checked(write_coco(tmp_path, coco()))
    assert source.json_file == f"{tmp_path}/coco.json" and only_box(source) == BOX
    assert source.metadata["thing_dataset_id_to_contiguous_id"] == {7: 0}


def test_images_of_one_name_are_not_taken_for_each_other(tmp_path):
    images = [
        {"id": i, "file_name": f"{folder}/a.png", "width": W, "height": H} for i, folder in ((3, "one"), (4, "two"))
    ]
    source = write_coco(tmp_path, coco(images=images))
    with pytest.raises(DistillError, match="2 images do not exist: .*one/a.png, .*two/a.png"):
        check_source("x", source)
    (tmp_path / "one").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "one" / "a.png")
    path = tmp_path / "coco.json"
    with pytest.raises(DistillError, match="1 images do not exist: .*two/a.png"):
        check_source("x", read_coco("x", str(path), str(tmp_path)))
    path.write_text(json.dumps(coco(images=images[:1])))
    assert only_box(checked(read_coco("x", str(path), str(tmp_path / "one")))) == BOX


def test_a_byte_order_mark_text_ids_and_a_path_of_another_machine(tmp_path):
    content = coco(
        images=[{"id": "first", "file_name": "C:\\data\\a.png", "width": W, "height": H}],
        annotations=[{"image_id": "first", "category_id": "7", "bbox": [4, 6, 16, 10]}],
    )
    source = checked(write_coco(tmp_path, content, bom=True))
    assert only_box(source) == BOX and not source.json_file and source.records[0]["image_id"] == 1


def test_a_box_is_that_of_its_polygons_or_mask(tmp_path):
    polygon = [4, 6, 20, 6, 20, 16, 4, 16]
    pixels = np.zeros((H, W), np.uint8, order="F")
    pixels[6:16, 4:20] = 1
    compressed = mask_util.encode(pixels)
    flat = pixels.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    masks = [[polygon], {"size": [H, W], "counts": counts}, {"size": [H, W], "counts": compressed["counts"].decode()}]
    annotations = [{"id": i, "image_id": 3, "category_id": 7, "segmentation": m} for i, m in enumerate(masks)]
    (record,) = checked(write_coco(tmp_path, coco(annotations=annotations))).records
    assert [a["bbox"] for a in record["annotations"]] == [BOX] * 3
    for annotation in record["annotations"][1:]:
        assert np.array_equal(mask_util.decode(annotation["segmentation"]), pixels)


def test_an_object_without_a_mask_gets_its_boxs(tmp_path):
    own = coco()["annotations"][0]
    other = {**own, "id": 6, "segmentation": [[5, 7, 9, 7, 9, 9]]}
    (record,) = checked(write_coco(tmp_path, coco(annotations=[own, other]))).records
    assert record["annotations"][0]["segmentation"] == [[4, 6, 20, 6, 20, 16, 4, 16]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"category_id": 8}, "1 annotations have no class, or one that is not declared"),
        ({"bbox": [4, 6, math.nan, 10]}, "1 boxes are absent, or not finite"),
        ({"bbox": None}, "1 boxes are absent, or not finite"),
        ({"bbox": [50, 6, 5, 10]}, "1 boxes lie outside of their image"),
        ({"bbox": [20, 6, -5, 10]}, "1 boxes have their corners in the wrong order"),
        ({"bbox": "4 6 16 10"}, "1 annotations cannot be read"),
        ({"segmentation": {"size": [W, H], "counts": [0, W * H]}}, "1 run-length encoded masks have another size"),
        ({"segmentation": {"size": [H, W], "counts": "@@@"}}, "1 run-length encoded masks cannot be decoded"),
    ],
)
def test_faulty_annotations_are_counted(tmp_path, change, message):
    own = coco()["annotations"][0]
    source = write_coco(tmp_path, coco(annotations=[own, {**own, "id": 6, **change}]))
    with pytest.raises(DistillError, match=message):
        check_source("x", source)


def test_a_box_without_an_area_is_dropped(tmp_path, caplog):
    own = coco()["annotations"][0]
    source = checked(write_coco(tmp_path, coco(annotations=[own, {**own, "id": 6, "bbox": [4, 6, 0, 10]}])))
    assert only_box(source) == BOX and not source.json_file


def test_annotations_of_images_that_are_not_listed_are_left_out(tmp_path):
    own = coco()["annotations"][0]
    source = checked(write_coco(tmp_path, coco(annotations=[own, {**own, "id": 6, "image_id": 4}])))
    assert only_box(source) == BOX and source.json_file


def test_classes_of_one_name_are_refused(tmp_path):
    with pytest.raises(DistillError, match="the classes cell are there more than once"):
        write_coco(tmp_path, coco(categories=[{"id": 7, "name": "cell"}, {"id": 8, "name": "cell"}]))


def categories(*pairs):
    return [{"id": i, "name": name, "supercategory": above} for i, (name, above) in pairs]


@pytest.mark.parametrize("project", ["tissue", "cell"])
def test_the_project_among_roboflows_categories_is_no_class(tmp_path, project):
    source = checked(write_coco(tmp_path, coco(categories=categories((0, (project, "none")), (7, ("cell", project))))))
    assert source.classes == ["cell"] and only_box(source) == BOX
    assert not source.json_file  # which has it


@pytest.mark.parametrize(
    "given, classes",
    [
        (categories((7, ("cell", "none"))), ["cell"]),
        (categories((0, ("tissue", "none")), (7, ("cell", "other"))), ["tissue", "cell"]),
        (categories((0, ("tissue", "animal")), (7, ("cell", "tissue"))), ["tissue", "cell"]),
        (categories((7, ("cell", "none")), (8, ("red", "cell"))), ["cell", "red"]),  # it has objects
    ],
)
def test_any_other_category_is_a_class(tmp_path, given, classes):
    source = checked(write_coco(tmp_path, coco(categories=given)))
    assert source.classes == classes and source.json_file


def test_crowds_are_told_and_ignored_objects_are_left_out(tmp_path, caplog):
    own = coco()["annotations"][0]
    more = [{**own, "id": 6, "iscrowd": 1}]
    source = checked(write_coco(tmp_path, coco(annotations=[own, *more])))
    assert "1 objects are crowds (iscrowd 1), neither learned nor evaluated" in caplog.text and source.json_file
    more.append({**own, "id": 8, "ignore": 1})
    source = checked(write_coco(tmp_path, coco(annotations=[own, *more])))
    assert [a["iscrowd"] for a in source.records[0]["annotations"]] == [0, 1]
    assert not source.json_file  # pycocotools would count it


def test_a_json_that_does_not_fit_what_was_read_is_not_evaluated(tmp_path):
    own = coco()["annotations"][0]
    assert not checked(write_coco(tmp_path, coco(images=[{"id": 3, "file_name": "a.png"}]))).json_file
    source = write_coco(tmp_path, coco(annotations=[own, {**own, "id": 6, "segmentation": [[5, 7, 9, 7, 9, 9]]}]))
    assert source.json_file
    check_source("x", source, "off")
    assert not source.json_file


def test_cvats_rotated_boxes_are_enclosed(tmp_path):
    own = coco()["annotations"][0]
    for angle, more, expected in (
        (30.0, {}, turned_corners(BOX, 30)),
        (0.0, {}, BOX),
        (30.0, {"segmentation": [[4, 6, 20, 6, 20, 16, 4, 16]]}, BOX),  # the box of a mask, which is turned
        ("to the left", {}, BOX),
    ):
        turned = {**own, **more, "attributes": {"occluded": False, "rotation": angle}}
        source = checked(write_coco(tmp_path, coco(annotations=[turned])))
        assert only_box(source) == pytest.approx(expected)
        assert bool(source.json_file) == (expected == BOX)  # which has the box before its rotation


@pytest.mark.parametrize(
    "mask, is_kept",
    [
        ([[4, 6, 20, 6, 20, 16]], True),
        ([], True),
        ({"size": [H, W], "counts": [0, H * W]}, True),
        ([4, 6, 20, 6, 20, 16], False),  # flat
        ([[4, 6, 20, 16], [4, 6, 20, 6, 20, 16]], False),  # a line, which has no area
    ],
)
def test_a_json_whose_masks_pycocotools_cannot_read_is_not_evaluated(tmp_path, mask, is_kept):
    content = coco()
    content["annotations"][0]["segmentation"] = mask
    source = checked(write_coco(tmp_path, content))
    assert bool(source.json_file) == is_kept
    if is_kept and mask:
        api = COCO(source.json_file)
        assert api.annToMask(api.anns[5]).shape == (H, W)


def compressed(mask, cut=0):
    text = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    return text[: len(text) - cut]


def test_run_lengths_are_read_as_pycocotools_writes_them():
    for _ in range(50):
        mask = np.repeat(np.random.rand(H, W) > np.random.rand(), 3, 0)  # long runs and short ones
        flat = np.concatenate([[0], mask.flatten(order="F").astype(int), [1 - mask[-1, -1]]])
        ends = np.flatnonzero(np.diff(flat))
        assert _run_lengths(compressed(mask).encode()) == np.diff(np.concatenate([[0], ends])).tolist()


@pytest.mark.parametrize(
    "counts", [None, 7, [10, 5], [H * W + 1], compressed(np.tri(H, W), 3), compressed(np.tri(H, W)) + "1"]
)
def test_run_lengths_that_do_not_fill_the_image_are_a_fault(tmp_path, counts):
    content = coco()
    content["annotations"][0]["segmentation"] = {"size": [H, W], "counts": counts}
    with pytest.raises(DistillError, match="1 annotations cannot be read|1 run-length encoded masks cannot be decoded"):
        checked(write_coco(tmp_path, content))


def test_categories_of_one_id_are_refused(tmp_path):
    with pytest.raises(DistillError, match="several categories of the ids 7: expected one each"):
        write_coco(tmp_path, coco(categories=categories((7, ("ant", "none")), (7, ("bee", "none")))))


def test_names_of_a_split_that_the_json_does_not_list_are_told(tmp_path, caplog):
    write_coco(tmp_path, coco())

    def read(names):
        (tmp_path / "mine.txt").write_text(names)
        caplog.clear()
        with caplog.at_level("WARNING", "distill"):
            return read_coco("x", str(tmp_path / "coco.json"), str(tmp_path), "mine").records

    with pytest.raises(DistillError, match="names images that .*coco.json' does not list, such as b.png: .* a.png"):
        read("b.png\n")
    assert len(read("a.png\nb.png\n")) == 1 and "does not list, such as b.png (1 of 2)" in caplog.text
    assert len(read("a.png\n")) == 1 and not caplog.text


@pytest.mark.parametrize("file_name", ["imgs\\a.jpg", "a.gif"])
def test_a_split_lists_file_names_as_the_json_has_them(tmp_path, file_name):
    content = coco()
    content["images"][0]["file_name"] = file_name
    write_coco(tmp_path, content)
    (tmp_path / "mine.txt").write_text(f"{file_name}\n")
    assert len(read_coco("x", str(tmp_path / "coco.json"), str(tmp_path), "mine").records) == 1

"""YOLO's text files as tools write them, and what each must give."""

import shutil

import pytest
import yaml

from distill.data.check import check_source
from distill.data.formats import read_yolo
from distill.errors import DistillError
from tests.data.test_formats import BOX, H, W, checked, draw, only_box


def write_yolo(root, **more):
    for split, stems in {"train": ["a", "b"], "valid": ["c"]}.items():
        for stem in stems:
            draw(root / split / "images" / f"{stem}.jpg")
            (root / split / "labels").mkdir(exist_ok=True)
            (root / split / "labels" / f"{stem}.txt").write_text(f"1 {12 / W} {11 / H} {16 / W} {10 / H}\n")
    content = {"train": "../train/images", "val": "../valid/images", "nc": 2, "names": ["ant", "cell"], **more}
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "data.yaml"


def test_roboflows_yolo(tmp_path):
    path = write_yolo(tmp_path)
    source = checked(read_yolo("x", str(path), "train"))
    assert source.classes == ["ant", "cell"] and len(source.records) == 2
    assert only_box(source) == pytest.approx(BOX) and source.records[0]["annotations"][0]["category_id"] == 1
    assert len(read_yolo("x", str(path), "valid").records) == len(read_yolo("x", str(path), "val").records) == 1


def test_a_data_yaml_is_split_anew(tmp_path):
    """CVAT's export has one subset, and who wants a test set takes a share."""
    path = write_yolo(tmp_path)
    names = {
        split: [r["file_name"].rsplit("/", 1)[1] for r in checked(read_yolo("x", str(path), split)).records]
        for split in ("all", "0.67", "-0.33")
    }
    assert sorted(names["all"]) == ["a.jpg", "b.jpg", "c.jpg"]
    assert len(names["0.67"]) == 2 and sorted(names["0.67"] + names["-0.33"]) == sorted(names["all"])
    assert names["0.67"] == [r["file_name"][-5:] for r in read_yolo("x", str(tmp_path), "0.67").records]
    draw(tmp_path / "valid" / "images" / "a.jpg")
    assert len(read_yolo("x", str(path), "all").records) == 4
    (tmp_path / "mine.txt").write_text("train/images/a\nvalid/images/c\n")
    assert len(checked(read_yolo("x", str(path), "mine")).records) == 2


def test_names_by_number_polygons_and_images_without_objects(tmp_path):
    path = write_yolo(tmp_path, names={1: "cell", 0: "ant"}, nc=None)
    corners = [4 / W, 6 / H, 20 / W, 6 / H, 20 / W, 16 / H, 4 / W, 16 / H]
    (tmp_path / "train/labels/a.txt").write_text("0 " + " ".join(map(str, corners)))
    (tmp_path / "train/labels/b.txt").unlink()
    first, second = checked(read_yolo("x", str(path), "train")).records
    assert first["annotations"][0]["bbox"] == pytest.approx(BOX) and not second["annotations"]
    assert read_yolo("x", str(path), "train").classes == ["ant", "cell"]
    assert first["annotations"][0]["segmentation"][0] == pytest.approx([4, 6, 20, 6, 20, 16, 4, 16])


def test_labelimgs_and_cvats_yolo_folders(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / "obj_train_data" / f"{name}.jpg")
        (tmp_path / "obj_train_data" / f"{name}.txt").write_text(f"0 {12 / W} {11 / H} {16 / W} {10 / H}\n")
    (tmp_path / "obj.names").write_text("cell\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/b.jpg\n")
    assert [only_box(checked(read_yolo("x", str(tmp_path), s))) for s in ("all", "train")] == [pytest.approx(BOX)] * 2
    assert len(read_yolo("x", str(tmp_path), "train").records) == 1
    (tmp_path / "obj.names").rename(tmp_path / "obj_train_data" / "classes.txt")
    assert len(read_yolo("x", str(tmp_path), "0.5").records) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 12 11 16 10", "1 annotations cannot be read .*pixels instead of shares"),
        ("1 0.5 0.5 0.1", "1 annotations cannot be read"),
        ("2 0.5 0.5 0.1 0.1", "1 annotations have no class"),
        ("nan 0.5 0.5 0.1 0.1", "1 annotations have no class"),
        ("1 0.5 nan 0.1 0.1", "1 boxes are absent, or not finite"),
    ],
)
def test_faulty_lines_are_counted(tmp_path, line, message):
    path = write_yolo(tmp_path)
    (tmp_path / "train/labels/a.txt").write_text(line)
    with pytest.raises(DistillError, match=message):
        check_source("x", read_yolo("x", str(path), "train"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": None}, "is not YOLO's data.yaml"),
        ({"names": {0: "a", 2: "b"}, "nc": 2}, "without a gap"),
        ({"nc": 3}, "nc 3 and 2 names"),
        ({"train": None}, "no split 'train': expected val, all, a share"),
        ({"train": "nowhere"}, "nowhere' does not exist"),
    ],
)
def test_a_wrong_data_yaml_is_an_error(tmp_path, change, message):
    with pytest.raises(DistillError, match=message):
        read_yolo("x", str(write_yolo(tmp_path, **change)), "train")


def test_a_file_that_is_no_text_is_a_fault(tmp_path):
    path = write_yolo(tmp_path)
    (tmp_path / "train/labels/a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DistillError, match="1 annotations cannot be read .*a.txt"):
        check_source("x", read_yolo("x", str(path), "train"))
    path.unlink()
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DistillError, match="classes.txt' is not UTF-8 text"):
        read_yolo("x", str(tmp_path), "all")


@pytest.mark.parametrize("shape", [[1, 2], [12, 2], [4, 3]])
def test_keypoints_behind_a_box_are_left_out(tmp_path, shape):
    path = write_yolo(tmp_path, kpt_shape=shape)
    label = tmp_path / "train" / "labels" / "a.txt"
    label.write_text(label.read_text().strip() + " 0.1" * (shape[0] * shape[1]) + "\n")
    source = checked(read_yolo("x", str(path), "train"))
    assert only_box(source, 0) == only_box(source, 1) == pytest.approx(BOX)
    assert "segmentation" not in source.records[0]["annotations"][0]


def test_cvats_subsets_with_frames_of_one_name(tmp_path):
    for subset, box in (("train", "0.5 0.5 0.2 0.2"), ("valid", "0.4 0.4 0.2 0.2")):
        draw(tmp_path / f"obj_{subset}_data" / "frame_0.jpg")
        (tmp_path / f"obj_{subset}_data" / "frame_0.txt").write_text(f"0 {box}\n")
        (tmp_path / f"{subset}.txt").write_text(f"data/obj_{subset}_data/frame_0.jpg\n")
    (tmp_path / "obj.names").write_text("cell\n")
    for subset, left in (("train", 0.4), ("valid", 0.3)):
        source = checked(read_yolo("x", str(tmp_path), subset))
        assert source.records[0]["file_name"].endswith(f"obj_{subset}_data/frame_0.jpg")
        assert only_box(source)[0] == pytest.approx(left * W)


def test_labels_that_are_not_there_are_named(tmp_path):
    path = write_yolo(tmp_path)
    shutil.rmtree(tmp_path / "train" / "labels")
    places = (
        f"none of its 2 images .* '{tmp_path}/train/labels/a.txt' and '{tmp_path}/train/images/a.txt' was looked for"
    )
    with pytest.raises(DistillError, match=places):
        read_yolo("x", str(path), "train")
    assert len(read_yolo("x", str(path), "val").records) == 1


def test_polygons_among_boxes_are_told(tmp_path, caplog):
    path = write_yolo(tmp_path)
    label = tmp_path / "train" / "labels" / "a.txt"
    label.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n" + label.read_text())
    (tmp_path / "train" / "labels" / "b.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    with caplog.at_level("WARNING", "distill"):
        source = read_yolo("x", str(path), "train")
    assert "x: 2 objects are polygons and 1 are boxes, such as of " in caplog.text and "a.jpg: all are" in caplog.text
    assert all("segmentation" not in a for r in source.records for a in r["annotations"])


def test_windows_paths_and_linked_folders(tmp_path):
    path = write_yolo(tmp_path, train="train\\images", val="mine.txt")
    (tmp_path / "mine.txt").write_text("train\\images\\b.jpg\n")
    assert len(checked(read_yolo("x", str(path), "train")).records) == 2
    assert read_yolo("x", str(path), "val").records[0]["file_name"] == str(tmp_path / "train" / "images" / "b.jpg")
    whole = tmp_path / "whole"
    (whole / "images").mkdir(parents=True)
    (whole / "classes.txt").write_text("ant\ncell\n")
    (whole / "images" / "link").symlink_to(tmp_path / "train" / "images")
    (whole / "labels").mkdir()
    (whole / "labels" / "link").symlink_to(tmp_path / "train" / "labels")
    source = checked(read_yolo("x", str(whole), "all"))
    assert len(source.records) == 2 and only_box(source) == pytest.approx(BOX)


def test_an_empty_line_among_the_classes_of_a_folder_is_refused(tmp_path):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("\nant\n \ncell\n\n")
    with pytest.raises(DistillError, match="no class in its line 3: expected a name on each line"):
        read_yolo("x", str(tmp_path), "all")

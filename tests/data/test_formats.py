"""Small datasets of VOC as tools write them, and what each must give."""

import math
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.data import register_datasets
from distill.data.check import check_source
from distill.data.formats import read_voc
from distill.data.formats.source import enclosing, select, walk
from distill.errors import DistillError
from distill.evaluation import VOCEvaluator
from tests.data.test_register import unregister  # noqa: F401  a fixture

W, H = 40, 30
BOX = [4.0, 6.0, 20.0, 16.0]  # XYXY of every object here


def draw(path, size=(W, H), mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    pixels = torch.randint(256, shape, dtype=torch.uint8).numpy()
    Image.fromarray(pixels, mode).save(path, **more)
    return pixels


def xml(name="cell", box=(5, 7, 20, 16), size=(W, H), more=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{shape}<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object></annotation>"


def write_flat_voc(root, stems=("a", "b", "c", "d"), ending=".jpg", **more):
    for stem in stems:
        draw(root / f"{stem}{ending}")
        (root / f"{stem}.xml").write_text(xml(**more))
    return root


def checked(source, name="x", **more):
    check_source(name, source, **more)
    return source


def only_box(source, index=0):
    (annotation,) = source.records[index]["annotations"]
    return annotation["bbox"]


# PASCAL VOC


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".png", ".bmp", ".webp"])
def test_images_of_any_ending_and_names_with_spaces(tmp_path, ending):
    write_flat_voc(tmp_path, ["my photo 1", "b"], ending)
    source = checked(read_voc("x", str(tmp_path), "all"))
    assert [record["image_id"] for record in source.records] == ["b", "my photo 1"]
    assert only_box(source) == BOX and (source.records[0]["width"], source.records[0]["height"]) == (W, H)


def test_images_and_annotations_in_two_folders(tmp_path):
    write_flat_voc(tmp_path / "labels")
    (tmp_path / "photos").mkdir()
    for image in (tmp_path / "labels").glob("*.jpg"):
        image.rename(tmp_path / "photos" / image.name)
    assert len(checked(read_voc("x", str(tmp_path), "all")).records) == 4


def test_an_annotation_whose_image_is_gone_is_a_fault(tmp_path):
    (write_flat_voc(tmp_path) / "b.jpg").unlink()
    with pytest.raises(DistillError, match="1 images do not exist: .*b.jpg"):
        checked(read_voc("x", str(tmp_path), "all"))


def test_roboflows_folders_of_splits(tmp_path):
    write_flat_voc(tmp_path / "train")
    write_flat_voc(tmp_path / "valid", ["e"])
    draw(tmp_path / "test" / "a.jpg")  # not annotated, and of the name of one that is
    assert [len(read_voc("x", str(tmp_path), split).records) for split in ("train", "valid", "all")] == [4, 1, 5]
    whole = [read_voc("x", str(tmp_path), split).records for split in ("0.8", "-0.2")]
    assert [len(part) for part in whole] == [4, 1]
    files = sorted(record["file_name"].removeprefix(f"{tmp_path}/") for part in whole for record in part)
    assert files == ["train/a.jpg", "train/b.jpg", "train/c.jpg", "train/d.jpg", "valid/e.jpg"]
    write_flat_voc(tmp_path / "copies", ["b"])
    with pytest.raises(DistillError, match="copies/b.xml' and '.*train/b.xml' have the same name"):
        read_voc("x", str(tmp_path), "all")


def test_hidden_folders_are_not_read(tmp_path):
    (tmp_path / ".idea").mkdir()
    (tmp_path / ".idea" / "workspace.xml").write_text("<project/>")
    write_flat_voc(tmp_path / "labels")
    assert len(checked(read_voc("x", str(tmp_path), "all")).records) == 4


def test_shares_are_each_others_rest_and_the_same_every_time(tmp_path):
    write_flat_voc(tmp_path, [f"i{n}" for n in range(17)])
    first, rest, again = (
        {record["image_id"] for record in read_voc("x", str(tmp_path), split).records}
        for split in ("0.8", "-0.2", "0.8")
    )
    assert first == again and len(first) == 14 and not first & rest and len(first | rest) == 17
    assert select("x", "0.5", list("abcdefgh"), tmp_path) == ["d", "f", "g", "h"]  # by SHA-1, in every process
    twice = list("abcdefghabcdefg")  # of two endings
    for share in range(1, 10):
        assert not {*select("x", f"0.{share}", twice, tmp_path)} & {*select("x", f"-0.{10 - share}", twice, tmp_path)}
    with pytest.raises(DistillError, match="share 1.5 is not between"):
        read_voc("x", str(tmp_path), "1.5")
    with pytest.raises(DistillError, match="share 0.01 of 17 images is none"):
        read_voc("x", str(tmp_path), "0.01")


def test_any_share_and_its_rest_are_the_whole(tmp_path):
    for count in range(1, 61):
        stems = [str(number) for number in range(count)]
        percent = random.randrange(1, 100)
        for share in (percent, 10, 15, 30, 45):
            first, rest = f"{share / 100:.2f}", f"-{(100 - share) / 100:.2f}"
            if 0 < round(count * share / 100) < count and 2 * count * share % 100:
                assert sorted(select("x", first, stems, tmp_path) + select("x", rest, stems, tmp_path)) == sorted(stems)
    fifteen = [str(number) for number in range(15)]
    parts = [select("x", share, fifteen, tmp_path) for share in ("0.1", "-0.9")]  # a boundary between two images
    assert sorted(parts[0] + parts[1]) == sorted(fifteen)


def test_a_list_that_is_named_by_a_number_is_a_list(tmp_path):
    write_flat_voc(tmp_path)
    (tmp_path / "1.txt").write_text("b\n")
    assert [record["image_id"] for record in read_voc("x", str(tmp_path), "1").records] == ["b"]


def turned_corners(box, degrees):
    """The box around a rotated box, literally: its corners are turned around its centre."""
    x0, y0, x1, y1 = box
    centre, turn = complex((x0 + x1) / 2, (y0 + y1) / 2), np.exp(1j * math.radians(degrees))
    corners = np.array([centre + (complex(x, y) - centre) * turn for x in (x0, x1) for y in (y0, y1)])
    return [corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max()]


def test_cvats_rotated_boxes_are_enclosed(tmp_path):
    for degrees in (90.0, 180.0, random.uniform(0, 360), random.uniform(-360, 0)):
        box = [random.uniform(0, 10), random.uniform(0, 10), random.uniform(15, 20), random.uniform(15, 25)]
        assert enclosing(box, degrees) == pytest.approx(turned_corners(box, degrees))
    assert enclosing(BOX, 0.0) == enclosing(BOX, 360.0) == BOX

    attributes = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"
    for text, expected in (("90.0", turned_corners(BOX, 90)), ("0.0", BOX), ("to the left", BOX)):
        write_flat_voc(tmp_path / text, ["a"], more=attributes.format(text))
        assert only_box(checked(read_voc("x", str(tmp_path / text), "all"))) == pytest.approx(expected)


def test_lists_with_a_second_column(tmp_path):
    write_flat_voc(tmp_path, ["a", "b c"])
    (tmp_path / "list.txt").write_text("b c  1\na -1\n")
    assert [r["image_id"] for r in read_voc("x", str(tmp_path), "list").records] == ["b c", "a"]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "official" / folder).mkdir(parents=True)
    for file in tmp_path.glob("*.*"):
        if file.suffix in (".jpg", ".xml"):
            file.rename(tmp_path / "official" / ("JPEGImages" if file.suffix == ".jpg" else "Annotations") / file.name)
    (tmp_path / "official/ImageSets/Main/cell_val.txt").write_text("a -1\nb c  1\n")
    assert [r["image_id"] for r in read_voc("x", f"{tmp_path}/official", "cell_val").records] == ["a", "b c"]


@pytest.mark.parametrize(
    "more, difficult",
    [
        ("", 0),
        ("<pose>Unspecified</pose><truncated>Unspecified</truncated><difficult>Unspecified</difficult>", 0),
        ("<difficult>1</difficult>", 1),
        ("<difficult>True</difficult>", 1),
        ("<difficult>0</difficult>", 0),
    ],
)
def test_flags_absent_or_in_words(tmp_path, more, difficult):
    write_flat_voc(tmp_path, ["a"], more=more)
    (record,) = read_voc("x", str(tmp_path), "all").records
    assert record["annotations"][0]["difficult"] == difficult


def test_without_a_size_the_images_is_taken(tmp_path):
    write_flat_voc(tmp_path, ["a"], size=None)
    (record,) = checked(read_voc("x", str(tmp_path), "all")).records
    assert (record["width"], record["height"]) == (W, H)


AWKWARD = ["a, b", "a:b", "a/b", "a b", 100 * "細胞"]


@pytest.mark.parametrize("name", AWKWARD)
def test_vocs_metric_on_awkward_names_decimals_and_one_image(tmp_path, name, unregister):  # noqa: F811
    stem = 40 * "写真" + " 1"
    write_flat_voc(tmp_path, [stem], name=name, box=(5.0, 7.4, 20.2, 16.0))
    register_datasets([f"v=voc:{tmp_path}:all"])
    assert MetadataCatalog.get("v").thing_classes == [name]
    (record,) = DatasetCatalog.get("v")
    before = (tmp_path / f"{stem}.xml").read_text()
    assert evaluate_voc("v", [record], [[BOX]])["AP"] == pytest.approx(100)
    assert evaluate_voc("v", [record], [[[0.0, 0.0, 2.0, 2.0]]])["AP"] == 0
    assert (tmp_path / f"{stem}.xml").read_text() == before


def evaluate_voc(name, records, boxes, classes=None):
    evaluator = VOCEvaluator(name)
    evaluator.reset()
    for index, (record, found) in enumerate(zip(records, boxes)):
        instances = Instances((H, W))
        instances.pred_boxes = Boxes(torch.tensor(found).reshape(-1, 4))
        instances.scores = torch.linspace(0.9, 0.8, len(found))
        instances.pred_classes = torch.tensor(classes[index] if classes else [0] * len(found), dtype=torch.long)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def test_a_class_that_the_test_set_lacks_counts_not(tmp_path, unregister):  # noqa: F811
    write_flat_voc(tmp_path, ["a", "b"])
    register_datasets([f"v=voc:{tmp_path}:all:ant,cell"])
    records = DatasetCatalog.get("v")
    assert evaluate_voc("v", records, [[BOX, BOX], [BOX]], [[1, 0], [1]])["AP"] == pytest.approx(100)
    assert evaluate_voc("v", records, [[BOX], []], [[1], []])["AP"] == pytest.approx(50)


@pytest.mark.parametrize("found", [[], [1]])
def test_difficult_objects_are_not_looked_for(tmp_path, found, unregister):  # noqa: F811
    write_flat_voc(tmp_path, ["a"], name="ant")
    path = tmp_path / "a.xml"
    other = xml(name="bee", more="<difficult>1</difficult>", size=None).removeprefix("<annotation>")
    path.write_text(path.read_text().replace("</annotation>", other))
    register_datasets([f"v=voc:{tmp_path}:all"])
    assert MetadataCatalog.get("v").thing_classes == ["ant", "bee"]
    result = evaluate_voc("v", DatasetCatalog.get("v"), [[BOX] * (1 + len(found))], [[0, *found]])
    assert result["AP"] == pytest.approx(100)


def test_cvats_folders_below_the_layouts(tmp_path):
    for stem, ending in (("one/a", "jpg"), ("two/a", "png")):
        draw(tmp_path / "JPEGImages" / f"{stem}.{ending}")
        path = tmp_path / "Annotations" / f"{stem}.xml"
        path.parent.mkdir(parents=True)
        path.write_text(xml(name=stem[:3]))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("one/a\ntwo/a\n")
    stray = tmp_path / "Annotations" / ".ipynb_checkpoints" / "b-checkpoint.xml"
    stray.parent.mkdir()
    stray.write_text(xml(name="old"))
    source = checked(read_voc("x", str(tmp_path), "default"))
    assert source.classes == ["one", "two"] and only_box(source, 1) == BOX
    assert [record["file_name"].split("JPEGImages/")[1] for record in source.records] == ["one/a.jpg", "two/a.png"]


@pytest.mark.parametrize("place, others", [("images", ["depth"]), ("photos", [])])
def test_pictures_of_classes_are_not_taken_for_photographs(tmp_path, place, others):
    """CVAT's export without images, to which they were added."""
    for folder in ("SegmentationClass", "SegmentationObject", place, *others):
        draw(tmp_path / folder / "a.png")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(xml())
    assert read_voc("x", str(tmp_path), "all").records[0]["file_name"] == str(tmp_path / place / "a.png")


def test_a_name_twice_in_a_list_is_one_image(tmp_path):
    write_flat_voc(tmp_path)
    (tmp_path / "mine.txt").write_text("b\na.jpg\nb\nsome\\folder\\a.jpg\n")
    assert [r["image_id"] for r in read_voc("x", str(tmp_path), "mine").records] == ["b", "a"]


def test_folders_behind_links_are_read_and_a_loop_ends(tmp_path):
    write_flat_voc(tmp_path / "far" / "below")
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC" / "Annotations").mkdir()
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / "VOC" / folder / "link").symlink_to(tmp_path / "far" / "below")
    (tmp_path / "far" / "below" / "loop").symlink_to(tmp_path / "far" / "below")
    records = checked(read_voc("x", str(tmp_path / "VOC"), "all")).records
    assert [r["image_id"] for r in records] == ["link/a", "link/b", "link/c", "link/d"]
    assert records[0]["file_name"] == str(tmp_path / "VOC" / "JPEGImages" / "link" / "a.jpg")


def test_links_upwards_and_to_what_is_there_add_nothing(tmp_path):
    for name in ("one/images/train/a.jpg", "two/b.jpg"):
        draw(tmp_path / name)
    root = tmp_path / "one"
    (root / "up").symlink_to(tmp_path)
    (root / "images" / "again").symlink_to(root / "images" / "train")
    (root / "again").symlink_to(root / "images" / "train")
    assert walk(root) == [root / "images" / "train" / "a.jpg"]
    (root / "other").symlink_to(tmp_path / "two")
    assert walk(root) == [root / "images" / "train" / "a.jpg", root / "other" / "b.jpg"]
    assert walk(tmp_path / "nowhere") == []


def test_a_number_in_a_folders_name_is_no_year(tmp_path, unregister):  # noqa: F811
    years = {"photos_20070312": 2012, "VOC2007": 2007, "pascal_voc_2007": 2007, "2007": 2007, "VOC2012": 2012}
    for folder, year in years.items():
        assert read_voc("x", str(write_flat_voc(tmp_path / folder)), "all").metadata == {"year": year}
    for folder, is_2007 in (("VOC2007", True), ("VOC2012", False)):
        register_datasets([f"{folder}=voc:{tmp_path / folder}:all"])
        assert VOCEvaluator(folder)._evaluator._is_2007 == is_2007


def test_empty_lines_among_classes_that_have_names(tmp_path):
    write_flat_voc(tmp_path, name="c")
    (tmp_path / "classes.txt").write_text("\na\n\nc\n\n")
    assert read_voc("x", str(tmp_path), "all", str(tmp_path / "classes.txt")).classes == ["a", "c"]

"""Images that are damaged, rotated, or not of 8 bits: what is reported, and what Detectron2 reads."""

import contextlib
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageFile

from distill.data import images
from distill.data.check import check_source
from distill.data.formats import read_coco, read_voc
from distill.data.images import SEEN, read_header, read_headers
from distill.errors import DistillError
from tests.data.test_coco import coco
from tests.data.test_formats import H, W, checked, draw, write_flat_voc, xml


def cut(path, number=20):
    path.write_bytes(path.read_bytes()[:-number])


def test_faulty_images_are_counted_skipped_or_loaded(tmp_path):
    write_flat_voc(tmp_path, list("abcdef"))
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"no image")
    cut(tmp_path / "c.jpg")
    draw(tmp_path / "d.jpg", (W, H + 1))
    (tmp_path / "e.xml").write_text("<annotation>")
    (tmp_path / "list.txt").write_text("\n".join("abcdef"))
    (tmp_path / "g.jpg").write_bytes((tmp_path / "f.jpg").read_bytes())
    read = lambda: read_voc("x", str(tmp_path), "list")  # noqa: E731
    with pytest.raises(DistillError) as error:
        check_source("x", read())
    for kind in ("do not exist: .*a.jpg", "cannot be read: .*b.jpg", "cut off .*c.jpg", "another width .*d.jpg"):
        error.match(f"1 [a-z ]*{kind}")
    error.match("1 annotations cannot be read .*e.xml")
    source = checked(read(), mode="skip")
    assert [record["image_id"] for record in source.records] == ["f"]
    loaded = checked(read(), mode="skip", load_truncated=True)
    assert [record["image_id"] for record in loaded.records] == ["c", "f"]
    pixels = read_image(loaded.records[0]["file_name"], "RGB")
    assert pixels.shape == (H, W, 3) and pixels[:8].std() > 0
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    off = checked(read(), mode="off")
    assert len(off.records) == 6
    (tmp_path / "list.txt").write_text("a\nb\n")
    with pytest.raises(DistillError, match="no image without a fault"):
        check_source("x", read(), "skip")


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cut_image_is_turned_as_well(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{ending}"
    Image.fromarray(np.random.default_rng().integers(0, 256, (H, W, 3), np.uint8)).save(file, exif=exif)
    complete = read_header(str(file))
    cut(file, 600)
    header = read_header(str(file))
    assert header == complete._replace(fault="image cut off") and header.orientation == orientation
    pixels = read_image(f"seen://{file}", "RGB")
    assert (pixels.shape[1], pixels.shape[0]) == header.seen_size


def test_a_file_with_more_behind_its_image_is_complete(tmp_path):
    draw(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as stream:
        stream.write(b"\0" * 200)
    assert not read_header(str(tmp_path / "a.jpg")).fault
    draw(tmp_path / "b.png")
    cut(tmp_path / "b.png", 600)
    assert read_header(str(tmp_path / "b.png")).fault == "image cut off"


def seen_by_detectron2(path):
    source = checked(read_voc("x", str(path.parent), "all"))
    return read_image(source.records[0]["file_name"], "RGB"), source


def test_16_bits_are_scaled(tmp_path):
    values = torch.randint(65536, (H, W)).numpy().astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(xml())
    pixels, _ = seen_by_detectron2(tmp_path / "a.png")
    assert np.abs(pixels - (values / 257)[..., None]).max() <= 0.5


def test_transparent_pixels_are_white(tmp_path):
    pixels = torch.randint(256, (H, W, 4), dtype=torch.uint8).numpy()
    pixels[..., 3] = 255
    pixels[:5, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(xml())
    found, _ = seen_by_detectron2(tmp_path / "a.png")
    assert (found[:5] == 255).all() and np.array_equal(found[5:], pixels[5:, :, :3])


@pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
def test_gray_palette_and_cmyk(tmp_path, mode):
    pixels = draw(tmp_path / "b.png")
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (tmp_path / "b.png").unlink()
    if mode == "CMYK":
        (tmp_path / "a.tif").unlink()
        image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    (tmp_path / "a.xml").write_text(xml())
    found, _ = seen_by_detectron2(next(p for p in tmp_path.iterdir() if p.suffix != ".xml"))
    wanted = np.asarray(image.convert("RGB"))
    assert np.abs(found.astype(int) - wanted).mean() < (12 if mode == "CMYK" else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [False, True])
def test_boxes_and_masks_turn_with_a_rotated_image(tmp_path, orientation, stored):
    """A white rectangle in the file; what Detectron2 reads is white within the box, and black without."""
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[6:16, 4:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_image(f"{tmp_path}/a.png", "RGB")
    ys, xs = np.nonzero(upright[..., 0])
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    mask = mask_util.encode(np.asfortranarray(pixels[..., 0] // 255))
    polygon = [4, 6, 20, 6, 20, 16, 4, 16]
    if stored and orientation < 5:
        return  # nobody can tell: the sizes are the same
    height, width = pixels.shape[:2] if stored else upright.shape[:2]
    given = [4, 6, 16, 10] if stored else [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    masks = [[polygon], {"size": [H, W], "counts": mask["counts"].decode()}] if stored else [None, None]
    annotations = [
        {"id": i, "image_id": 3, "category_id": 7, "bbox": [int(x) for x in given], "segmentation": m}
        for i, m in enumerate(masks)
    ]
    content = coco(images=[{"id": 3, "file_name": "a.png", "width": width, "height": height}], annotations=annotations)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (record,) = checked(read_coco("x", f"{tmp_path}/coco.json", str(tmp_path))).records
    assert (record["height"], record["width"]) == upright.shape[:2]
    for annotation in record["annotations"]:
        assert annotation["bbox"] == pytest.approx(box)
    if stored:
        first, second = (a["segmentation"] for a in record["annotations"])
        drawn = mask_util.decode(mask_util.merge(mask_util.frPyObjects(first, *upright.shape[:2])))
        assert np.array_equal(drawn, upright[..., 0] // 255)
        assert np.array_equal(mask_util.decode(second), upright[..., 0] // 255)


def test_a_mask_that_cannot_be_turned_is_one_fault(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (W, H)).save(tmp_path / "a.png", exif=exif)
    bad = {"size": [H, W], "counts": "@@@"}
    annotation = {"id": 1, "image_id": 3, "category_id": 7, "bbox": [4, 6, 16, 10], "segmentation": bad}
    images = [{"id": 3, "file_name": "a.png", "width": W, "height": H}]
    (tmp_path / "coco.json").write_text(json.dumps(coco(images=images, annotations=[annotation])))
    with pytest.raises(DistillError, match="faults:\n  1 run-length encoded masks cannot be decoded: .*a.png\nFix"):
        check_source("x", read_coco("x", f"{tmp_path}/coco.json", str(tmp_path)))


def test_headers_are_read_again_when_a_file_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    draw(tmp_path / "a.png")
    files = [str(tmp_path / "a.png")]
    assert read_headers(files, "k")[files[0]].width == W
    with monkeypatch.context() as patch:
        patch.setattr("distill.data.images.read_header", lambda file: pytest.fail("it is known"))
        assert read_headers(files, "k")[files[0]].width == W
    draw(tmp_path / "a.png", (W + 1, H))
    assert read_headers(files, "k")[files[0]].width == W + 1
    next((tmp_path / "cache/distill").glob("*.json")).write_text("{")
    assert read_headers(files, "k")[files[0]].width == W + 1


def test_only_what_needs_it_is_opened_another_way(tmp_path):
    write_flat_voc(tmp_path, ["a"])
    assert not checked(read_voc("x", str(tmp_path), "all")).records[0]["file_name"].startswith(SEEN)


@pytest.fixture
def five_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in "abcde":
        draw(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in "abcde"]


def test_headers_that_were_read_are_kept_when_a_run_is_killed(five_files, monkeypatch):
    monkeypatch.setattr(images, "_AT_ONCE", 2)
    seen = []

    def read(file, until=five_files[3]):
        seen.append(file)
        if file == until:
            raise KeyboardInterrupt
        return read_header(file)

    monkeypatch.setattr(images, "read_header", read)
    with pytest.raises(KeyboardInterrupt):
        read_headers(five_files, "k")
    seen.clear()
    monkeypatch.setattr(images, "read_header", lambda file: read(file, ""))
    assert list(read_headers(five_files, "k")) == five_files
    assert sorted(seen) == five_files[2:]
    seen.clear()
    assert read_headers(five_files, "k")[five_files[4]].width == W and not seen


@pytest.mark.parametrize("is_held", [True, False])
def test_headers_need_no_cache(five_files, monkeypatch, caplog, is_held):
    monkeypatch.setattr(images, "waiting_lock", lambda *_: contextlib.nullcontext(is_held))
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError("disk full")))
    count = Mock(side_effect=read_header)
    monkeypatch.setattr(images, "read_header", count)
    assert len(read_headers(five_files, "k")) == 5 and count.call_count == 5
    assert ("disk full" in caplog.text) == is_held


def test_what_could_not_be_read_once_is_read_again(five_files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_header", lambda file: images.Header(fault="image unreadable"))
        assert read_headers(five_files, "k")[five_files[0]].fault
    assert read_headers(five_files, "k")[five_files[0]] == read_header(five_files[0])

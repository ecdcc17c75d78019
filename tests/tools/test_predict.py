"""tools/predict.py: a checkpoint and files of it draw and write the same."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from distill.errors import DistillError
from distill.export import output_names
from distill.export.tracing import write_onnx, write_torchscript
from tests.export.test_files import describe_file, finding_detector, image_of
from tests.helpers import ROOT, aligned_cfg, run_script
from tests.tools.test_export_file import SIZES, write_trained


def predict(weights, folder, *more):
    return run_script(
        *("tools/predict.py", "--weights", str(weights), "--input", str(folder / "data")),
        *("--output", str(folder / "drawn"), "--json", str(folder / "found.json"), "--min-score", "0.2"),
        *map(str, more),
    )


def read(folder):
    """The annotations, and a drawn image's pixels."""
    content = json.loads((folder / "found.json").read_text())
    with Image.open(folder / "drawn" / "1.png") as picture:
        return content, picture.convert("RGB").tobytes(), picture.size


def test_a_checkpoint_and_files_of_it_find_the_same(tmp_path):
    write_trained(tmp_path, kind="mask_rcnn")
    result = predict(tmp_path / "model.pth", tmp_path, "--config-file", tmp_path / "config.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    expected, drawn, size = read(tmp_path)
    assert size[1] == 384 and [x["file_name"][-5:] for x in expected["images"]] == ["1.png", "2.png", "3.png"]
    assert [(x["height"], x["width"]) for x in expected["images"]] == [(75, 101), (64, 64), (133, 90)]
    assert [x["name"] for x in expected["categories"]] == ["c0", "c1", "c2"]
    assert len(expected["annotations"]) > 10
    coco = COCO(str(tmp_path / "found.json"))
    annotation = coco.loadAnns(coco.getAnnIds())[0]
    assert coco.annToMask(annotation).sum() == annotation["area"]
    with Image.open(tmp_path / "data" / "1.png") as picture:
        assert picture.convert("RGB").resize(size).tobytes() != drawn

    model, image = finding_detector("mask_rcnn"), image_of(75, 90)
    outputs = output_names(model, image)
    mean = {"pixel_mean": model.pixel_mean.flatten().tolist(), "max_size": 160, "class_names": ["c0", "c1", "c2"]}
    metadata = describe_file(outputs, **mean)
    for name, write in (("model.ts", write_torchscript), ("model.onnx", write_onnx)):
        write(model, image, tmp_path / name, metadata)
        result = predict(tmp_path / name, tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        found, _, _ = read(tmp_path)
        assert found["images"] == expected["images"] and found["categories"] == expected["categories"]
        assert len(found["annotations"]) == len(expected["annotations"])
        for own, theirs in zip(found["annotations"], expected["annotations"]):
            assert own["category_id"] == theirs["category_id"]
            assert own["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert own["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)


def test_images_are_seen_as_in_training_and_a_multi_scale_teacher_predicts(tmp_path, monkeypatch):
    cfg = aligned_cfg("fcos", **SIZES)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "data").mkdir()
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "data" / "1.png")
    result = predict(tmp_path / "model.pth", tmp_path, "--config-file", tmp_path / "config.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    with Image.open(tmp_path / "drawn" / "1.png") as picture:
        assert 100 < np.asarray(picture.convert("L")).mean() < 155  # and not white

    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import predict as script

    seen = []

    def detect(batch):
        seen.append(batch[0]["image"].float().mean())
        found = Instances((64, 64), pred_boxes=Boxes(torch.empty(0, 4)), scores=torch.empty(0))
        found.pred_classes = torch.empty(0, dtype=torch.long)
        return [{"instances": found}]

    _, mapper, names = script.load(str(tmp_path / "model.pth"), str(tmp_path / "config.yaml"), [])
    monkeypatch.setattr(script, "load", lambda *args: (detect, mapper, names))
    args = {"input": [str(tmp_path / "data")], "output": tmp_path / "again", "json": None, "min_score": 0.5}
    script.predict(Namespace(weights="", config_file="", opts=[], **args))
    assert 100 < seen[0] < 155
    seen.clear()
    with pytest.raises(DistillError, match="--json is .*, which is a folder: name a file"):
        script.predict(Namespace(weights="", config_file="", opts=[], **{**args, "json": tmp_path}))
    assert not seen


def test_a_file_that_does_not_say_how_images_are_resized_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from predict import load

    model, image = finding_detector("retinanet"), image_of(75, 90)
    names = {"class_names": ["c0", "c1", "c2"]}
    for about in ({"short_edge": 96}, {"short_edge": 0}, {"short_edge": None, "size": [96, 96]}, {"short_edge": None}):
        metadata = describe_file(output_names(model, image), **names, **about)
        write_torchscript(model, image, tmp_path / "model.ts", metadata)
        load(str(tmp_path / "model.ts"), "", [])
    assert [x.message.count("does not say how its images are resized") for x in caplog.records] == [1]


def test_an_unreadable_image_does_not_stop_the_others(tmp_path):
    write_trained(tmp_path)
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    result = predict(tmp_path / "model.pth", tmp_path, "--config-file", tmp_path / "config.yaml")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: 1 of 3 images cannot be read: " in result.stderr and "2.png (cannot identify" in result.stderr
    assert {x.name for x in (tmp_path / "drawn").iterdir()} == {"1.png", "3.png"}
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 2


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import predict as script

    for name in ("a/1.png", "b/1.png", "a/raw.tga"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    assert script.find_images([str(a), str(a / "1.png"), str(a / "raw.tga")], out) == {
        a / "1.png": out / "1.png",
        a / "raw.tga": out / "raw.tga.png",
    }
    for inputs, output, message in (
        ([tmp_path / "none"], out, "none is neither a file nor a folder"),
        ([tmp_path / "empty"], out, "empty has no image"),
        ([a], a, r"would overwrite the image .*1\.png: give another --output"),
        ([a, b], out, r"Two images are called 1\.png"),
    ):
        with pytest.raises(DistillError, match=message):
            script.find_images([str(x) for x in inputs], output)
    with pytest.raises(DistillError, match=r"model\.pth is taken for a checkpoint, which needs --config-file"):
        script.load("model.pth", "", [])
    with pytest.raises(DistillError, match=r"model\.onnx contains its own settings"):
        script.load("model.onnx", "config.yaml", [])

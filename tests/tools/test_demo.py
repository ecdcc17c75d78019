"""The demo's stages, on photos of the user's own."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.errors import DistillError
from tests.data.test_register import unregister  # noqa: F401
from tests.helpers import ROOT, run_script
from tests.test_train_net import make_voc

SHORT = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
)


def test_photos_go_through_every_stage_once(tmp_path):
    make_voc(tmp_path / "photos")
    out = tmp_path / "out"
    entry = f"voc:{tmp_path}/photos:train"
    result = run_script("tools/demo.py", "--output", str(out), "--data", entry, entry, *SHORT)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    table = (out / "table.md").read_text()
    assert table in result.stdout
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["teacher", "student", "student, distilled", "the same, inheriting"]
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 300

    again = run_script("tools/demo.py", "--output", str(out), "--data", entry, entry, *SHORT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("finished already") == len(names)

    make_voc(tmp_path / "others")
    other = f"voc:{tmp_path}/others:train"
    refused = run_script("tools/demo.py", "--output", str(out), "--data", other, other, *SHORT)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "finished" not in refused.stdout
    assert f"error: The models in {out} were trained with DATASETS.REGISTER" in refused.stderr


def test_one_test_image_is_drawn_and_the_users_check_counts(tmp_path, monkeypatch, unregister):  # noqa: F811
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    monkeypatch.chdir(ROOT)
    import demo

    make_voc(tmp_path / "photos")
    (tmp_path / "photos" / "Annotations" / "1.xml").write_text("no XML")
    entry = f"voc:{tmp_path}/photos:train"
    with pytest.raises(DistillError, match="1 annotations cannot be read"):
        demo.photo_opts(entry, entry)
    demo.photo_opts(entry, entry, ["DATASETS.CHECK", "skip"])
    records = DatasetCatalog.get("demo_test")[:1]
    found = Instances((64, 80), pred_boxes=Boxes([[5, 5, 50, 40]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    demo.draw(records, {"model": [found]}, MetadataCatalog.get("demo_test"), tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()
    names = Metadata(thing_classes=["a$_$", "$x$"])  # no formulas
    demo.draw(records, {"model": [found]}, names, tmp_path / "other.png")


def test_settings_of_what_was_never_trained_are_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import demo

    for settings in (["A", "1"], ["A", "2"], ["A", "2"]):
        demo.check_settings(tmp_path, settings)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "metrics.json").write_text("")
    demo.check_settings(tmp_path, ["A", "2"])
    with pytest.raises(DistillError, match="were trained with A 2, not with A 3: give another --output"):
        demo.check_settings(tmp_path, ["A", "3"])


def test_data_of_the_environment_is_not_the_demos():
    outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "DATA")}
    cases = (({"DATA": "/x"}, [], ""), ({}, ["DATA="], ""), ({}, ["DATA=a b"], " --data a b"))
    for environment, argument, data in cases:
        command = ["make", "-n", "demo", "PY=python", *argument]
        result = subprocess.run(command, cwd=ROOT, env={**outside, **environment}, capture_output=True, text=True)
        assert f"demo.py{data}" in [line.strip().removeprefix("python tools/") for line in result.stdout.splitlines()]


def test_damaged_settings_and_another_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import demo

    (tmp_path / "settings.json").write_text('["DATA')
    with pytest.raises(DistillError, match="settings.json is damaged: .* Remove the folder"):
        demo.check_settings(tmp_path, [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", "voc:photos:train", "voc:photos:test"])
    with pytest.raises(DistillError, match="The paths of --data are relative to .* start the demo there"):
        demo.main()


def test_a_wrong_data_set_is_named(tmp_path):
    result = run_script("tools/demo.py", "--output", str(tmp_path), "--data", "voc:/nowhere:train", "voc:/nowhere:test")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: DATASETS.REGISTER, demo_train: the folder '/nowhere' does not exist" in result.stderr

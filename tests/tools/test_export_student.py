"""An exported student is plain Detectron2: a process that cannot import distill gets the same boxes."""

import os

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model

from distill.config import load_config, write_record
from distill.modeling import FCOS
from distill.modeling.checkpoint import load_detector
from tests.helpers import ROOT, detector_cfg, distillation_cfg, run_script, write_teacher

PLAIN = """
import sys
sys.modules["distill"] = None  # importing it fails
import numpy as np, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

config, weights, image, output = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config, allow_unsafe=False)
model = build_model(cfg).eval()
DetectionCheckpointer(model).load(weights or cfg.MODEL.WEIGHTS)
torch.set_num_threads(1)
with torch.no_grad():
    instances = model([{"image": torch.from_numpy(np.load(image))}])[0]["instances"]
np.savez(output, boxes=instances.pred_boxes.tensor.numpy(), scores=instances.scores.numpy())
"""


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_export_and_checkpoint_load_in_plain_detectron2(tmp_path, kind):
    thresholds = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1.0, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    cfg = distillation_cfg(detector_cfg(kind, **thresholds), write_teacher(tmp_path, detector_cfg(kind)))
    model = build_model(cfg).eval()
    checkpoint, config = str(tmp_path / "model.pth"), str(tmp_path / "cfg.yaml")
    torch.save({"model": model.state_dict(), "iteration": 1}, checkpoint)
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    image = torch.randint(256, (3, 75, 61), dtype=torch.uint8).numpy()
    np.save(tmp_path / "image.npy", image)
    with torch.no_grad():
        expected = model([{"image": torch.from_numpy(image)}])[0]["instances"]
    assert len(expected) > 0

    (tmp_path / "teacher.pth").unlink()  # exporting needs no teacher
    out = tmp_path / "exported"
    out.mkdir()
    write_record(str(out / "config.py"), str(ROOT / "tests" / "lazy" / "fcos.py"), [])  # of an earlier export
    relative = os.path.relpath(out, ROOT)  # to where the tool runs
    result = run_script(
        "tools/export_student.py", "--config-file", config, "--weights", checkpoint, "--output", relative
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in out.iterdir()} == {"config.yaml", "model_final.pth", "previous_config.py"}
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["MODEL"]["WEIGHTS"], written["OUTPUT_DIR"]) == (str(out / "model_final.pth"), str(out / "output"))
    exported = torch.load(out / "model_final.pth")["model"]
    assert exported.keys() == model.student.state_dict().keys()
    assert "DISTILL" not in (out / "config.yaml").read_text()

    (tmp_path / "plain.py").write_text(PLAIN)
    for weights in ("", checkpoint):  # the exported file, and the training checkpoint as it is
        arguments = [str(out / "config.yaml"), weights, str(tmp_path / "image.npy"), str(tmp_path / "boxes.npz")]
        result = run_script(str(tmp_path / "plain.py"), *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        got = np.load(tmp_path / "boxes.npz")
        np.testing.assert_array_equal(got["boxes"], expected.pred_boxes.tensor.numpy())
        np.testing.assert_array_equal(got["scores"], expected.scores.numpy())


def test_a_training_is_not_written_over(tmp_path):
    config, weights = tmp_path / "config.yaml", tmp_path / "model_final.pth"
    config.write_text("a config")
    weights.write_bytes(b"a checkpoint")
    arguments = ("--config-file", str(config), "--weights", str(weights), "--output", f"{tmp_path}/.")
    result = run_script("tools/export_student.py", *arguments)
    assert result.returncode == 1 and "which holds the training itself" in result.stderr
    assert config.read_text() == "a config" and weights.read_bytes() == b"a checkpoint"


def test_a_checkpoint_that_does_not_fill_the_student_is_refused(tmp_path):
    cfg = detector_cfg("faster_rcnn")
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    torch.save({"model": {"backbone.fpn_lateral2.bias": torch.zeros(16)}}, tmp_path / "part.pth")
    result = run_script(
        *("tools/export_student.py", "--config-file", str(tmp_path / "cfg.yaml")),
        *("--weights", str(tmp_path / "part.pth"), "--output", str(tmp_path / "out")),
    )
    assert result.returncode == 1 and "error: The student would not be fully loaded" in result.stderr
    assert not (tmp_path / "out").exists()


def test_fcos_on_a_timm_backbone_needs_this_package_and_no_download(tmp_path):
    backbone = {
        "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
        "MODEL.TIMM.NAME": "resnet18",
        "MODEL.TIMM.OUT_INDICES": [2, 3, 4],
    }
    cfg = detector_cfg("fcos", **backbone)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.TIMM.WEIGHTS = "tv_in1k"  # what it was trained from
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    out = tmp_path / "exported"
    result = run_script(
        *("tools/export_student.py", "--config-file", str(tmp_path / "cfg.yaml")),
        *("--weights", str(tmp_path / "model.pth"), "--output", str(out)),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "built from MODEL.FCOS and MODEL.TIMM" in result.stdout
    exported = load_detector(load_config(str(out / "config.yaml")), "student")
    assert isinstance(exported, FCOS)

"""The contact sheets of prototypes, and the benchmark of global knowledge."""

import json

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from PIL import Image

from tests.helpers import run_script
from tests.prototypes.test_hook import NAME, forget_datasets, make_cfg, train  # noqa: F401


def test_each_class_with_prototypes_has_a_sheet(tmp_path):
    cfg = make_cfg(tmp_path, "sheets", boxes_per_image=20, **{"SOLVER.MAX_ITER": 1})
    bank = train(cfg).model.distillers[NAME].prototypes
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    arguments = ["--config-file", str(tmp_path / "cfg.yaml"), "--weights", str(tmp_path / "out" / "model_final.pth")]
    result = run_script("tools/show_prototypes.py", *arguments, "--output", str(tmp_path / "all"))
    assert result.returncode == 0, result.stderr[-3000:]
    known = sorted({label for kept in bank.levels.values() for label in kept.labels.tolist()} - {-1})
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"{k:03d}_class{k}.png" for k in known]
    sheet = read_image(str(tmp_path / "all" / f"00{known[0]}_class{known[0]}.png"), "RGB")
    assert sheet.std() > 20 and sheet.shape[0] > 300  # five rows of noise
    one = ["--output", str(tmp_path / "one"), "--classes", f"class{known[-1]}"]
    assert run_script("tools/show_prototypes.py", *arguments, *one).returncode == 0
    assert len(list((tmp_path / "one").iterdir())) == 1
    path = tmp_path / "sheets" / "annotations.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "images": content["images"][:2]}))
    result = run_script("tools/show_prototypes.py", *arguments, "--output", str(tmp_path))
    assert result.returncode == 1 and "sheets has 2 images: give the config that this" in result.stderr
    path.write_text(json.dumps(content))
    result = run_script("tools/show_prototypes.py", *arguments, "--output", str(tmp_path), "--classes", "cat")
    assert result.returncode == 1 and "error: --classes names cat, but the classes are class0, class1" in result.stderr


def test_a_sheet_shows_the_boxes_of_its_class(tmp_path):
    cfg = make_cfg(tmp_path, "colours", (100, 100), num_images=2)
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    colours = np.eye(3, dtype=np.uint8)[:2] * 255  # class 0 in a red image, class 1 in a green one
    for number, colour in enumerate(colours):
        Image.fromarray(np.broadcast_to(colour, (100, 100, 3)).copy()).save(tmp_path / f"colours/images/{number}.png")
    kept = {"labels": [0, 1, -1], "images": [0, 1, 0], "boxes": [[10.0, 10.0, 40.0, 40.0]] * 3}
    state = {f"distillers.any.prototypes.levels.p2.{name}": torch.tensor(value) for name, value in kept.items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    arguments = ["--config-file", str(tmp_path / "cfg.yaml"), "--weights", str(tmp_path / "model.pth")]
    result = run_script("tools/show_prototypes.py", *arguments, "--output", str(tmp_path / "sheets"))
    assert result.returncode == 0, result.stderr[-3000:]
    for label in (0, 1):
        sheet = read_image(str(tmp_path / "sheets" / f"00{label}_class{label}.png"), "RGB").reshape(-1, 3)
        shown = [(sheet == colour).all(1).sum() for colour in colours]
        assert shown[label] > 1000 and shown[1 - label] == 0


@pytest.mark.parametrize("content, message", [(None, "Cannot read the checkpoint"), ({}, "holds no prototypes")])
def test_a_checkpoint_without_prototypes_is_named(tmp_path, content, message):
    path = tmp_path / "model.pth"
    if content is not None:
        torch.save({"model": content}, path)
    result = run_script(
        "tools/show_prototypes.py", "--config-file", "x", "--weights", str(path), "--output", str(tmp_path / "o")
    )
    assert result.returncode == 1 and f"error: {'The checkpoint' if content is not None else message}" in result.stderr
    assert message in result.stderr


def test_the_benchmark_reports_both_ways_of_the_losses(tmp_path):
    size = ["--rounds", "1", "--instances", "300", "--boxes", "6", "--height", "128", "--width", "160"]
    result = run_script("tools/benchmark_global.py", *size, "--json", str(tmp_path / "rows.json"))
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].rsplit(", ", 1)[-1] for row in content["rows"]] == ["256 channels", "together", "box by box"]
    assert content["ratio"] > 0 and f"together / box by box: {content['ratio']:.4f}" in result.stdout

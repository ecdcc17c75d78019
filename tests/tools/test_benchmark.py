"""The benchmark runs from a config alone and reports every part."""

import json
import sys

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from tests.helpers import ROOT, aligned_cfg, detector_cfg, distillation_cfg, run_script, write_teacher


@pytest.mark.parametrize(
    "kind, other",
    [
        ("mask_rcnn", "GlobalKnowledgeDistiller"),
        ("fcos", "GlobalKnowledgeDistiller"),
        ("retinanet", "LogitDistiller"),  # whose loss is of the head's outputs alone
        ("retinanet", "CrossKDDistiller"),  # and here of what is inside the head
    ],
)
def test_reports_every_part(tmp_path, kind, other):
    size = {"INPUT.MIN_SIZE_TRAIN": [64], "INPUT.MAX_SIZE_TRAIN": 96, "SOLVER.IMS_PER_BATCH": 2}
    names = ["ReviewDistiller", other]
    with_convolutions = [name for name in names if name not in ("LogitDistiller", "CrossKDDistiller")]
    teacher = write_teacher(tmp_path, detector_cfg(kind))
    overrides = {"DISTILL.DISTILLERS": names, "DISTILL.CROSSKD.ALIGN_SCALE": True}
    cfg = distillation_cfg(detector_cfg(kind, **size), teacher, **overrides)
    (tmp_path / "teacher.pth").unlink()  # weights play no part in the time
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    output = tmp_path / "rows.json"
    result = run_script(
        "tools/benchmark.py", "--config-file", str(tmp_path / "cfg.yaml"), "--json", str(output), "--rounds", "2"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(output.read_text())
    parts = [
        "student's backbone alone, forward and backward",
        "student's own step",
        "teacher's forward",
        *(f"{name}, forward and backward" for name in names),
        "full step",
        *(f"convolutions of {name}, forward and backward" for name in with_convolutions),
        "full step that measures gradients (every 50 iterations)",
        "teacher's forward in float32",
        "teacher's forward in bfloat16",
    ]
    assert [row["part"] for row in content["rows"]] == parts
    assert all(row["min ms"] <= row["ms"] <= row["max ms"] and row["peak MiB"] > 0 for row in content["rows"])
    assert content["rows"][0]["/ backbone"] == 1 and all(row["/ backbone"] > 0 for row in content["rows"])
    assert content["rows"][1]["/ own step"] == 1 and all(row["operators"] > 10 for row in content["rows"])
    operators = {row["part"].partition(" (")[0]: row["operators"] for row in content["rows"]}
    assert operators["full step that measures gradients"] > operators["full step"]
    kept = [row["part"] for row in content["rows"] if row["kept MiB"]]
    assert kept == [f"{name}, forward and backward" for name in names]
    assert f"full step / sum of its parts: {content['ratio']:.3f}" in result.stdout


def test_convolutions_alone_are_those_that_a_distiller_runs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from benchmark import convolutions_of

    layer = nn.Conv2d(2, 3, 1)
    distiller = nn.ModuleList([layer, nn.Linear(2, 2), nn.Conv2d(4, 4, 1)])
    maps = [torch.rand(1, 2, size, size, requires_grad=True) for size in (4, 2)]
    calls = convolutions_of(distiller, lambda: [layer(x) for x in maps])
    assert [(who, x.shape, x.requires_grad) for who, x in calls] == [(layer, x.shape, False) for x in maps]
    layer(maps[0])
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_random_weights_stay_within_float16(monkeypatch, kind):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from benchmark import settle

    cfg = detector_cfg(kind, **{"MODEL.RESNETS.DEPTH": 101, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64})
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    backbone = build_backbone(cfg).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96)).float() - 110
    with torch.no_grad():
        wild = max(level.abs().max() for level in backbone(images).values())
        settle(backbone)
        settled = max(level.abs().max() for level in backbone(images).values())
    assert settled < torch.finfo(torch.float16).max / 4 < wild


def test_compares_with_an_earlier_measurement(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from benchmark import compare

    rows = [{"part": "a", "ms": 30.0, "peak MiB": 5.0}, {"part": "new", "ms": 1.0, "peak MiB": 1.0}]
    old = [{"part": "b", "ms": 1.0, "peak MiB": 2.0}, {"part": "a", "ms": 40.0, "peak MiB": 8.0}]
    first, second = compare(rows, old)
    assert first == {**rows[0], "earlier ms": 40.0, "earlier MiB": 8.0, "/ earlier": 0.75}
    assert second == {**rows[1], "earlier ms": None, "earlier MiB": None, "/ earlier": None}


HALF = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "DISTILL.STUDENT.INPUT_SCALE": 0.5}


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_inference_of_teacher_full_size_and_half_size_student_on_the_same_image(tmp_path, kind):
    whole = {"INPUT.MIN_SIZE_TEST": 128, "INPUT.MAX_SIZE_TEST": 192}
    teacher = write_teacher(tmp_path, aligned_cfg(kind, **whole))
    cfg = distillation_cfg(aligned_cfg(kind, "half"), teacher, **{"DISTILL.DISTILLERS": ["AlignedDistiller"], **HALF})
    (tmp_path / "teacher.pth").unlink()
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    output = tmp_path / "rows.json"
    command = ["tools/benchmark.py", "--config-file", str(tmp_path / "cfg.yaml"), "--inference", "--rounds", "2"]
    result = run_script(*command, "--json", str(output), "--image-size", "100", "150")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    assert [(row["detector"], row["input"]) for row in rows] == [
        ("teacher", "128x192"),
        ("student at full size", "128x192"),
        ("student at 0.5 of the size", "64x96"),
    ]
    both, full, half = (row["GFLOPs"] for row in rows)
    assert both > full > half > 0
    assert all(row["min ms"] <= row["ms"] <= row["max ms"] and row["peak MiB"] > 0 for row in rows)
    assert rows[0]["/ teacher"] == 1


def test_inference_with_a_plain_teacher(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    half = {**HALF, "DISTILL.DISTILLERS": ["ReviewDistiller"]}
    (tmp_path / "cfg.yaml").write_text(distillation_cfg(aligned_cfg("faster_rcnn", "half"), teacher, **half).dump())
    command = ["tools/benchmark.py", "--config-file", str(tmp_path / "cfg.yaml"), "--inference", "--rounds", "1"]
    result = run_script(*command, "--image-size", "100", "150")
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(
        f"| {name} " in result.stdout for name in ("teacher", "student at full size", "student at 0.5 of the size")
    )


def test_a_python_config(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("mask_rcnn"))
    arguments = ["--config-file", "tests/lazy/mask_rcnn.py", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    opts = ["distill.DISTILLERS=[ReviewDistiller]", "train.device=cpu"]
    opts += [f"distill.{key.removeprefix('DISTILL.')}={value}" for key, value in teacher.items()]
    result = run_script("tools/benchmark.py", *arguments, *opts)
    assert result.returncode == 0, result.stderr[-3000:]
    parts = [row["part"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert "ReviewDistiller, forward and backward" in parts and "full step" in parts
    result = run_script("tools/benchmark.py", *arguments, "--inference", "--image-size", "64", "64", *opts)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["detector"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [
        "teacher",
        "student",
    ]
    result = run_script("tools/benchmark.py", *arguments, *opts, "distill.REVIEW.LEVELS=[p9]")
    assert "error: distill.REVIEW.LEVELS asks for p9" in result.stderr

"""The project: its formula, its config, and a step with student and teacher of different families."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill.config import load_config
from tests.helpers import ROOT, detector_cfg, distillation_cfg, random_batch, write_teacher

IMPORTS = ["DISTILL.IMPORTS", "['projects.AttentionTransfer.attention_transfer']"]


def test_equals_a_loop_over_images():
    from projects.AttentionTransfer.attention_transfer import attention_loss

    rng = np.random.default_rng()
    student, teacher = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(3, 7, 5, 6))
    distances = []
    for s, t in zip(student, teacher):
        a, b = ((x**2).sum(0).ravel() for x in (s, t))
        distances.append(np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)))
    loss = attention_loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert loss.item() == pytest.approx(np.mean(distances), rel=1e-9)


def test_equal_maps_have_a_finite_gradient():
    from projects.AttentionTransfer.attention_transfer import attention_loss

    features = torch.randn(1, 2, 4, 4, dtype=torch.float16, requires_grad=True)
    loss = attention_loss(features, features.detach())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(features.grad).all()


def test_the_config_brings_its_own_keys(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "projects/AttentionTransfer/demo.yaml"
    cfg = load_config(path, ["DISTILL.ATTENTION.LEVELS", "['p3']", "DISTILL.ATTENTION.LOSS_WEIGHT", "0.25"])
    assert cfg.DISTILL.ATTENTION.LEVELS == ["p3"] and cfg.DISTILL.ATTENTION.LOSS_WEIGHT == 0.25


def test_a_retinanet_learns_from_a_wider_faster_rcnn(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24))
    (tmp_path / "config.yaml").write_text(distillation_cfg(detector_cfg("retinanet"), teacher).dump())
    opts = [*IMPORTS, "DISTILL.DISTILLERS", "['AttentionTransferDistiller']"]
    model = build_model(load_config(str(tmp_path / "config.yaml"), opts)).train()
    assert model.distillers["AttentionTransferDistiller"].levels == ["p3", "p4", "p5", "p6"]
    with EventStorage():
        losses = model(random_batch((64, 96), (61, 75)))
    losses["loss_attention"].backward()
    assert 0 < losses["loss_attention"].item() < 4 * 2**0.5
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0

"""Pearson correlation: its formula, and a step with student and teacher of different families."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill.config import load_config
from distill.losses import pearson_loss
from tests.helpers import detector_cfg, distillation_cfg, random_batch, write_teacher


def test_is_one_minus_the_correlation_of_each_channel():
    rng = np.random.default_rng()
    student, teacher = rng.normal(size=(2, 2, 5, 6, 7)) * 3 + 1
    expected = np.mean([1 - np.corrcoef(student[:, c].ravel(), teacher[:, c].ravel())[0, 1] for c in range(5)])
    loss = pearson_loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    scaled = pearson_loss(torch.from_numpy(5 * student - 2), torch.from_numpy(teacher))
    assert scaled.item() == pytest.approx(expected, rel=1e-5)


def test_small_deviations_count_in_full():
    """Features that vary by a thousandth, where an epsilon inside the root makes a perfect match half a mismatch."""
    rng = np.random.default_rng()
    student, teacher = 1e-3 * rng.normal(size=(2, 2, 5, 6, 7)), rng.normal(size=(2, 5, 6, 7))
    terms = []
    for c in range(5):
        a, b = ((x[:, c] - x[:, c].mean()) / (x[:, c].std() + 1e-6) for x in (student[0], teacher))
        terms.append(((a - b) ** 2).mean() / 2)
    assert pearson_loss(*(torch.from_numpy(x) for x in (student[0], teacher))).item() == pytest.approx(np.mean(terms))


def test_weights_count_cells():
    rng = np.random.default_rng()
    student, teacher = rng.normal(size=(2, 2, 5, 6, 7))
    weights = rng.integers(0, 3, size=(2, 1, 6, 7))
    repeated = [np.repeat(x.transpose(1, 0, 2, 3).reshape(5, -1), weights.ravel(), axis=1) for x in (student, teacher)]
    expected = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(*repeated)])
    loss = pearson_loss(*(torch.from_numpy(x) for x in (student, teacher, weights.astype(float))))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_local_part_of_global_knowledge_may_be_pearsons(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24))
    (tmp_path / "config.yaml").write_text(distillation_cfg(detector_cfg("faster_rcnn"), teacher).dump())
    opts = ["DISTILL.GLOBAL.NUM_PROTOTYPES", "2"]
    opts += ["DISTILL.DISTILLERS", "['GlobalKnowledgeDistiller']", "DISTILL.GLOBAL.LOCAL_DISTILLER", "PearsonDistiller"]
    model = build_model(load_config(str(tmp_path / "config.yaml"), opts)).train()
    with EventStorage():
        losses = model(random_batch((64, 96), (61, 75)))
    losses["loss_local"].backward()
    assert losses["loss_local"] > 0
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0


def test_constant_channels_and_half_precision_stay_finite():
    features = torch.zeros(1, 2, 4, 4, dtype=torch.float16, requires_grad=True)
    loss = pearson_loss(features, torch.randn(1, 2, 4, 4, dtype=torch.float16))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(features.grad).all()


def test_a_retinanet_learns_from_a_faster_rcnn(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24))
    base = distillation_cfg(detector_cfg("retinanet"), teacher)
    (tmp_path / "config.yaml").write_text(base.dump())
    opts = ["DISTILL.DISTILLERS", "['PearsonDistiller']"]
    model = build_model(load_config(str(tmp_path / "config.yaml"), opts)).train()
    assert model.distillers["PearsonDistiller"].levels == ["p3", "p4", "p5", "p6"]
    with EventStorage():
        losses = model(random_batch((64, 96), (61, 75)))
    losses["loss_pearson"].backward()
    assert 0 < losses["loss_pearson"].item() / 6 < 8
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters() if p.dim() > 1)
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0


def test_gradient_is_that_of_the_whole_formula():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: pearson_loss(x, teacher), student.requires_grad_())

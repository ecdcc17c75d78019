"""Every method on every detector: a step with all gradients, or one sentence that says why not."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill.errors import DistillError
from tests.helpers import DETECTORS, detector_cfg, distillation_cfg, random_batch, write_teacher

DENSE = ("retinanet", "fcos")
# method: the detectors it is for, the overrides that it needs here, and what others are told
METHODS = {
    "ReviewDistiller": (DETECTORS, {}, ""),
    "StructuralDistiller": (DETECTORS, {}, ""),
    "ImitationDistiller": (DETECTORS, {}, ""),
    "AlignedDistiller": (DETECTORS, {"DISTILL.ALIGNED.WARMUP_ITERS": 0}, ""),
    "FGDDistiller": (DETECTORS, {}, ""),
    # levels of several cells: of one, all may be masked, and its softmax is 1
    "MGDDistiller": (DETECTORS, {"DISTILL.MGD.LEVELS": ["p3", "p4", "p5"]}, ""),
    "CWDDistiller": (DETECTORS, {"DISTILL.CWD.LEVELS": ["p3", "p4", "p5"]}, ""),
    "PearsonDistiller": (DETECTORS, {}, ""),
    "CrossKDDistiller": (DENSE, {}, "expected RetinaNet or FCOS as student and as teacher"),
    "LogitDistiller": (DETECTORS, {"DISTILL.LOGIT.KIND": "KD"}, ""),
    "LogitDistiller/DKD": (DETECTORS, {"DISTILL.LOGIT.KIND": "DKD"}, ""),
    "LogitDistiller/BCKD": (DENSE, {"DISTILL.LOGIT.KIND": "BCKD"}, "expected KD or DKD for a detector with a box head"),
}


def build_pair(tmp_path, student, teacher=None, names=("CrossKDDistiller",), teacher_channels=24, **overrides):
    given = write_teacher(tmp_path, detector_cfg(teacher or student, channels=teacher_channels))
    overrides = {"DISTILL.DISTILLERS": list(names), **overrides}
    return build_model(distillation_cfg(detector_cfg(student), given, **overrides)).train()


def step(model, batch):
    with EventStorage():
        return model(batch)


def build_hooks(model):
    return [distiller.build_hooks(model) for distiller in model.distillers.values()]


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_gives_every_trainable_weight_a_gradient_or_is_refused(tmp_path, method, kind):
    kinds, overrides, message = METHODS[method]
    model = build_pair(tmp_path, kind, names=[method.partition("/")[0]], **overrides)
    batch = random_batch((64, 96), (61, 75))
    if kind not in kinds:
        with pytest.raises(DistillError, match=message):
            build_hooks(model)
        with pytest.raises(DistillError, match=message):
            step(model, batch)
        return
    build_hooks(model)
    losses = step(model, batch)
    own = losses.keys() - step(model.student, batch).keys()
    assert own and all(torch.isfinite(losses[name]) and losses[name] > 0 for name in own)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in model.teacher.model.parameters())
    # the distillation alone reaches the student's backbone and all layers of the distiller
    model.zero_grad()
    losses = step(model, batch)
    sum(losses[name] for name in own).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.backbone.parameters())
    unreached = [name for name, p in model.distillers.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # a global context starts as the identity: what lies before its last convolution gets nothing in the first step
    assert not [name for name in unreached if "context" not in name]


@pytest.mark.parametrize("student, teacher", [("faster_rcnn", "retinanet"), ("retinanet", "faster_rcnn")])
@pytest.mark.parametrize("name", ["CrossKDDistiller", "LogitDistiller"])
def test_classifications_of_other_families_are_refused(tmp_path, name, student, teacher):
    model = build_pair(tmp_path, student, teacher, [name])
    with pytest.raises(DistillError, match="expected RetinaNet or FCOS|Use a teacher of the same family"):
        model.distillers[name].build_hooks(model)

"""Detectors without an FPN: C4 and DC5."""

import pytest
import torch
from detectron2.modeling import build_model

from distill.errors import DistillError
from tests.distillers.test_methods import build_hooks, step
from tests.helpers import built_in, detector_cfg, distillation_cfg, random_batch, write_teacher

NO_BOX_HEAD = ["CrossKDDistiller", "GlobalKnowledgeDistiller", "LogitDistiller"]  # what C4 cannot have


def single_level(kind, **overrides):
    level = {"c4": "res4", "dc5": "res5"}[kind]
    values = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": [level],
        "MODEL.RPN.IN_FEATURES": [level],
        "MODEL.ROI_HEADS.IN_FEATURES": [level],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads" if kind == "c4" else "StandardROIHeads",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    }
    if kind == "dc5":  # Detectron2 dilates bottlenecks alone
        values |= {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES5_DILATION": 2}
    return detector_cfg("faster_rcnn", **{**values, **overrides})


def check_step(model):
    build_hooks(model)
    losses = step(model, random_batch((96, 128), (93, 75)))
    assert all(torch.isfinite(loss) for loss in losses.values()) and len(losses) > 4
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", ["c4", "dc5"])
def test_every_method_that_compares_features_takes_a_step(tmp_path, kind):
    names = [x for x in built_in("faster_rcnn") if kind == "dc5" or x not in NO_BOX_HEAD]
    teacher = single_level(kind, **{"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 32})
    given = write_teacher(tmp_path, teacher)
    overrides = {"DISTILL.DISTILLERS": names, "DISTILL.GRADIENT_LOG_PERIOD": 0}
    check_step(build_model(distillation_cfg(single_level(kind), given, **overrides)).train())


def test_a_c4_student_learns_from_a_level_of_an_fpn(tmp_path):
    given = write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24))
    overrides = {"DISTILL.DISTILLERS": ["ReviewDistiller", "FGDDistiller"], "DISTILL.STUDENT.LEVELS": ["res4=p4"]}
    model = build_model(distillation_cfg(single_level("c4"), given, **overrides)).train()
    assert [distiller.levels for distiller in model.distillers.values()] == [["p4"], ["p4"]]
    check_step(model)


@pytest.mark.parametrize("name", ["GlobalKnowledgeDistiller", "LogitDistiller"])
def test_classifications_of_a_c4_are_refused(tmp_path, name):
    given = write_teacher(tmp_path, single_level("c4"))
    model = build_model(distillation_cfg(single_level("c4"), given, **{"DISTILL.DISTILLERS": [name]})).train()
    with pytest.raises(DistillError, match=r"student has no box head that takes boxes by themselves \(C4 has none\)"):
        build_hooks(model)


@pytest.mark.parametrize(
    "levels, message",
    [
        (["res4"], "expected pairs 'STUDENT=TEACHER'"),
        (["p4=p4"], "names the level p4 of the student, which has res4"),
        (["res4=p9"], "names the level p9 of the teacher, which has p2"),
        (["res4=p3"], "Level p3 has stride 16 in the student and 8 in the teacher"),
        ([], "share no level"),
    ],
)
def test_levels_that_do_not_fit_are_refused(tmp_path, levels, message):
    given = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    with pytest.raises(DistillError, match=message):
        build_model(distillation_cfg(single_level("c4"), given, **{"DISTILL.STUDENT.LEVELS": levels}))


def test_two_levels_of_one_name_are_refused(tmp_path):
    given = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    with pytest.raises(DistillError, match="two of the student's levels one name"):
        build_model(distillation_cfg(detector_cfg("faster_rcnn"), given, **{"DISTILL.STUDENT.LEVELS": ["p4=p5"]}))

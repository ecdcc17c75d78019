"""The teacher and the distillers in a precision of their own, and the teacher's norms in its convolutions."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from distill.errors import DistillError
from distill.modeling import Teacher
from distill.modeling.precision import distill_dtype, fold_norms
from tests.helpers import DETECTORS, detector_cfg, distillation_cfg, random_batch, write_teacher

METHODS = ["ReviewDistiller", "StructuralDistiller", "ImitationDistiller"]


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with batch norms that change what goes through them."""
    for norm in model.modules():
        if isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_folded_norms_change_nothing(kind, norm):
    cfg = detector_cfg(kind, **{"MODEL.RESNETS.NORM": norm, "MODEL.FPN.NORM": norm})
    model = with_statistics(build_model(cfg)).double().eval()
    kinds = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}
    assert any(isinstance(x, kinds[norm]) for x in model.backbone.modules())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = model.backbone(images)
        fold_norms(model)
        folded = model.backbone(images)
    assert not any(isinstance(x, Conv2d) and x.norm is not None for x in model.backbone.modules())
    assert not any(isinstance(x, tuple(kinds.values())) for x in model.backbone.modules())
    for level, value in expected.items():
        torch.testing.assert_close(folded[level], value, rtol=1e-10, atol=1e-10)


def test_norms_are_folded_in_float64():
    model = with_statistics(build_model(detector_cfg("retinanet"))).eval()
    exact = copy.deepcopy(model).double()
    for x in (model, exact):
        fold_norms(x)
    for key, value in exact.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.float()), key


def test_other_norms_stay():
    model = build_model(detector_cfg("faster_rcnn", channels=32, **{"MODEL.FPN.NORM": "GN"}))
    fold_norms(model)
    assert sum(isinstance(x, nn.GroupNorm) for x in model.modules()) > 0


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_teacher_in_bfloat16_returns_nearly_the_same_in_float32(kind):
    plain = with_statistics(build_model(detector_cfg(kind))).eval()
    batch = random_batch((64, 96), (61, 75))
    with torch.no_grad():
        expected = plain.backbone(plain.preprocess_image(batch).tensor)
    teacher = Teacher(copy.deepcopy(plain), dtype=torch.bfloat16)
    view = teacher.view(batch)
    for level, value in expected.items():
        got = view.features[level]
        assert got.dtype == torch.float32 and got.is_contiguous()
        error = (got - value).norm() / value.norm()
        assert 0 < error < 0.05  # it was computed in bfloat16
    convs = [x for x in teacher.model.modules() if isinstance(x, nn.Conv2d)]
    assert convs and all(x.weight.dtype == torch.bfloat16 for x in convs)
    assert not any(isinstance(x, FrozenBatchNorm2d) for x in teacher.model.backbone.modules())  # they are folded
    if view.has_box_head:
        with torch.no_grad():
            logits = view.box_head([x["instances"].gt_boxes for x in batch])[0]
    else:
        logits = view.anchor_logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_the_students_own_losses_do_not_depend_on_the_distillations_precision(tmp_path, kind):
    torch.manual_seed(0)
    teacher = write_teacher(tmp_path, detector_cfg(kind, channels=24))
    batch = random_batch((64, 96), (61, 75))
    losses, seen = {}, {}
    for precision in ("float32", "bfloat16"):
        settings = {"DISTILL.PRECISION": precision, "DISTILL.DISTILLERS": METHODS, "DISTILL.GRADIENT_LOG_PERIOD": 0}
        torch.manual_seed(1)
        model = build_model(distillation_cfg(detector_cfg(kind), teacher, **settings)).train()
        project = model.distillers["ReviewDistiller"].review.fusions[0].project
        project.register_forward_pre_hook(lambda module, args, key=precision: seen.update({key: args[0].dtype}))
        with EventStorage():
            losses[precision] = model(batch)
        sum(losses[precision].values()).backward()
        if precision == "float32":  # beside a student in half precision, too
            with EventStorage(), torch.autocast("cpu", torch.bfloat16):
                model(batch)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert seen == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for key, loss in losses["float32"].items():
        other = losses["bfloat16"][key]
        assert other.dtype == torch.float32
        if key in ("loss_review", "loss_structural", "loss_imitation"):
            torch.testing.assert_close(other, loss, rtol=0.05, atol=0)
            assert other != loss
        else:
            assert torch.equal(other, loss), key


def test_weights_are_inherited_before_they_are_folded_and_rounded(tmp_path):
    cfg = detector_cfg("faster_rcnn")
    settings = {"DISTILL.PRECISION": "bfloat16", "DISTILL.STUDENT.INHERIT": ["backbone"]}
    model = build_model(distillation_cfg(cfg, write_teacher(tmp_path, cfg), **settings))
    expected = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]
    model.start()
    own = model.student.state_dict()
    assert all(torch.equal(own[key], value) for key, value in expected.items() if key.startswith("backbone"))


@pytest.mark.parametrize(
    "precision, amp, dtype",
    [
        ("auto", False, None),
        ("auto", True, torch.bfloat16),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_the_precision_of_a_config(precision, amp, dtype):
    cfg = detector_cfg("faster_rcnn", **{"DISTILL.PRECISION": precision, "SOLVER.AMP.ENABLED": amp})
    assert distill_dtype(cfg) == dtype


@pytest.mark.parametrize("precision", ["float16", "half"])
def test_a_precision_that_there_is_not_is_named(precision):
    cfg = detector_cfg("faster_rcnn", **{"DISTILL.PRECISION": precision})
    with pytest.raises(DistillError, match=f"DISTILL.PRECISION is '{precision}': expected 'auto', 'float32' or 'bfl"):
        distill_dtype(cfg)


def test_the_students_box_head_keeps_its_precision_beside_a_teacher_in_bfloat16(tmp_path):
    settings = {"DISTILL.PRECISION": "bfloat16", "DISTILL.DISTILLERS": ["LogitDistiller"]}
    settings["DISTILL.LOGIT.INSTANCES"] = "ground_truth"  # runs the student's head a second time
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), teacher, **settings)).train()
    seen = {}
    for side, detector in (("student", model.student), ("teacher", model.teacher.model)):
        detector.roi_heads.box_head.fc1.register_forward_hook(
            lambda module, args, output, side=side: seen.setdefault(side, []).append(output.dtype)
        )
    with EventStorage():
        model(random_batch((64, 96)))
    assert seen == {"student": 2 * [torch.float32], "teacher": [torch.bfloat16]}

"""CrossKD: what goes through which head, and which detectors it refuses."""

import pytest
import torch
from detectron2.modeling import build_model

from distill.distillers.instances import mean_over_processes
from distill.errors import DistillError
from distill.losses import align_scale, cross_box_loss, cross_class_loss
from tests.distillers.test_methods import build_hooks, build_pair, step
from tests.helpers import aligned_cfg, detector_cfg, distillation_cfg, random_batch, write_teacher
from tests.modeling.test_aligned_student import SMALL_TEST

CONVS = {"MODEL.RETINANET.NUM_CONVS": 2, "MODEL.FCOS.NUM_CONVS": 2, "MODEL.FCOS.NORM": ""}


def confident(model):
    """Classification heads that say something: of untrained ones the losses are tiny."""
    for side in (model.student, model.teacher.model):
        torch.nn.init.normal_(side.head.cls_score.weight, std=0.5)
        torch.nn.init.zeros_(side.head.cls_score.bias)
    return model


def flat(levels, width):
    """Predictions of all levels, ``[N, R, width]``, written by hand: cell by cell, anchor by anchor."""
    rows = []
    for level in levels:
        n, channels, height, width_ = level.shape
        by_anchor = level.reshape(n, channels // width, width, height, width_)
        rows.append(by_anchor.permute(0, 3, 4, 1, 2).reshape(n, -1, width))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("channels, is_aligned", [(16, False), (24, False), (24, True)])
def test_beside_a_student_in_mixed_precision(tmp_path, channels, precision, is_aligned):
    given = write_teacher(tmp_path, detector_cfg("retinanet", channels=channels, **CONVS))
    overrides = {"DISTILL.DISTILLERS": ["CrossKDDistiller"], "DISTILL.PRECISION": precision}
    overrides |= {"SOLVER.AMP.ENABLED": True, "DISTILL.CROSSKD.ALIGN_SCALE": is_aligned}
    model = confident(build_model(distillation_cfg(detector_cfg("retinanet", **CONVS), given, **overrides))).train()
    batch = random_batch((64, 96), (61, 75))
    losses = {}
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses[enabled] = step(model, batch)
    for key in ("loss_cross_class", "loss_cross_box"):
        assert losses[True][key].dtype == torch.float32
        torch.testing.assert_close(losses[True][key], losses[False][key], rtol=0.1, atol=0.0)


def with_the_scale_of(own, given):
    """Channel by channel, written by hand."""
    aligned = own.clone()
    for channel in range(own.shape[1]):
        x, y = own[:, channel], given[:, channel]
        aligned[:, channel] = (x - x.mean()) / (x.std() + 1e-6) * y.std() + y.mean()
    return aligned


@pytest.mark.parametrize("is_aligned", [False, True])
@pytest.mark.parametrize("num_convs", [0, 1, 2])
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_is_the_teachers_head_on_the_students_features(tmp_path, kind, num_convs, is_aligned):
    given = write_teacher(tmp_path, detector_cfg(kind, **CONVS))
    overrides = {"DISTILL.CROSSKD.NUM_TEACHER_CONVS": num_convs, "DISTILL.CROSSKD.BETA": 1.5}
    overrides["DISTILL.CROSSKD.ALIGN_SCALE"] = is_aligned
    overrides |= {"DISTILL.DISTILLERS": ["CrossKDDistiller"], "DISTILL.CROSSKD.BOX_WEIGHT": 3.0}
    model = confident(build_model(distillation_cfg(detector_cfg(kind, **CONVS), given, **overrides))).train()
    batch = random_batch((64, 96), (61, 75))
    losses = step(model, batch)
    student, teacher = model.student, model.teacher.model
    features = [
        [view.backbone(view.preprocess_image(batch).tensor)[name] for name in view.head_in_features]
        for view in (student, teacher)
    ]
    predictions = []
    for own, other, predict, their_end in (
        ("cls_subnet", "cls_subnet", teacher.head.cls_score, num_convs),
        ("bbox_subnet", "bbox_subnet", teacher.head.bbox_pred, num_convs),
    ):
        layers = 2 * (2 - their_end)  # each convolution has a ReLU behind it
        if is_aligned and layers:  # before that
            layers -= 1
        inside = [getattr(student.head, own)[:layers](x) for x in features[0]]
        if is_aligned:
            target = [getattr(teacher.head, other)[:layers](x) for x in features[1]]
            inside = [with_the_scale_of(*pair) for pair in zip(inside, target)]
        cross = [predict(getattr(teacher.head, other)[layers:](x)) for x in inside]
        predictions.append([cross, [predict(getattr(teacher.head, other)(x)) for x in features[1]]])
    logits = [flat(x, 3) for x in predictions[0]]
    anchors = torch.cat([x.tensor for x in teacher.anchor_generator(features[1])])
    boxes = [
        torch.stack([teacher.box2box_transform.apply_deltas(y, anchors) for y in flat(x, 4)]) for x in predictions[1]
    ]
    labels = torch.cat(student.label_anchors(student.anchor_generator(features[0]), [x["instances"] for x in batch])[0])
    positives = max(1, int(((labels >= 0) & (labels < 3)).sum()))
    expected = cross_class_loss(*logits, 1.5) / positives, 3 * cross_box_loss(*boxes, logits[1]) / positives
    torch.testing.assert_close(losses["loss_cross_class"], expected[0], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(losses["loss_cross_box"], expected[1], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_the_scale_of_normalised_towers_is_aligned_behind_the_norm(tmp_path, norm, monkeypatch):
    kind, more = ("fcos", {"MODEL.FCOS.NORM": "GN"}) if norm == "GN" else ("retinanet", {"MODEL.RETINANET.NORM": "BN"})
    cfg = detector_cfg(kind, channels=32, **{**CONVS, **more})
    given = write_teacher(tmp_path, cfg)
    overrides = {"DISTILL.DISTILLERS": ["CrossKDDistiller"], "DISTILL.CROSSKD.ALIGN_SCALE": True}
    model = build_model(distillation_cfg(cfg, given, **overrides)).train()
    build_hooks(model)
    seen = []
    monkeypatch.setattr("distill.distillers.cross_head.align_scale", lambda *x: seen.append(x) or align_scale(*x))
    batch = random_batch((160, 192), (160, 192))
    losses = step(model, batch)
    teacher = model.teacher.model
    features = teacher.backbone(teacher.preprocess_image(batch).tensor)
    for tower, pairs in zip((teacher.head.cls_subnet, teacher.head.bbox_subnet), (seen[:5], seen[5:])):
        assert isinstance(tower[2], torch.nn.ReLU) and isinstance(tower[3], torch.nn.Conv2d)
        for (_, target), name in zip(pairs, teacher.head_in_features, strict=True):
            torch.testing.assert_close(target, tower[:2](features[name]), rtol=1e-4, atol=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.head.parameters())


def test_features_before_an_activation_have_to_be_asked_for(tmp_path):
    model = build_pair(tmp_path, "retinanet", **CONVS)
    model.distillers["CrossKDDistiller"].align_scale = True  # after the model was built
    with pytest.raises(DistillError, match="unactivated_towers has to name 1"):
        step(model, random_batch((64, 96)))


def test_a_teacher_with_other_classes_teaches(tmp_path):
    given = write_teacher(tmp_path, detector_cfg("retinanet", **{"MODEL.RETINANET.NUM_CLASSES": 7}))
    overrides = {"DISTILL.DISTILLERS": ["CrossKDDistiller"]}
    model = build_model(distillation_cfg(detector_cfg("retinanet"), given, **overrides)).train()
    build_hooks(model)
    assert step(model, random_batch((64, 96)))["loss_cross_class"] > 0


@pytest.mark.parametrize("is_aligned", [False, True])
def test_a_student_at_half_the_resolution_learns_from_a_fused_teacher(tmp_path, is_aligned):
    given = write_teacher(tmp_path, aligned_cfg("retinanet", channels=24))
    overrides = {
        "DISTILL.DISTILLERS": ["CrossKDDistiller"],
        "DISTILL.STUDENT.INPUT_SCALE": 0.5,
        "DISTILL.CROSSKD.ALIGN_SCALE": is_aligned,
        **SMALL_TEST,
    }
    model = build_model(distillation_cfg(aligned_cfg("retinanet", "half"), given, **overrides)).train()
    build_hooks(model)
    losses = step(model, random_batch((128, 192), (100, 150)))
    assert losses["loss_cross_class"] > 0 and losses["loss_cross_box"] > 0
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_images_without_boxes_still_teach(tmp_path):
    model = build_pair(tmp_path, "retinanet")
    losses = step(model, random_batch((64, 96), boxes=0))
    assert losses["loss_cross_class"] > 0 and torch.isfinite(losses["loss_cross_class"])


def test_a_student_that_ran_by_itself_leaves_nothing_behind(tmp_path):
    model = build_pair(tmp_path, "retinanet", teacher_channels=16)
    batch = random_batch((64, 96))
    first = step(model, batch)["loss_cross_class"]
    step(model.student, random_batch((96, 96)))
    assert step(model, batch)["loss_cross_class"] == first


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"DISTILL.CROSSKD.NUM_TEACHER_CONVS": 2}, "last 2 convolutions.*the RetinaNet's head has 1"),
        ({"DISTILL.STUDENT.INPUT_SCALE": 0.5, **SMALL_TEST}, "needs the same"),
        ({"MODEL.RETINANET.IN_FEATURES": ["p3", "p4"], "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32]]}, "needs the same"),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_the_first_step(tmp_path, overrides, message):
    model = build_pair(tmp_path, "retinanet", **overrides)
    with pytest.raises(DistillError, match=message):
        build_hooks(model)


@pytest.mark.parametrize("key, value", [("NUM_TEACHER_CONVS", -1), ("BETA", 0.5), ("BETA", -1.0)])
def test_numbers_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(DistillError, match=f"{key} is {value}"):
        build_pair(tmp_path, "retinanet", **{f"DISTILL.CROSSKD.{key}": value})


def test_a_head_of_other_channels_than_its_features_is_refused(tmp_path):
    model = build_pair(tmp_path, "retinanet")
    model.student.head.bbox_pred = torch.nn.Conv2d(8, 12, 3, padding=1)
    for tower in (model.student.head.cls_subnet, model.student.head.bbox_subnet):
        tower.append(torch.nn.Conv2d(16, 8, 3))
    with pytest.raises(DistillError, match="have 8 channels and its features 16|have 16 channels"):
        model.distillers["CrossKDDistiller"].num_teacher_convs = 0
        build_hooks(model)


def test_nothing_positive_counts_as_one():
    assert mean_over_processes(0, torch.device("cpu")) == 1
    assert mean_over_processes(torch.tensor(5), torch.device("cpu")) == 5

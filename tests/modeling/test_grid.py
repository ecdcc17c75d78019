"""Each side pads as it does by itself; the views show the cells that both have, unchanged."""

import gc
import weakref

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList

from distill.distillers import Distiller
from distill.modeling.loss_weights import LossWeights
from distill.modeling.views import align
from tests.helpers import built_in, detector_cfg, distillation_cfg, random_batch, write_teacher

SHALLOW = {  # pads to multiples of 16, where the others pad to 32
    "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
    "MODEL.TIMM.NAME": "resnet18",
    "MODEL.TIMM.OUT_INDICES": [1, 2, 3],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128]],
}
ODD = [((61, 75),), ((48, 80), (33, 97)), ((101, 31), (90, 64), (7, 99))]


def build(folder, student, teacher, **overrides):
    names = ["ReviewDistiller", "StructuralDistiller"]
    cfg = distillation_cfg(student, write_teacher(folder, teacher), **{"DISTILL.DISTILLERS": names, **overrides})
    return build_model(cfg).train()


def pad_to_square(detector, side):
    """Makes a detector pad to a square, as ViTDet does on Detectron2's main branch."""

    def preprocess_image(batched_inputs):
        images = [(x["image"].to(detector.device) - detector.pixel_mean) / detector.pixel_std for x in batched_inputs]
        padded = images[0].new_zeros(len(images), 3, side, side)
        for image, whole in zip(images, padded):
            whole[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(padded, [tuple(x.shape[-2:]) for x in images])

    detector.preprocess_image = preprocess_image


def seen_views(model, batch):
    """The views that a distiller gets in a step of training, and what the student's backbone returned in it."""
    seen, returned = [], []
    handle = model.student.backbone.register_forward_hook(lambda module, args, output: returned.append(output))

    class Looking(Distiller):
        def forward(self, student, teacher):
            seen.extend((student, teacher))
            return {"loss_looking": sum(level.mean() for level in student.features.values())}

    model.distillers["Looking"] = Looking()
    model._loss_weights = LossWeights(model.distillers)
    losses = model(batch)
    handle.remove()
    assert all(loss.isfinite() for loss in losses.values())
    seen[0].returned = list(returned[0].values())
    return seen


def check(model, views, batch):
    """Both views have one shape at each level, of the cells of the images at least, and show what is there."""
    student, teacher = views
    with torch.no_grad():
        whole = model.teacher.model.backbone(model.teacher.model.preprocess_image(batch).tensor)
    shared = [name for name in student.features if name in teacher.features]
    assert len(shared) >= 3
    for name in shared:
        own, given = student.features[name], teacher.features[name]
        height, width = own.shape[2:]
        assert given.shape[2:] == (height, width)
        stride = teacher.strides[name]
        assert height >= max(x["image"].shape[1] for x in batch) / stride
        assert width >= max(x["image"].shape[2] for x in batch) / stride
        assert torch.equal(given, whole[name][..., :height, :width])
        own_map = next(x for key, x in zip(student._levels.values(), student.returned) if key == name)
        assert torch.equal(own, own_map[..., :height, :width])


@pytest.mark.parametrize("sizes", ODD)
def test_a_student_that_pads_less(tmp_path, sizes):
    model = build(tmp_path, detector_cfg("faster_rcnn", **SHALLOW), detector_cfg("faster_rcnn"))
    assert (model.student.backbone.size_divisibility, model.teacher.model.backbone.size_divisibility) == (16, 32)
    batch = random_batch(*sizes)
    views = seen_views(model, batch)
    check(model, views, batch)
    plain = model.student.preprocess_image(batch).tensor.shape
    assert views[0].images.shape == plain and plain[2] % 16 == 0  # it is trained as it is used


@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_teacher_that_pads_to_a_square(tmp_path, kind, sizes):
    model = build(tmp_path, detector_cfg(kind), detector_cfg("faster_rcnn"))
    pad_to_square(model.teacher.model, 128)
    batch = random_batch(*sizes)
    views = seen_views(model, batch)
    assert views[1].images.shape[2:] == (128, 128)
    check(model, views, batch)


def test_a_student_that_pads_to_a_square(tmp_path):
    model = build(tmp_path, detector_cfg("mask_rcnn"), detector_cfg("faster_rcnn"))
    pad_to_square(model.student, 128)
    batch = random_batch((61, 75), (40, 44))
    views = seen_views(model, batch)
    assert views[0].features["p2"].shape[2:] == (16, 24)
    check(model, views, batch)


@pytest.mark.parametrize("square", [False, True])
def test_a_student_at_half_the_size(tmp_path, square):
    sizes = {"INPUT.MIN_SIZE_TEST": 400, "INPUT.MAX_SIZE_TEST": 600, "DISTILL.STUDENT.INPUT_SCALE": 0.5}
    model = build(tmp_path, detector_cfg("faster_rcnn"), detector_cfg("faster_rcnn"), **sizes)
    if square:
        pad_to_square(model.teacher.model, 256)
    batch = random_batch((161, 131), (90, 203))
    check(model, seen_views(model, batch), batch)


def test_views_that_are_not_aligned_show_all_of_their_cells(tmp_path):
    model = build(tmp_path, detector_cfg("faster_rcnn"), detector_cfg("faster_rcnn"))
    pad_to_square(model.teacher.model, 128)
    student, teacher = model.frozen_views(random_batch((61, 75)))
    assert teacher.features["p2"].shape[2:] == (32, 32) and student.features["p2"].shape[2:] == (16, 24)
    align(student, teacher)
    assert teacher.features["p2"].shape[2:] == (16, 24)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_anchors_are_those_of_the_cells_that_both_have(tmp_path, kind):
    """Logits and matches agree with those of a step where both pad alike, which has the rows of these cells."""
    model = build(tmp_path, detector_cfg(kind), detector_cfg(kind))
    batch = random_batch((61, 75), (50, 90))
    plain = seen_views(model, batch)
    logits, matches = plain[1].anchor_logits, plain[0].match_anchors()
    pad_to_square(model.teacher.model, 256)
    squared = seen_views(model, batch)
    assert squared[1].anchor_logits.shape == squared[0].anchor_logits.shape == logits.shape
    for own, given in zip(squared[0].match_anchors(), matches):
        assert all(torch.equal(x, y) for x, y in zip(own, given))


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_anchors_that_only_the_student_has_are_left_out(tmp_path, kind):
    model = build(tmp_path, detector_cfg(kind), detector_cfg(kind))
    batch = random_batch((61, 75), (50, 90))  # padded to 64x96 by the teacher
    detector, names = model.student, model.student.head_in_features
    small = [seen_views(model, batch)[0].features[name] for name in names]
    pad_to_square(detector, 256)
    student, teacher = seen_views(model, batch)
    assert student.anchor_logits.shape == teacher.anchor_logits.shape
    shown = torch.cat([x.tensor for x in detector.anchor_generator(small)])
    levels = detector.anchor_generator(
        [torch.zeros(1, 1, -(-256 // s), -(-256 // s)) for s in student.strides.values()]
    )
    strides = torch.cat([torch.full((len(x),), s) for x, s in zip(levels, student.strides.values())])
    everything = torch.cat([x.tensor for x in levels])
    cells = ((everything[:, :2] + everything[:, 2:]) / 2 / strides[:, None]).floor()
    inside = (cells < (torch.tensor([96, 64]) / strides[:, None]).ceil()).all(1)
    labels, _ = detector.label_anchors(levels, [x["instances"] for x in batch])
    for (rows, truth), found in zip(student.match_anchors(), labels):
        expected = everything[inside & (found >= 0) & (found < detector.num_classes)]
        assert torch.equal(shown[rows], expected) and len(truth) == len(rows)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_every_distiller_works_on_sides_that_pad_differently(tmp_path, kind):
    shallow = detector_cfg(kind, **(SHALLOW if kind == "faster_rcnn" else {}))
    model = build(tmp_path, shallow, detector_cfg(kind), **{"DISTILL.DISTILLERS": built_in(kind)})
    pad_to_square(model.teacher.model, 160)
    losses = model(random_batch((61, 75), (50, 90)))
    sum(losses.values()).backward()
    idle = [name for name, p in model.distillers.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle and all(loss.isfinite() for loss in losses.values())


def test_a_head_that_a_distiller_ran_leaves_no_record(tmp_path):
    again = {"DISTILL.DISTILLERS": ["LogitDistiller"], "DISTILL.LOGIT.INSTANCES": "ground_truth"}
    model = build(tmp_path, detector_cfg("faster_rcnn"), detector_cfg("faster_rcnn"), **again)
    model(random_batch((61, 75)))
    assert model._taps and not any(tap.has_record for tap in (model._tap, *model._taps.values()))


def test_nothing_of_a_step_lives_longer_than_the_step(tmp_path):
    model = build(tmp_path, detector_cfg("retinanet"), detector_cfg("retinanet"))
    alive = []
    for backbone in (model.student.backbone, model.teacher.model.backbone):
        backbone.register_forward_hook(
            lambda module, args, output: alive.extend(weakref.ref(x) for x in output.values())
        )
    gc.collect()
    gc.disable()
    try:
        losses = model(random_batch((61, 75), (90, 64)))
        sum(losses.values()).backward()
        del losses
        model.zero_grad()
        assert len(alive) == 10 and not any(reference() is not None for reference in alive)
    finally:
        gc.enable()

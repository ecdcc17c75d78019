"""A student that sees the images at half size: what it is given, how its views are aligned, how it leaves."""

import copy
import json

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from distill.config import load_config, plain_config
from distill.distillers import AlignedDistiller, Distiller
from distill.engine import Trainer
from distill.errors import DistillError
from distill.losses import aligned_loss
from distill.modeling import DetectorView
from distill.modeling.loss_weights import LossWeights
from distill.modeling.scaling import Scaling
from distill.modeling.views import align
from tests.helpers import (
    DETECTORS,
    aligned_cfg,
    averaging,
    detector_cfg,
    distillation_cfg,
    random_batch,
    run_script,
    set_all,
    write_coco,
    write_teacher,
)

SIZES = [(64, 96), (61, 75)]
SMALL_TEST = {"INPUT.MIN_SIZE_TEST": 400, "INPUT.MAX_SIZE_TEST": 667}


def inherited(kind):
    return ["backbone", "head"] if kind in ("retinanet", "fcos") else ["backbone", "proposal_generator", "roi_heads"]


def pair_cfg(tmp_path, kind, teacher=None, **overrides):
    """The config of a half-size student with an AlignedTeacher, or with another teacher."""
    given = write_teacher(tmp_path, teacher or aligned_cfg(kind))
    values = {"DISTILL.STUDENT.INPUT_SCALE": 0.5, "DISTILL.DISTILLERS": ["AlignedDistiller"], **SMALL_TEST}
    return distillation_cfg(aligned_cfg(kind, "half"), given, **{**values, **overrides})


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("sizes", [SIZES, [(129, 65)], [(31, 33), (20, 97)]])
def test_aligned_maps_have_equal_sizes_for_any_image(tmp_path, kind, sizes):
    model = build_model(pair_cfg(tmp_path, kind, **{"DISTILL.ALIGNED.WARMUP_ITERS": 0})).train()
    seen = {}

    class Looking(Distiller):
        def forward(self, student, teacher):
            seen.update(student=student, teacher=teacher)
            return {"loss_looking": sum(level.mean() for level in student.features.values())}

    model.distillers["Looking"] = Looking()
    model._loss_weights = LossWeights(model.distillers)
    alone = copy.deepcopy(model.student)
    alone.backbone._forward_hooks.clear()
    batch = random_batch(*sizes)
    torch.manual_seed(0)
    losses = model(batch)
    student, teacher = seen["student"], seen["teacher"]
    assert list(student.features) == list(teacher.features) == ["p3", "p4", "p5", "p6", "p7"]
    for level in student.features:
        assert student.features[level].shape == teacher.features[level].shape
        assert student.strides[level] == teacher.strides[level] == 2 ** int(level[1])
    assert [2 * side for side in student.images.shape[2:]] == list(teacher.images.shape[2:])
    assert student.image_sizes == sizes and student.ground_truth[0].image_size == sizes[0]

    # the student's own losses are those of the plain detector on the half-size batch, padded to the same size
    torch.manual_seed(0)
    for name, loss in alone(Scaling(0.5).batch(batch)).items():
        assert torch.equal(loss, losses[name])
    # and the distiller's is the formula, on the same levels
    own = [student.features[level] for level in student.features]
    expected = aligned_loss(own, [teacher.features[level] for level in student.features])
    torch.testing.assert_close(losses["loss_aligned"], expected * 0.6)
    distiller = model.distillers["AlignedDistiller"]
    torch.testing.assert_close(distiller(student, teacher)["loss_aligned"], expected)
    assert expected > 0


def test_the_weight_is_the_published_one_and_grows_over_500_iterations(tmp_path):
    distiller = build_model(pair_cfg(tmp_path, "retinanet")).distillers["AlignedDistiller"]
    assert isinstance(distiller, AlignedDistiller)
    for iteration, expected in ((0, 0.0), (125, 0.15), (500, 3**2 * 0.2 / 3), (9000, 0.6)):
        assert distiller.weight_at(iteration, 10000) == pytest.approx(expected)
    assert distiller.levels == ["p3", "p4", "p5", "p6", "p7"]
    assert not list(distiller.parameters())


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none(tmp_path, kind):
    cfg = pair_cfg(tmp_path, kind, aligned_cfg(kind, channels=32), **{"DISTILL.ALIGNED.WARMUP_ITERS": 0})
    model = build_model(cfg).train()
    losses = model(random_batch(*SIZES))
    assert losses["loss_aligned"] > 0
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())
    # Detectron2's RetinaNet FPN has a P7, which P2 to P6 leave over: on several GPUs it must not wait for a gradient
    frozen = {name for name, p in model.student.named_parameters() if not p.requires_grad}
    left_over = {"backbone.top_block.p7.weight", "backbone.top_block.p7.bias"}
    assert frozen == (left_over if kind in ("retinanet", "fcos") else set())
    plain = Trainer.build_model(aligned_cfg(kind, "half")).train()
    sum(plain(random_batch((64, 64))).values()).backward()
    assert not [name for name, p in plain.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_student_starts_from_all_of_the_teachers_weights(tmp_path, kind):
    model = build_model(pair_cfg(tmp_path, kind, **{"DISTILL.STUDENT.INHERIT": inherited(kind)})).train()
    model.start()
    given = model.teacher.model.state_dict()
    own = model.student.state_dict()
    assert given.keys() - own.keys() == {"fusion.squeeze.weight", "fusion.weigh.weight"}
    assert all(torch.equal(value, given[name]) for name, value in own.items())


def test_a_shallower_student_pads_to_half_of_what_the_teacher_pads_to(tmp_path):
    small = {
        "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
        "MODEL.TIMM.NAME": "resnet18",
        "MODEL.TIMM.OUT_INDICES": [1, 2, 3],
    }
    model = build_model(pair_cfg(tmp_path, "retinanet", **small))
    assert (model.student.backbone.size_divisibility, model.teacher.model.backbone.size_divisibility) == (16, 64)
    student, teacher = model.frozen_views(random_batch((61, 75)))
    assert student.images.shape[2:] == (32, 48) and teacher.images.shape[2:] == (64, 128)
    align(student, teacher)
    assert all(student.features[x].shape == teacher.features[x].shape for x in teacher.features)
    assert teacher.features["p3"].shape[2:] == (8, 12)  # 48 pixels of the half-size image


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster_rcnn"])
def test_heads_on_levels_that_do_not_lie_on_the_teachers_are_not_inherited(tmp_path, kind):
    unshifted = ["p3", "p4", "p5", "p6", "p7"] if kind != "faster_rcnn" else ["p2", "p3", "p4", "p5", "p6"]
    teacher = None if kind != "faster_rcnn" else detector_cfg(kind)  # a plain one, on P2 to P6 of the whole image
    overrides = {
        "DISTILL.STUDENT.INHERIT": inherited(kind),
        "MODEL.RETINANET.IN_FEATURES": unshifted,
        "MODEL.FCOS.IN_FEATURES": unshifted,
        "MODEL.RPN.IN_FEATURES": unshifted,
    }
    with pytest.raises(DistillError, match="shift the IN_FEATURES of its heads to finer levels, by one"):
        build_model(pair_cfg(tmp_path, kind, teacher, **overrides))


@pytest.mark.parametrize("downsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_bright_square_lights_the_same_cells_of_student_and_teacher(tmp_path, kind, downsampling):
    model = build_model(pair_cfg(tmp_path, kind, **{"DISTILL.STUDENT.DOWNSAMPLING": downsampling})).eval()
    averaging(model.student.backbone)
    averaging(model.teacher.model.backbone.fpn)
    (record,) = random_batch((231, 203))
    image = torch.zeros(3, 231, 203)
    image[:, 32:96, 64:96] = 1.0
    record["image"] = image * model.pixel_std + model.pixel_mean
    student, teacher = model.frozen_views([record])
    align(student, teacher)
    for level, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
        assert student.features[level].shape == teacher.features[level].shape
        for view in (student, teacher):
            cells = view.features[level][0, 0]
            expected = torch.zeros_like(cells, dtype=torch.bool)
            expected[32 // stride : 96 // stride, 64 // stride : 96 // stride] = True
            assert torch.equal(cells > cells.max() / 2, expected)


def test_a_level_that_only_a_distiller_takes_is_trained(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("retinanet"))
    student = detector_cfg("retinanet", **{"MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6"]})
    student.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
    for names, trained in ((["ReviewDistiller"], True), ([], False)):
        more = {"DISTILL.DISTILLERS": names, "DISTILL.STUDENT.INHERIT": ["backbone.fpn_"]}
        model = build_model(distillation_cfg(student, teacher, **more))
        assert model.student.backbone.top_block.p7.weight.requires_grad == trained


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_heads_with_other_anchors_are_not_inherited(tmp_path, kind):
    whole = [[16], [32], [64], [128], [256]]
    overrides = {"DISTILL.STUDENT.INHERIT": inherited(kind), "MODEL.ANCHOR_GENERATOR.SIZES": whole}
    with pytest.raises(DistillError, match="anchors must be 0.5 times the teacher's"):
        build_model(pair_cfg(tmp_path, kind, **overrides))
    build_model(pair_cfg(tmp_path, kind, **{**overrides, "DISTILL.STUDENT.INHERIT": ["backbone"]}))


@pytest.mark.parametrize(
    "name", ["ReviewDistiller", "StructuralDistiller", "ImitationDistiller", "GlobalKnowledgeDistiller"]
)
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_other_distillers_a_smaller_backbone_and_a_plain_teacher(tmp_path, kind, name):
    dense = kind == "retinanet"
    teacher = detector_cfg(kind, depth=34, channels=24)  # p3 to p7 of the whole image, or p2 to p6
    model = build_model(pair_cfg(tmp_path, kind, teacher, **{"DISTILL.DISTILLERS": [name]})).train()
    assert model.distillers[name].levels == (["p3", "p4", "p5", "p6", "p7"] if dense else ["p3", "p4", "p5", "p6"])
    losses = model(random_batch(*SIZES))
    own = [loss for key, loss in losses.items() if key not in model.student(random_batch(*SIZES))]
    # of global knowledge, what is compared by prototypes waits for their search
    assert any(loss > 0 for loss in own) and all(loss.requires_grad for loss in own)
    sum(losses.values()).backward()
    if name != "GlobalKnowledgeDistiller":
        assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_what_a_view_shows_is_in_pixels_of_the_whole_image(tmp_path, kind):
    model = build_model(pair_cfg(tmp_path, kind)).train()
    batch = random_batch((128, 192), (128, 192))
    half = Scaling(0.5).batch(batch)
    view, _ = model.frozen_views(batch)
    if kind == "faster_rcnn":
        heads = model.student.roi_heads
        boxes = [x["instances"].gt_boxes for x in batch]
        with torch.no_grad():
            features = model.student.backbone(model.student.preprocess_image(half).tensor)
            pooled = heads.box_pooler(
                [features[level] for level in heads.in_features], [Boxes(x.tensor / 2) for x in boxes]
            )
            expected = heads.box_predictor(heads.box_head(pooled))
        for got, wanted in zip(view.box_head(boxes), expected):
            torch.testing.assert_close(got, wanted)
        model(batch)
        recorded = {}
        model.student.roi_heads.register_forward_hook(lambda module, args, output: recorded.update(own=output[0]))

        class Looking(Distiller):
            def forward(self, student, teacher):
                recorded["view"] = student.proposals
                return {"loss_looking": student.features["p3"].mean()}

        model.distillers["Looking"] = Looking()
        model._loss_weights = LossWeights(model.distillers)
        model(batch)
        for own, shown in zip(recorded["own"], recorded["view"]):
            assert torch.equal(own.proposal_boxes.tensor * 2, shown.proposal_boxes.tensor)
            assert torch.equal(own.gt_classes, shown.gt_classes) and shown.image_size == (128, 192)
        return
    # a dense detector's cells and annotations are those of the teacher, one level coarser
    whole = build_model(aligned_cfg(kind, "full"))
    images = torch.zeros(2, 3, 128, 192)
    other = DetectorView(whole, batch, lambda: (images, whole.backbone(images)), frozen=True)
    matched = 0
    for (cells, annotations), (expected_cells, expected) in zip(view.match_anchors(), other.match_anchors()):
        assert torch.equal(cells, expected_cells) and torch.equal(annotations, expected)
        matched += len(cells)
    assert matched > 0


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("DISTILL.STUDENT.INPUT_SCALE", 0.7, "INPUT_SCALE is 0.7: expected 1.0, 0.5"),
        ("DISTILL.STUDENT.DOWNSAMPLING", "area", "STUDENT.DOWNSAMPLING is 'area'"),
        (
            "INPUT.MIN_SIZE_TEST",
            800,
            "INPUT.MIN_SIZE_TEST is 800, but .* of 400 pixels at most.*MIN_SIZE_TEST 400",
        ),
        ("INPUT.MIN_SIZE_TEST", 0, "INPUT.MIN_SIZE_TEST is 0, but .* of 400 pixels at most"),
        ("INPUT.MAX_SIZE_TEST", 1333, "INPUT.MAX_SIZE_TEST is 1333, but .*: set INPUT.MAX_SIZE_TEST 667"),
        ("DISTILL.ALIGNED.LEVELS", ["p2"], "asks for p2, which the student does not have"),
    ],
)
def test_bad_settings_are_named(tmp_path, key, value, message):
    with pytest.raises(DistillError, match=message):
        build_model(pair_cfg(tmp_path, "retinanet", **{key: value}))


PLAIN_EVALUATION = """
import sys
sys.modules["distill"] = None  # importing it fails
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

config, annotations, images, output = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config, allow_unsafe=False)
assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8.0], [16.0], [32.0], [64.0], [128.0]]
assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (400, 667)
register_coco_instances("half", {}, annotations, images)
model = DefaultTrainer.build_model(cfg)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
evaluator = COCOEvaluator("half", output_dir=output)
found = inference_on_dataset(model, build_detection_test_loader(cfg, "half"), evaluator)["bbox"]
print("copypaste:", ",".join(f"{value:.4f}" for value in list(found.values())[:6]))
"""


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_plain_detectron2_evaluates_the_exported_student_to_the_same_ap(tmp_path, kind):
    annotations, images = write_coco(tmp_path / "data")
    cfg = pair_cfg(
        tmp_path,
        kind,
        **{
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
            "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
            "DATASETS.REGISTER": [f"half=coco:{annotations}:{images}"],
            "DATASETS.TRAIN": ["half"],
            "DATASETS.TEST": ["half"],
            "OUTPUT_DIR": str(tmp_path / "out"),
        },
    )
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    config = tmp_path / "cfg.yaml"
    config.write_text(cfg.dump())
    ours = run_script(
        "train_net.py", "--eval-only", "--config-file", str(config), "MODEL.WEIGHTS", str(tmp_path / "model.pth")
    )
    assert ours.returncode == 0, ours.stderr[-3000:]
    out = tmp_path / "exported"
    result = run_script(
        "tools/export_student.py", "--config-file", str(config), "--weights", str(tmp_path / "model.pth"),
        "--output", str(out),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (tmp_path / "plain.py").write_text(PLAIN_EVALUATION)
    plain = run_script(
        str(tmp_path / "plain.py"), str(out / "config.yaml"), annotations, images, str(tmp_path / "inference")
    )
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert [x for x in ours.stdout.splitlines() if "copypaste" in x][-1].split("copypaste: ")[1] == plain.stdout.rsplit(
        "copypaste: ", 1
    )[1].strip()
    results = [json.loads(path.read_text()) for path in (
        tmp_path / "out" / "inference" / "coco_instances_results.json",
        tmp_path / "inference" / "coco_instances_results.json",
    )]  # fmt: skip
    assert results[0] == results[1] and len(results[0]) > 0


def test_the_exported_config_is_for_half_size_images(tmp_path):
    cfg = pair_cfg(tmp_path, "retinanet")
    set_all(cfg, {"INPUT.MIN_SIZE_TRAIN": (640, 800), "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [600, 400]})
    plain = plain_config(cfg)
    assert plain.INPUT.MIN_SIZE_TRAIN == (320, 400) and plain.INPUT.MAX_SIZE_TRAIN == 667
    assert plain.INPUT.CROP.SIZE == [300, 200]
    assert plain.MODEL.RETINANET.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert not {"SCALES"} & plain.TEST.keys() and "ALIGNED_TEACHER" not in plain.MODEL
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "cfg.yaml")).DISTILL.STUDENT.INPUT_SCALE == 0.5


def test_dense_boxes_and_anchors_are_in_pixels_of_the_whole_image(tmp_path):
    settings = {"DISTILL.DISTILLERS": ["LogitDistiller"], "DISTILL.LOGIT.KIND": "BCKD"}
    model = build_model(pair_cfg(tmp_path, "retinanet", **settings)).train()
    for distiller in model.distillers.values():
        distiller.build_hooks(model)  # refuses anchors that differ
    student, teacher = model.frozen_views(random_batch((128, 192)))
    boxes = [view.decode([torch.zeros_like(x) for x in view.box_deltas]) for view in (student, teacher)]
    torch.testing.assert_close(*boxes)
    assert not student.features["p3"].requires_grad

"""The frame: student, teacher and distillers in one step, for every detector."""

import contextlib
import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes
from torch import nn

from distill.config import student_config
from distill.distillers import Distiller
from distill.errors import DistillError
from distill.modeling import DetectorView, DistillationModel, Teacher
from tests.helpers import DETECTORS, detector_cfg, distillation_cfg, random_batch, write_teacher

SIZES = [(64, 96), (61, 75)]  # the second is no multiple of anything


def build_pair(tmp_path, student="faster_rcnn", teacher=None, **overrides):
    """A distillation model whose teacher has twice the channels."""
    teacher_overrides = write_teacher(tmp_path, detector_cfg(teacher or student, channels=32))
    return build_model(distillation_cfg(detector_cfg(student), teacher_overrides, **overrides))


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none(tmp_path, kind):
    model = build_pair(tmp_path, kind).train()
    losses = model(random_batch(*SIZES))
    assert losses["loss_review"].requires_grad and losses["loss_review"].item() > 0
    sum(losses.values()).backward()
    # Detectron2's own pattern: a box branch that nothing was assigned to has a gradient of zeros, never none
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())
    assert not model.teacher.model.training and model.student.training


@pytest.mark.parametrize("kind", DETECTORS)
def test_detection_losses_are_those_of_the_student_alone(tmp_path, kind):
    model = build_pair(tmp_path, kind).train()
    alone = copy.deepcopy(model.student)
    alone.backbone._forward_hooks.clear()
    batch = random_batch(*SIZES)
    torch.manual_seed(0)
    expected = alone(batch)
    torch.manual_seed(0)
    losses = model(batch)
    assert losses.keys() - expected.keys() == {"loss_review"}
    assert all(torch.equal(losses[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", DETECTORS)
def test_evaluation_is_the_students(tmp_path, kind):
    model = build_pair(tmp_path, kind, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}).eval()
    batch = random_batch(*SIZES)
    with torch.no_grad():
        got, expected = model(batch), model.student(batch)
    for mine, theirs in zip(got, expected):
        assert torch.equal(mine["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
    assert model._tap._record is None  # evaluation holds no features


@pytest.mark.parametrize("kind", DETECTORS)
def test_teacher_features_are_bit_for_bit_those_of_plain_detectron2(tmp_path, kind):
    cfg = detector_cfg(kind, **{"MODEL.PIXEL_MEAN": [10.0, 20.0, 30.0], "MODEL.PIXEL_STD": [2.0, 3.0, 4.0]})
    plain = build_model(cfg).eval()
    captured = {}
    plain.backbone.register_forward_hook(lambda module, args, output: captured.update(output))
    batch = random_batch(*SIZES)
    with torch.no_grad():
        plain(batch)
    features = Teacher(copy.deepcopy(plain)).view(batch).features
    assert features.keys() == captured.keys()
    assert all(torch.equal(features[level], captured[level]) for level in features)


def test_teacher_may_differ_in_channel_order_normalisation_depth_channels_and_family(tmp_path):
    teacher_cfg = detector_cfg(
        "faster_rcnn", depth=101, channels=24, **{"INPUT.FORMAT": "RGB", "MODEL.PIXEL_STD": [58.0, 57.0, 56.0]}
    )
    overrides = write_teacher(tmp_path, teacher_cfg)
    model = build_model(distillation_cfg(detector_cfg("retinanet"), overrides)).train()
    assert model.distillers["ReviewDistiller"].levels == ["p3", "p4", "p5", "p6"]
    batch = random_batch((64, 96))
    view = model.teacher.view(batch)
    rgb = batch[0]["image"].flip(0).float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (teacher_cfg.MODEL.PIXEL_MEAN, teacher_cfg.MODEL.PIXEL_STD))
    torch.testing.assert_close(view.images[0], (rgb - mean) / std)
    sum(model(batch).values()).backward()


def test_view_shows_sizes_strides_and_ground_truth(tmp_path):
    model = build_pair(tmp_path)
    batch = random_batch(*SIZES)
    view = model.teacher.view(batch)
    assert view.image_sizes == SIZES and view.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert all(len(a) == len(b["instances"]) for a, b in zip(view.ground_truth, batch))
    assert view.images.shape == (2, 3, 64, 96)


def test_teacher_runs_only_what_is_asked_for(tmp_path):
    model = build_pair(tmp_path)
    calls = []
    for name in ("backbone", "proposal_generator", "roi_heads"):
        getattr(model.teacher.model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    view = model.teacher.view(random_batch(*SIZES))
    assert not calls
    view.features, view.features  # noqa: B018
    assert calls == ["backbone"]


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_rcnn"])
def test_box_head_on_given_boxes_is_the_detectors_own(kind):
    detector = build_model(detector_cfg(kind)).eval()
    batch = random_batch(*SIZES)
    captured = []
    heads = detector.roi_heads
    first = heads.box_predictor[0] if kind == "cascade_rcnn" else heads.box_predictor
    first.register_forward_hook(lambda module, args, output: captured.append(output))
    proposals = []
    detector.proposal_generator.register_forward_hook(lambda module, args, output: proposals.extend(output[0]))
    with torch.no_grad():
        detector(batch)
    logits, deltas = Teacher(detector).view(batch).box_head([p.proposal_boxes for p in proposals])
    torch.testing.assert_close(logits, captured[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deltas, captured[0][1], rtol=1e-4, atol=1e-4)
    assert not logits.requires_grad


def test_box_head_of_a_dense_detector_is_an_error():
    view = Teacher(build_model(detector_cfg("retinanet"))).view(random_batch((64, 96)))
    with pytest.raises(DistillError, match="RetinaNet has no box head"):
        view.box_head([Boxes(torch.zeros(1, 4))])


def test_state_dict_is_the_students_and_the_distillers(tmp_path):
    model = build_pair(tmp_path)
    own = {key for key in model.state_dict() if not key.startswith("distillers.")}
    assert own == set(model.student.state_dict())
    assert {key for key in model.state_dict() if key.startswith("distillers.ReviewDistiller.")}
    teacher_ids = {id(p) for p in model.teacher.model.parameters()}
    assert not teacher_ids & {id(p) for p in model.parameters()}
    optimizer = build_optimizer(distillation_cfg(detector_cfg("faster_rcnn"), {}), model)
    assert not teacher_ids & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_state_dict_round_trip_keeps_values_and_the_callers_dict(tmp_path):
    model = build_pair(tmp_path)
    state = model.state_dict()
    keys = list(state)
    other = build_pair(tmp_path / "b")
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(state) == keys
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    # into the plain student, with the versions of its modules
    plain = build_model(detector_cfg("faster_rcnn"))
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("distillers.")})
    norm = next(name for name, m in plain.named_modules() if isinstance(m, FrozenBatchNorm2d))
    assert model.state_dict()._metadata[norm]["version"] == FrozenBatchNorm2d._version
    # nested in another module
    outer = nn.ModuleDict({"inner": model})
    assert {key.removeprefix("inner.") for key in outer.state_dict()} == set(keys)
    assert not outer.load_state_dict(outer.state_dict()).missing_keys


def test_missing_and_unexpected_keys_are_reported_without_prefix(tmp_path):
    model = build_pair(tmp_path)
    state = model.state_dict()
    state.pop("backbone.fpn_lateral2.weight")
    state["other"] = torch.zeros(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["backbone.fpn_lateral2.weight"] and result.unexpected_keys == ["other"]


def test_checkpoint_with_other_classes_loads_with_the_mismatch_named(tmp_path, caplog):
    weights = tmp_path / "other.pth"
    other = build_model(detector_cfg("faster_rcnn", **{"MODEL.ROI_HEADS.NUM_CLASSES": 7}))
    torch.save({"model": other.state_dict()}, weights)
    model = build_pair(tmp_path)
    DetectionCheckpointer(model).load(str(weights))
    assert torch.equal(model.student.backbone.fpn_lateral2.weight, other.backbone.fpn_lateral2.weight)
    skipped = [r.getMessage() for r in caplog.records if "Skip loading parameter" in r.getMessage()]
    assert any("'roi_heads.box_predictor.cls_score.weight'" in message for message in skipped)


def test_teacher_follows_the_model_to_another_dtype(tmp_path):
    model = build_pair(tmp_path).double()
    assert next(model.teacher.model.parameters()).dtype == torch.float64


def test_inheriting_copies_what_is_named_and_nothing_else(tmp_path):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn", depth=101))
    parts = ["backbone.fpn_", "proposal_generator", "roi_heads"]
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), overrides, **{"DISTILL.STUDENT.INHERIT": parts}))
    before = copy.deepcopy(model.student.state_dict())
    model.start()
    given = model.teacher.model.state_dict()
    for key, value in model.student.state_dict().items():
        source = given if key.startswith(tuple(parts)) else before
        assert torch.equal(value, source[key]), key


@pytest.mark.parametrize("norms", [("BN", "FrozenBN"), ("FrozenBN", "BN")])
def test_batch_norms_that_train_inherit_from_those_that_do_not(tmp_path, norms):
    own, given = (detector_cfg("retinanet", **{"MODEL.RESNETS.NORM": norm}) for norm in norms)
    parts = {"DISTILL.STUDENT.INHERIT": ["backbone.bottom_up"]}
    model = build_model(distillation_cfg(own, write_teacher(tmp_path, given), **parts))
    model.start()
    teacher = model.teacher.model.backbone.bottom_up.state_dict()
    for key, value in model.student.backbone.bottom_up.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, teacher[key])


def test_a_loop_without_a_start_is_warned_once(tmp_path, caplog):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    parts = {"DISTILL.STUDENT.INHERIT": ["roi_heads"]}
    for resumed in (None, True, False):
        model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), overrides, **parts)).train()
        if resumed is not None:
            model.start(resumed=resumed)
        is_inherited = torch.equal(
            model.student.roi_heads.box_head.fc1.weight, model.teacher.model.roi_heads.box_head.fc1.weight
        )
        assert is_inherited == (resumed is False)
        model(random_batch((64, 96)))
        model(random_batch((64, 96)))
        assert caplog.text.count("begins without start()") == (resumed is None)
        caplog.clear()


def test_heads_that_call_by_keyword_are_tapped(tmp_path):
    model = build_pair(tmp_path, **{"DISTILL.DISTILLERS": ["LogitDistiller"]}).train()
    heads = model.student.roi_heads
    forward, tapped = heads.forward, heads.label_and_sample_proposals
    seen = []

    def by_keyword(images, features, proposals, targets=None):
        heads.label_and_sample_proposals = lambda proposals, targets: tapped(proposals=proposals, targets=targets)
        seen.append(True)
        return forward(images, features, proposals, targets)

    heads.forward = by_keyword
    assert model(random_batch((64, 96)))["loss_logit"] > 0 and seen
    heads.label_and_sample_proposals = tapped
    tapped.__self__._method = lambda proposals, targets: (proposals, targets)  # of another form
    assert tapped([], []) == ([], []) and tapped.__self__.take()[1] is None


def test_inheriting_what_does_not_fit_lists_it(tmp_path):
    with pytest.raises(DistillError, match=r"backbone.fpn_lateral2.weight is \(16, .*\(32, "):
        build_pair(tmp_path, **{"DISTILL.STUDENT.INHERIT": ["backbone.fpn_"]})
    with pytest.raises(DistillError, match=r"'fpn', but no weight .*backbone.fpn_lateral2"):
        build_pair(tmp_path, **{"DISTILL.STUDENT.INHERIT": ["fpn"]})


@pytest.mark.parametrize("kind, part", [("retinanet", "head"), ("faster_rcnn", "proposal_generator")])
def test_heads_for_other_anchors_are_warned_of(tmp_path, kind, part, caplog):
    overrides = write_teacher(tmp_path, detector_cfg(kind))
    for factor in (1, 2):
        sizes = [[factor * x for x in level] for level in detector_cfg(kind).MODEL.ANCHOR_GENERATOR.SIZES]
        cfg = detector_cfg(kind, **{"MODEL.ANCHOR_GENERATOR.SIZES": sizes})
        build_model(distillation_cfg(cfg, overrides, **{"DISTILL.STUDENT.INHERIT": ["backbone.fpn_"]})).start()
        assert "trained for anchors of other sizes" not in caplog.text
        build_model(distillation_cfg(cfg, overrides, **{"DISTILL.STUDENT.INHERIT": [part]})).start()
        assert ("trained for anchors of other sizes" in caplog.text) == (factor == 2)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"INPUT.FORMAT": "RGB"}, "one side's are RGB and the other's BGR"),
        ({"MODEL.PIXEL_STD": [57.0, 57.0, 58.0]}, r"pixel_std is \[57.0, 57.0, 58.0\] in the student and \[580.0, "),
    ],
)
def test_a_first_convolution_is_inherited_for_the_same_images_only(tmp_path, values, message):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    for parts in (["backbone.fpn_", "roi_heads"], ["backbone"]):
        cfg = distillation_cfg(detector_cfg("faster_rcnn", **values), overrides, **{"DISTILL.STUDENT.INHERIT": parts})
        with contextlib.nullcontext() if len(parts) > 1 else pytest.raises(DistillError, match=message):
            build_model(cfg)


@pytest.mark.parametrize(
    "distillers, values, frozen",
    [
        (["ReviewDistiller"], {"DISTILL.REVIEW.LEVELS": ["p3", "p4", "p5"]}, ["lateral2", "output2"]),
        (["ReviewDistiller"], {}, []),
        (["LogitDistiller"], {}, ["lateral2", "output2"]),
        (["LogitDistiller", "ImitationDistiller"], {"DISTILL.IMITATION.LEVELS": ["p2"]}, []),
    ],
)
def test_a_level_that_nobody_takes_is_frozen(tmp_path, distillers, values, frozen):
    """Its weights would get no gradient, which is an error on several GPUs."""
    levels = {
        "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
    }
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn", **levels))
    values = {"DISTILL.DISTILLERS": distillers, **values}
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn", **levels), overrides, **values)).train()
    sum(model(random_batch((96, 96))).values()).backward()
    for name, weight in model.student.backbone.named_parameters():
        is_frozen = any(part in name for part in frozen)
        if name.startswith("fpn_"):
            assert weight.requires_grad != is_frozen and (weight.grad is None) == is_frozen, name


def test_distillation_losses_are_float32_under_bfloat16_autocast(tmp_path):
    model = build_pair(tmp_path).train()
    batch = random_batch(*SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
        assert model.teacher.view(batch).features["p2"].dtype == torch.bfloat16
    assert losses["loss_review"].dtype == torch.float32
    sum(losses.values()).backward()


@pytest.mark.parametrize("kind", DETECTORS)
def test_images_and_batches_without_annotations(tmp_path, kind):
    model = build_pair(tmp_path, kind).train()
    empty = random_batch((64, 64), (64, 96))
    for x in empty:
        x["instances"] = x["instances"][[]]
    for batch in (random_batch((64, 96)) + empty[:1], empty):
        model.zero_grad()
        losses = model(batch)
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_seed_gives_the_student_and_what_follows_the_same_numbers_as_plain_training(tmp_path):
    cfg = distillation_cfg(detector_cfg("faster_rcnn"), write_teacher(tmp_path, detector_cfg("faster_rcnn")))
    torch.manual_seed(3)
    plain, after_plain = build_model(student_config(cfg)), torch.rand(1)
    torch.manual_seed(3)
    model, after = build_model(cfg), torch.rand(1)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.student.state_dict().items())
    assert torch.equal(after, after_plain)


class Stub(Distiller):
    """Returns what it is given."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, student: DetectorView, teacher: DetectorView):
        return self.result


@pytest.mark.parametrize(
    "result, message",
    [
        (torch.zeros(()), "returned a Tensor: expected a dict"),
        ({"loss_cls": torch.zeros(())}, "'loss_cls', which the detector or another distiller has"),
        ({"loss_x": torch.zeros(2)}, r"'loss_x' has shape \(2,\)"),
        ({"loss_x": 1.0}, "'loss_x' has type float"),
        ({"loss_x": torch.zeros((), dtype=torch.float16)}, "'loss_x' is torch.float16"),
    ],
)
def test_what_a_distiller_returns_is_checked(tmp_path, result, message):
    model = build_pair(tmp_path).train()
    model.distillers = nn.ModuleDict({"Stub": Stub(result)})
    with pytest.raises(DistillError, match=message):
        model(random_batch((64, 96)))


def test_loss_weight_multiplies(tmp_path):
    batch = random_batch((64, 96))
    torch.manual_seed(0)
    model = build_pair(tmp_path).train()
    once = model(batch)["loss_review"]
    model.distillers["ReviewDistiller"].loss_weight = 2.5
    torch.testing.assert_close(model(batch)["loss_review"], 2.5 * once)


def test_a_model_that_is_no_detector_is_refused():
    with pytest.raises(DistillError, match="Linear, has no backbone and no preprocess_image"):
        DistillationModel(student=nn.Linear(1, 1), teacher=None, distillers=nn.ModuleDict())

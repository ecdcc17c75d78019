"""The multi-scale teacher against plain detectors with the same weights, and the fusion between them."""

import copy

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.transforms import ResizeTransform
from detectron2.modeling import FPN, build_backbone, build_model
from detectron2.structures import Instances

from distill.config import num_classes, plain_config
from distill.errors import DistillError
from distill.modeling import AlignedBackbone, AlignedTeacher, CrossFeatureFusion, Teacher
from distill.modeling.checkpoint import load_detector
from distill.modeling.scaling import Scaling, downsample
from tests.helpers import DETECTORS, NUM_CLASSES, aligned_cfg, averaging, detector_cfg, random_batch

SIZES = [(64, 96), (61, 75)]
THRESHOLDS = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
}


def build(kind, **overrides):
    """A multi-scale teacher whose fusion and deeper levels are not what they are initialised to."""
    model = build_model(aligned_cfg(kind, **overrides))
    assert isinstance(model, AlignedTeacher)
    torch.nn.init.normal_(model.detector.backbone.fusion.weigh.weight)
    return model


def plain(model, kind, at, **overrides):
    """The plain Detectron2 detector with the teacher's weights."""
    detector = build_model(aligned_cfg(kind, at, **overrides))
    incompatible = detector.load_state_dict(model.state_dict(), strict=False)
    assert not incompatible.missing_keys and all(key.startswith("fusion.") for key in incompatible.unexpected_keys)
    return detector


def give(detector, features):
    """Makes a detector's backbone return given features."""
    detector.backbone.forward = lambda images: features
    return detector


def resized(record):
    """A record at half size, by Detectron2's own resize."""
    pixels = np.ascontiguousarray(record["image"].permute(1, 2, 0).numpy())
    height, width = pixels.shape[:2]
    small = ResizeTransform(height, width, (height + 1) // 2, (width + 1) // 2).apply_image(pixels)
    return {**record, "image": torch.as_tensor(np.ascontiguousarray(small.transpose(2, 0, 1)))}


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("sizes", [[(64, 96), (61, 75)], [(129, 65)], [(31, 33)]])
def test_aligned_maps_have_equal_sizes_and_the_strides_they_say(kind, sizes):
    backbone = build(kind).detector.backbone
    images = build(kind).preprocess_image(random_batch(*sizes)).tensor
    assert all(side % 64 == 0 for side in images.shape[2:])
    high, low = backbone.high(images), backbone.low(images[..., ::2, ::2])
    assert list(high) == list(low) == list(backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    for name, shape in backbone.output_shape().items():
        expected = [-(-side // shape.stride) for side in images.shape[2:]]
        assert list(high[name].shape[2:]) == list(low[name].shape[2:]) == expected
        assert shape.stride == 2 ** int(name[1])


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_the_whole_image_is_seen_as_by_the_plain_fpn_but_for_its_finest_level(kind):
    model = build(kind).eval()
    fpn = model.detector.backbone.fpn
    images = torch.randn(1, 3, 128, 192)
    computed = []
    fpn.fpn_output2.register_forward_hook(lambda *args: computed.append(args))
    with torch.no_grad():
        high = model.detector.backbone.high(images)
        assert not computed
        expected = fpn(images)
    assert type(fpn) is FPN and next(iter(fpn.output_shape())) == "p2"
    assert all(torch.equal(high[name], expected[name]) for name in high if name in expected)
    if kind == "faster_rcnn":
        assert torch.equal(high["p7"], expected["p6"][:, :, ::2, ::2])


@pytest.mark.parametrize("size", [(256, 256), (231, 203)])
@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_a_bright_square_lights_the_same_cells_at_both_scales(kind, size):
    model = build(kind)
    backbone = averaging(model.detector.backbone.fpn) and model.detector.backbone
    for top, left, side in ((32, 96, 64), (128, 64, 32)):
        image = torch.zeros(3, *size)
        image[:, top : top + side, left : left + side] = 1.0
        images = model.preprocess_image([{"image": image * model.pixel_std + model.pixel_mean}]).tensor
        for pyramid in (backbone.high(images), backbone.low(downsample(images, 2, "nearest"))):
            for name, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
                cells = pyramid[name][0, 0]
                expected = torch.zeros_like(cells, dtype=torch.bool)
                expected[top // stride : (top + side) // stride, left // stride : (left + side) // stride] = True
                assert torch.equal(cells > cells.max() / 2, expected)


@pytest.mark.parametrize("downsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_the_three_losses_are_those_of_three_plain_detectors(kind, downsampling):
    model = build(kind, **{"MODEL.ALIGNED_TEACHER.DOWNSAMPLING": downsampling}).train()
    # with sizes that need no padding, downsampling before it and after it are the same
    batch = random_batch((128, 192), (128, 192))
    for record in batch:
        record["image"] = record["image"].float()
    half = Scaling(0.5, downsampling).batch(batch)
    detectors = [plain_high(model, kind), plain(model, kind, "half").train()]
    backbone = model.detector.backbone
    images = model.preprocess_image(batch).tensor
    small = detectors[1].preprocess_image(half).tensor
    high, low = backbone.high(images), backbone.low(small)
    fused = {}
    for name in high:
        pooled = torch.cat([high[name].mean((2, 3)), low[name].mean((2, 3))], 1)
        logits = (pooled @ backbone.fusion.squeeze.weight.T).relu() @ backbone.fusion.weigh.weight.T
        weights = logits.exp() / logits.exp().sum(1, keepdim=True)
        literal = weights[:, 0, None, None, None] * high[name] + weights[:, 1, None, None, None] * low[name]
        fused[name] = backbone.fusion(high[name], low[name])  # to the bit: proposals are ranked by their scores
        torch.testing.assert_close(fused[name], literal)
    detectors.append(give(plain_high(model, kind), fused))

    for step in range(2):  # the second depends on the running normalisers of the first
        torch.manual_seed(step)
        losses = model(batch)
        torch.manual_seed(step)
        expected = {}
        for scale, factor, detector, inputs in zip(
            ("high", "low", "fused"), (1, 1, 0.4), detectors, (batch, half, batch)
        ):
            expected.update({f"{name}_{scale}": factor * loss for name, loss in detector(inputs).items()})
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            # masks are cut out of the annotations' pixels, which half-size annotations have fewer of
            tolerance = 0.05 if name == "loss_mask_low" else 1e-4
            torch.testing.assert_close(loss, expected[name], rtol=tolerance, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_the_three_losses_of_odd_sizes_are_those_of_plain_detectors_on_the_padded_images(kind):
    model = build(kind).train()
    batch = random_batch(*SIZES)
    detectors = {"high": plain(model, kind, "full").train(), "low": plain(model, kind, "half").train()}
    images = torch.zeros(2, 3, 64, 128)  # multiples of 64
    for image, record in zip(images, batch):
        _, height, width = record["image"].shape
        image[:, :height, :width] = (record["image"] - model.pixel_mean) / model.pixel_std
    pyramids = {}
    for (scale, detector), padded in zip(detectors.items(), (images, images[..., ::2, ::2])):
        own = detector.backbone
        pyramids[scale] = {name: own(padded)[name] for name in detector.head_in_features}
    low = {name: level for name, level in zip(pyramids["high"], pyramids["low"].values())}
    fused = {name: model.fusion(pyramids["high"][name], low[name]) for name in low}
    expected = {}
    for scale, factor in (("high", 1), ("low", 1), ("fused", 0.4)):
        detector = plain(model, kind, "half" if scale == "low" else "full").train()
        give(detector, fused if scale == "fused" else pyramids[scale])
        inputs = Scaling(0.5).batch(batch) if scale == "low" else batch
        expected.update({f"{name}_{scale}": factor * loss for name, loss in detector(inputs).items()})
    losses = model(batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("key", ["MODEL.FPN.OUT_CHANNELS", "MODEL.ALIGNED_TEACHER.REDUCTION"])
def test_a_checkpoint_of_another_shape_is_refused_as_teacher_and_skipped_in_fine_tuning(tmp_path, key, caplog):
    torch.save({"model": build("retinanet").state_dict()}, tmp_path / "teacher.pth")
    cfg = aligned_cfg("retinanet", **{key: 24 if "FPN" in key else 4, "MODEL.WEIGHTS": str(tmp_path / "teacher.pth")})
    with pytest.raises(DistillError, match="have another shape"):
        load_detector(cfg, "teacher")
    incompatible = DetectionCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)
    assert "model" not in incompatible


def plain_high(model, kind, **overrides):
    """The plain detector on the whole image; Detectron2 has no FPN that pools twice, so R-CNN's P7 is added here."""
    if kind in ("retinanet", "fcos"):
        return plain(model, kind, "full", **overrides).train()
    detector = copy.deepcopy(model.detector).train()
    fpn = detector.backbone.fpn

    def forward(images):
        features = fpn(images)
        return {**features, "p7": torch.nn.functional.max_pool2d(features["p6"], 1, 2)}

    detector.backbone.forward = forward
    detector.backbone._size_divisibility = fpn.size_divisibility
    return detector


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("size", [(128, 192), (101, 77)])
def test_the_half_size_path_is_exactly_the_plain_detector_at_half_size(kind, size):
    model = build(kind, **THRESHOLDS, **{"TEST.SCALES": "low"}).eval()
    half = plain(model, kind, "half", **THRESHOLDS).eval()
    (record,) = random_batch(size)
    record.update(height=480, width=640)
    with torch.no_grad():
        got = model([record])[0]["instances"]
        expected = half([resized(record)])[0]["instances"]
    assert len(got) == len(expected) > 0
    assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(got.scores, expected.scores) and torch.equal(got.pred_classes, expected.pred_classes)
    if kind == "mask_rcnn":
        assert torch.equal(got.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_whole_path_is_exactly_the_plain_detector(kind):
    model = build(kind, **THRESHOLDS, **{"TEST.SCALES": "high"}).eval()
    batch = random_batch(*SIZES)
    with torch.no_grad():
        got = model(batch)
        expected = plain_high(model, kind, **THRESHOLDS).eval()(batch)
    for mine, theirs in zip(got, expected):
        assert torch.equal(mine["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
        assert mine["instances"].image_size == theirs["instances"].image_size


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_by_default_the_fused_features_are_detected_on(kind):
    model = build(kind, **THRESHOLDS).eval()
    (record,) = random_batch((101, 77))
    backbone = model.detector.backbone
    with torch.no_grad():
        got = model([record])[0]["instances"]
        images = model.preprocess_image([record]).tensor
        small = torch.zeros(1, 3, images.shape[2] // 2, images.shape[3] // 2)
        normalised = (resized(record)["image"] - model.pixel_mean) / model.pixel_std
        small[0, :, : normalised.shape[1], : normalised.shape[2]] = normalised
        fused = backbone.fused(backbone.high(images), backbone.low(small))
        expected = give(plain_high(model, kind, **THRESHOLDS).eval(), fused)([record])[0]["instances"]
    assert len(got) > 0 and got.image_size == (101, 77)
    torch.testing.assert_close(got.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_trainable_weight_gets_a_gradient(kind):
    model = build(kind, **{"MODEL.ALIGNED_TEACHER.REDUCTION": 1}).train()  # few hidden units may all be dead
    losses = model(random_batch(*SIZES))
    sum(losses.values()).backward()
    assert {name.rsplit("_", 1)[1] for name in losses} == {"high", "low", "fused"}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.abs().sum() > 0 for p in model.detector.backbone.fusion.parameters())


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_batch_without_annotations_and_detections_without_height(kind):
    model = build(kind).train()
    batch = random_batch(*SIZES)
    for record in batch:
        record["instances"] = record["instances"][:0]
    losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    for scale in ("low", "fused"):
        model.detector.backbone.scale = scale
        with torch.no_grad():
            (output,) = model.eval()([{"image": batch[1]["image"]}])
        assert isinstance(output["instances"], Instances) and output["instances"].image_size == (61, 75)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_its_checkpoint_has_the_plain_names_and_is_loaded_whole(tmp_path, kind):
    model = build(kind)
    half = build_model(aligned_cfg(kind, "half"))
    assert model.state_dict().keys() - half.state_dict().keys() == {"fusion.squeeze.weight", "fusion.weigh.weight"}
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    cfg = aligned_cfg(kind, **{"MODEL.WEIGHTS": str(tmp_path / "teacher.pth")})
    loaded = load_detector(cfg, "teacher").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    # a plain detector takes it, too, and half a file is refused
    load_detector(aligned_cfg(kind, "half", **{"MODEL.WEIGHTS": str(tmp_path / "teacher.pth")}), "model")
    torch.save({"model": half.state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(DistillError, match=r"2 are missing.*fusion.squeeze.weight is missing"):
        load_detector(cfg, "teacher")
    # as for fine-tuning, a plain checkpoint loads with all of its weights
    other = build(kind)
    DetectionCheckpointer(other).load(str(tmp_path / "teacher.pth"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in half.state_dict().items())


def test_as_a_teacher_it_shows_its_fused_levels():
    model = build("retinanet")
    torch.manual_seed(1)
    batch = random_batch(*SIZES)
    backbone = model.detector.backbone
    with torch.no_grad():
        images = model.preprocess_image(batch).tensor
        expected = backbone.fused(backbone.high(images), backbone.low(images[..., ::2, ::2]))
    view = Teacher(model).view(batch)
    assert list(view.features) == ["p3", "p4", "p5", "p6", "p7"]
    for name, level in expected.items():
        torch.testing.assert_close(view.features[name], level, rtol=1e-4, atol=1e-4)
    assert view.strides["p3"] == 8 and not view.features["p3"].requires_grad
    assert view.anchor_logits.shape[0] == 2 and view.num_classes == NUM_CLASSES == num_classes(aligned_cfg("fcos"))


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_heads_on_the_finest_level_are_told_to_shift(kind):
    with pytest.raises(DistillError, match="heads ask for 'p2'.*p3 to p7 of p2 to p7. Shift the IN_FEATURES"):
        half = aligned_cfg(kind, "half")
        half.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE = half.MODEL.META_ARCHITECTURE
        half.MODEL.META_ARCHITECTURE = "AlignedTeacher"
        build_model(half)
    with pytest.raises(KeyError, match="StandardRoiHeads"):  # Detectron2's own message of another mistake
        build_model(aligned_cfg("faster_rcnn", **{"MODEL.ROI_HEADS.NAME": "StandardRoiHeads"}))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("TEST.SCALES", "both", "TEST.SCALES is 'both': expected one of high, low, fused"),
        ("MODEL.ALIGNED_TEACHER.DOWNSAMPLING", "area", "DOWNSAMPLING is 'area': expected one of bilinear, nearest"),
        (
            "MODEL.ALIGNED_TEACHER.META_ARCHITECTURE",
            "AlignedTeacher",
            "META_ARCHITECTURE is 'AlignedTeacher'",
        ),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "its backbone is a ResNet: expected Detectron2's FPN"),
    ],
)
def test_bad_settings_are_named(key, value, message):
    cfg = aligned_cfg("retinanet")
    cfg.merge_from_list([key, value])
    with pytest.raises(DistillError, match=message):
        build_model(cfg)


def test_it_wants_an_aligned_backbone_and_is_not_exported():
    with pytest.raises(DistillError, match="got a detector on a FPN: expected an AlignedBackbone"):
        AlignedTeacher(detector=build_model(detector_cfg("retinanet")))
    with pytest.raises(DistillError, match="An AlignedTeacher is no plain Detectron2 detector"):
        plain_config(aligned_cfg("retinanet"))
    fpn = build_backbone(detector_cfg("retinanet", **{"MODEL.FPN.IN_FEATURES": ["res5"]}))
    with pytest.raises(DistillError, match="two stages or more"):
        AlignedBackbone(fpn, CrossFeatureFusion(16))


def test_the_weight_of_the_fused_losses_is_the_configs():
    assert build("retinanet", **{"MODEL.ALIGNED_TEACHER.FUSED_LOSS_WEIGHT": 0.7}).loss_weights["fused"] == 0.7

"""Slimmed ResNets."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from distill.config import plain_config
from distill.errors import DistillError
from distill.modeling.backbones import freeze_unused_levels
from tests.helpers import detector_cfg

SLIM = {"MODEL.BACKBONE.NAME": "build_slimmable_resnet_fpn_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS": 256}


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_a_slim_resnet_has_all_widths_multiplied_and_the_fpns_channels(kind, factor):
    slim = build_model(detector_cfg(kind, depth=50, **SLIM, **{"MODEL.RESNETS.WIDTH_MULT": factor})).backbone
    wide = build_model(detector_cfg(kind, depth=50, **{"MODEL.RESNETS.RES2_OUT_CHANNELS": 256})).backbone
    assert slim.output_shape() == wide.output_shape()
    theirs = wide.bottom_up.state_dict()
    for name, weight in slim.bottom_up.state_dict().items():
        expected = [int(n * factor) for n in theirs[name].shape[:2]]
        if name == "stem.conv1.weight":
            expected[1] = 3
        assert list(weight.shape[:2]) == expected, name


@pytest.mark.parametrize(
    "depth, factor, message", [(50, 0.3, "WIDTH_MULT is 0.3: expected 0.25"), (18, 0.5, "DEPTH is 18: a slimmable")]
)
def test_widths_that_cannot_be_had_are_named(depth, factor, message):
    cfg = detector_cfg("faster_rcnn", depth=depth, **SLIM, **{"MODEL.RESNETS.WIDTH_MULT": factor})
    with pytest.raises(DistillError, match=message):
        build_model(cfg)


def test_a_slim_student_leaves_as_a_plain_resnet(tmp_path):
    cfg = detector_cfg("retinanet", depth=50, **SLIM, **{"MODEL.RESNETS.WIDTH_MULT": 0.5})
    (tmp_path / "plain.yaml").write_text(plain_config(cfg).dump())
    plain = get_cfg()  # without the keys of this package
    plain.merge_from_file(str(tmp_path / "plain.yaml"), allow_unsafe=False)
    assert plain.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone"
    ours = build_model(cfg)
    build_model(plain).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("taken, is_trained", [([], False), (["p2"], True)])
def test_a_first_level_is_frozen_unless_a_semantic_head_takes_it(caplog, taken, is_trained):
    levels = {"MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"], "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"]}
    model = build_model(detector_cfg("faster_rcnn", **levels, **{"MODEL.ANCHOR_GENERATOR.SIZES": [[32]]}))
    model.sem_seg_head = SimpleNamespace(in_features=taken)
    with caplog.at_level("INFO", "distill"):
        freeze_unused_levels(model)
    told = "Frozen, since neither the heads nor a distiller takes their levels: fpn_lateral2, fpn_output2"
    assert (told in caplog.text) != is_trained
    trained = [model.backbone.fpn_lateral2.weight.requires_grad, model.backbone.fpn_output2.weight.requires_grad]
    assert trained == [is_trained] * 2 and model.backbone.fpn_output3.weight.requires_grad


@pytest.mark.parametrize("kind, name", [("mask_rcnn", "mask_in_features"), ("faster_rcnn", "keypoint_in_features")])
def test_a_first_level_that_another_head_takes_is_trained(kind, name):
    levels = {"MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"], "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4", "p5"]}
    model = build_model(detector_cfg(kind, **levels, **{"MODEL.ANCHOR_GENERATOR.SIZES": [[32]]}))
    setattr(model.roi_heads, name, ["p2", "p3"])
    freeze_unused_levels(model, ["p4"])
    assert all(p.requires_grad for p in model.backbone.fpn_output2.parameters())


def test_nothing_is_frozen_where_heads_do_not_name_their_levels():
    detector = torch.nn.Module()
    detector.backbone = build_model(detector_cfg("faster_rcnn")).backbone
    freeze_unused_levels(detector, ["p4"])
    assert all(p.requires_grad for p in detector.backbone.fpn_output2.parameters())

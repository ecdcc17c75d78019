"""torchvision backbones: taps, norms, freezing, weights; slimmed ResNets."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from distill.config import plain_config
from distill.errors import DistillError
from distill.modeling import TorchvisionBackbone
from tests.helpers import detector_cfg, random_batch, set_all

RESNET = ("resnet18", ["layer1", "layer2", "layer3", "layer4"])
MOBILENET = ("mobilenet_v2", ["features.3", "features.6", "features.13", "features.17"])


@pytest.mark.parametrize("name, taps, channels", [(*RESNET, [64, 128, 256, 512]), (*MOBILENET, [24, 32, 96, 320])])
def test_features_are_those_of_torchvision(name, taps, channels, tmp_path):
    network = torchvision.models.get_model(name, weights=None).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = TorchvisionBackbone(name, taps, norm="FrozenBN", weights=str(tmp_path / "weights.pth")).eval()
    expected = {}
    for tap in taps:
        network.get_submodule(tap).register_forward_hook(lambda m, a, out, tap=tap: expected.update({tap: out}))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        network(x)
        features = backbone(x)
    assert list(features) == taps
    for (tap, spec), stride, c in zip(backbone.output_shape().items(), (4, 8, 16, 32), channels):
        assert (spec.stride, spec.channels) == (stride, c)
        assert features[tap].shape == (1, c, 64 // stride, 96 // stride)
        torch.testing.assert_close(features[tap], expected[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm, kind", [("BN", nn.BatchNorm2d), ("FrozenBN", FrozenBatchNorm2d), ("GN", nn.GroupNorm)])
def test_norm_replaces_every_batch_norm(norm, kind):
    backbone = TorchvisionBackbone(*RESNET, norm=norm)
    norms = [m for m in backbone.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm))]
    assert len(norms) == 20 and all(type(m) is kind for m in norms)


@pytest.mark.parametrize(
    "freeze_at, frozen", [(0, set()), (1, {"conv1"}), (2, {"conv1", "layer1"}), (3, {"conv1", "layer1", "layer2"})]
)
def test_freezing(freeze_at, frozen):
    backbone = TorchvisionBackbone(*RESNET, norm="BN", freeze_at=freeze_at)
    assert {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad} == frozen
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert not trained & (frozen | ({"bn1"} if freeze_at else set()))
    assert isinstance(backbone.body.bn1, FrozenBatchNorm2d) == (freeze_at > 0)


def test_what_lies_behind_the_last_tap_is_dropped():
    names = [name for name, _ in TorchvisionBackbone(*MOBILENET).named_parameters()]
    assert not any(name.startswith(("body.features.18", "body.classifier")) for name in names)


@pytest.mark.parametrize(
    "args, message",
    [
        (("resnet17", ["layer1"]), "no classification network 'resnet17'. It has: .*resnet18"),
        (("resnet18", ["layer9"]), r"\['layer9'\]: expected nodes of the network.*layer1.0.conv1"),
        (("resnet18", []), r"OUT_FEATURES is \[\]"),
        (("resnet18", ["layer1", "layer3"]), r"strides \[4, 16\]"),
        (("resnet18", ["layer1"], "BN", "/nowhere.pth"), "cannot use '/nowhere.pth' for resnet18"),
        (("resnet18", ["layer1"], "BN", "", 5), "FREEZE_AT is 5; with 1 OUT_FEATURES it can be 0 to 2"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(DistillError, match=message):
        TorchvisionBackbone(*args)


@pytest.mark.parametrize(
    "kind, top", [("faster_rcnn", ["p2", "p3", "p4", "p5", "p6"]), ("retinanet", ["p3", "p4", "p5", "p6", "p7"])]
)
def test_detectors_train_on_it(kind, top):
    cfg = detector_cfg(kind)
    taps = MOBILENET[1] if kind == "faster_rcnn" else MOBILENET[1][1:]
    set_all(
        cfg,
        {
            "MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone",
            "MODEL.TORCHVISION.OUT_FEATURES": taps,
            "MODEL.TORCHVISION.NORM": "BN",
            "MODEL.BACKBONE.FREEZE_AT": 2,
        },
    )
    model = build_model(cfg).train()
    assert list(model.backbone.output_shape()) == top
    sum(model(random_batch((64, 96), (64, 64))).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


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

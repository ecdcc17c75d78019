"""Which part of a timm network MODEL.BACKBONE.FREEZE_AT freezes."""

import pytest
import timm
import torch
from timm.layers import GroupNorm, GroupNormAct

from distill.modeling.timm_backbone import TimmBackbone


@pytest.mark.parametrize("indices", [(), (2, 3, 4)])
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_are_those_up_to_the_named_one(freeze_at, indices):
    backbone = TimmBackbone("resnet18", out_indices=indices, norm="BN", freeze_at=freeze_at)
    parts = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    frozen = {part: True for part in parts}
    for key, weight in backbone.body.named_parameters():
        frozen[key.split(".")[0] if key.startswith(("layer", "conv1")) else "conv1"] &= not weight.requires_grad
    assert [frozen[part] for part in parts] == [i < freeze_at for i in range(5)]
    backbone.train()
    norms = {key: value.clone() for key, value in backbone.body.layer1.state_dict().items() if "running" in key}
    backbone(torch.randn(2, 3, 64, 64))
    moved = [not torch.equal(backbone.body.layer1.state_dict()[key], value) for key, value in norms.items()]
    assert not any(moved) if freeze_at >= 2 else all(moved)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv4_conv_small", "convnext_atto", "regnety_002"])
def test_as_much_is_frozen_whatever_stages_the_fpn_takes(name):
    frozen = []
    for indices in ((), list(timm.create_model(name, features_only=True).feature_info.out_indices)[-3:]):
        backbone = TimmBackbone(name, out_indices=indices, norm="BN", freeze_at=2)
        frozen.append({key for key, weight in backbone.named_parameters() if not weight.requires_grad})
    assert frozen[0] == frozen[1] and 0 < len(frozen[0]) < len(list(backbone.parameters()))


def test_a_network_that_begins_at_a_coarser_stage_freezes_its_first_convolution():
    backbones = [TimmBackbone("efficientvit_m0", norm="BN", freeze_at=k) for k in (1, 2, 4)]
    frozen = [{key for key, weight in x.named_parameters() if not weight.requires_grad} for x in backbones]
    assert backbones[0].strides[0] == 16
    assert 0 < len(frozen[0]) <= 3 and frozen[0] == frozen[1] < frozen[2]


@pytest.mark.parametrize("norm, kind", [("GN", GroupNormAct), ("GN", GroupNorm), ("SyncBN", torch.nn.SyncBatchNorm)])
def test_norms_of_frozen_stages_are_frozen_whatever_the_others_are(norm, kind):
    name = "mobilenetv3_small_050" if kind is GroupNormAct else "resnet18"
    body = TimmBackbone(name, norm=norm, freeze_at=2).body
    frozen = [x for x in body.modules() if isinstance(x, kind) and not any(p.requires_grad for p in x.parameters())]
    trained = [x for x in body.modules() if isinstance(x, kind)]
    assert trained and not frozen
    assert sum("Frozen" in type(x).__name__ for x in body.modules()) >= 2

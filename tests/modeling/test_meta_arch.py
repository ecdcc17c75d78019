"""FCOS from a yaml config."""

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.helpers import detector_cfg, random_batch


def test_every_key_reaches_the_model():
    keys = {
        "CENTER_SAMPLING_RADIUS": 2.5,
        "FOCAL_LOSS_ALPHA": 0.3,
        "FOCAL_LOSS_GAMMA": 1.5,
        "SCORE_THRESH_TEST": 0.11,
        "TOPK_CANDIDATES_TEST": 77,
        "NMS_THRESH_TEST": 0.44,
        "IN_FEATURES": ["p4", "p5"],
        "NUM_CONVS": 3,
        "PRIOR_PROB": 0.2,
        "NUM_CLASSES": 6,
    }
    model = build_model(detector_cfg("fcos", **{f"MODEL.FCOS.{key}": value for key, value in keys.items()}))
    attributes = "center_sampling_radius focal_loss_alpha focal_loss_gamma test_score_thresh test_topk_candidates"
    for name, key in zip(attributes.split(), keys):
        assert getattr(model, name) == keys[key]
    assert model.test_nms_thresh == 0.44 and list(model.head_in_features) == ["p4", "p5"]
    convs = [m for m in model.head.cls_subnet if type(m).__name__ == "Conv2d"]
    assert len(convs) == 3 and model.head.cls_score.out_channels == model.num_classes == 6
    assert abs(model.head.cls_score.bias[0].sigmoid().item() - 0.2) < 1e-6


def test_it_trains_in_mixed_precision():
    model = build_model(detector_cfg("fcos")).train()
    batch = random_batch((64, 96), (61, 75))
    losses = []
    for enabled in (True, False):
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(batch))
    sum(losses[0].values()).backward()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=0.05, atol=0.02, msg=name)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

"""Teachers from Python configs: built from their model alone, filled completely, and used as any other."""

import shutil

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from distill.errors import DistillError
from distill.modeling import build_teacher
from distill.modeling.teacher import teacher_recipe
from distill.recipes import LazyRecipe
from tests.helpers import DETECTORS, ROOT, built_in, detector_cfg, distillation_cfg, random_batch, set_all

try:
    from detectron2.modeling import MViT, SwinTransformer, ViT  # noqa: F401

    HAS_TRANSFORMERS = True
except ImportError:
    HAS_TRANSFORMERS = False

BASELINES = ["R_50", "R_101", "regnetx_4gf_dds", "regnety_4gf_dds"]
TRANSFORMERS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not HAS_TRANSFORMERS, reason="Detectron2 v0.6 has no ViT, Swin and MViT")
    )
    for name in ("vitdet", "swin", "mvitv2")
]
RGB_MEAN = [123.675, 116.28, 103.53]


def write_lazy_teacher(folder, name):
    """A small teacher's Python config and random weights; returns a config's DISTILL.TEACHER overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tests/lazy/shrink.py", folder)
    source = "lsj" if name in BASELINES else name
    text = (ROOT / f"tests/lazy/{source}.py").read_text().replace("NAME", name)
    (folder / "teacher.py").write_text(text)
    recipe = LazyRecipe(str(folder / "teacher.py"))
    recipe.cfg.MODEL.DEVICE = "cpu"
    torch.save({"model": recipe.build_detector().state_dict()}, folder / "teacher.pth")
    return {
        "DISTILL.TEACHER.CONFIG_FILE": str(folder / "teacher.py"),
        "DISTILL.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
    }


def distillers_for(kind):
    """Every distiller; global knowledge compares no classifications of boxes with those of anchors."""
    return {
        "DISTILL.DISTILLERS": built_in(kind, "mask_rcnn"),
        "DISTILL.GLOBAL.RESPONSE_ON": kind not in ("retinanet", "fcos"),
    }


@pytest.mark.parametrize("kind", [kind for kind in DETECTORS if kind != "cascade_rcnn"])
@pytest.mark.parametrize("name", [*BASELINES, *TRANSFORMERS])
def test_every_distiller_takes_a_step(tmp_path, name, kind):
    teacher = write_lazy_teacher(tmp_path, name)
    model = build_model(distillation_cfg(detector_cfg(kind), teacher, **distillers_for(kind))).train()
    loaded = {key: value.clone() for key, value in model.teacher.model.state_dict().items()}
    batch = random_batch((61, 75), (90, 64))
    model.teacher.view(batch).features  # noqa: B018  folds its norms
    before = {key: value.clone() for key, value in model.teacher.model.state_dict().items()}
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values()) and len(losses) > 6
    sum(losses.values()).backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # running statistics, too
    # the teacher shows what it computes by itself, whose channels and statistics may be others
    alone = LazyRecipe(teacher["DISTILL.TEACHER.CONFIG_FILE"])
    alone.cfg.MODEL.DEVICE = "cpu"
    alone = alone.build_detector().eval()
    alone.load_state_dict(loaded)
    flips = alone.input_format == "RGB"
    images = [{"image": x["image"].flip(0) if flips else x["image"]} for x in batch]
    with torch.no_grad():
        expected = alone.backbone(alone.preprocess_image(images).tensor)
    view, again = (model.teacher.view(batch).features for _ in range(2))
    for level, features in view.items():
        assert (features - expected[level]).norm() < 1e-5 * expected[level].norm()  # norms are folded
        assert torch.equal(features, again[level])  # drop path is off


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_see_rgb(tmp_path, name):
    overrides = write_lazy_teacher(tmp_path, name)
    teacher = build_teacher(distillation_cfg(detector_cfg("faster_rcnn"), overrides))
    assert teacher.flip_channels  # the student's images are BGR
    assert teacher.model.pixel_mean.flatten().tolist() == pytest.approx(RGB_MEAN)
    assert teacher.model.pixel_std.flatten().tolist() != [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", [x for x in TRANSFORMERS if "mvit" not in str(x)])
def test_an_image_larger_than_the_teachers_square_is_seen_whole(tmp_path, name):
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), write_lazy_teacher(tmp_path, name))).train()
    batch = random_batch((70, 300))
    view = model.teacher.view(batch)
    assert view.images.shape[2:] == (320, 320)
    shown = view.images[0, :, :70, :300] * model.teacher.model.pixel_std + model.teacher.model.pixel_mean
    torch.testing.assert_close(shown.flip(0), batch[0]["image"].float(), atol=1e-3, rtol=0)
    changed = [{**batch[0], "image": batch[0]["image"].clone()}]
    changed[0]["image"][:, :, 260:] = 0  # where a square of 256 pixels ends
    other = model.teacher.view(changed)
    assert not torch.equal(view.features["p2"][..., 65:75], other.features["p2"][..., 65:75])
    assert all(loss.isfinite() for loss in model(batch).values())


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="Detectron2 v0.6 pads to no square")
def test_a_student_that_would_be_cut_off_is_refused(tmp_path):
    cfg = distillation_cfg(detector_cfg("faster_rcnn"), write_lazy_teacher(tmp_path, "R_50"))
    model = build_model(cfg).train()
    model.student.backbone._square_pad = 64
    with pytest.raises(DistillError, match="a side of 75 pixels, but the student pads images to a square of 64"):
        model(random_batch((61, 75)))


def test_only_the_model_is_instantiated(tmp_path):
    overrides = write_lazy_teacher(tmp_path, "R_50")
    with open(tmp_path / "teacher.py", "a") as f:
        f.write(
            "\nfrom detectron2.config import LazyCall as L\n\n\ndef fail(**kwargs):\n    raise AssertionError\n\n\n"
            "dataloader = dict(train=L(fail)(mapper=dict(image_format='RGB')))\noptimizer = L(fail)()\n"
        )
    assert build_teacher(distillation_cfg(detector_cfg("faster_rcnn"), overrides)).flip_channels


def test_overrides_reach_the_model(tmp_path):
    cfg = distillation_cfg(detector_cfg("faster_rcnn"), write_lazy_teacher(tmp_path, "R_50"))
    set_all(cfg, {"DISTILL.TEACHER.OPTS": ["model.roi_heads.num_classes=7", "model.backbone.bottom_up.freeze_at=2"]})
    with pytest.raises(DistillError, match=r"roi_heads.box_predictor.cls_score.weight is \(4, 32\), not \(8, 32\)"):
        build_teacher(cfg)
    set_all(cfg, {"DISTILL.TEACHER.OPTS": ["MODEL.ROI_HEADS.NUM_CLASSES", "7"]})
    with pytest.raises(DistillError, match=r"the override 'MODEL.ROI_HEADS.NUM_CLASSES' .*takes key=value, such as"):
        build_teacher(cfg)
    set_all(cfg, {"DISTILL.TEACHER.OPTS": ["model.roi_heads.strange=7"]})
    with pytest.raises(DistillError, match="cannot be built: TypeError: .*strange"):
        build_teacher(cfg)


def test_where_the_weights_come_from(tmp_path):
    name = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
    cfg = distillation_cfg(detector_cfg("faster_rcnn"), {"DISTILL.TEACHER.CONFIG_FILE": name})
    assert teacher_recipe(cfg).cfg.MODEL.WEIGHTS.endswith("/42073830/model_final_f96b26.pkl")
    overrides = write_lazy_teacher(tmp_path, "R_50")
    own = distillation_cfg(detector_cfg("faster_rcnn"), {**overrides, "DISTILL.TEACHER.WEIGHTS": ""})
    with pytest.raises(DistillError, match="WEIGHTS is empty, and .*teacher.py names no weights itself"):
        teacher_recipe(own)
    set_all(own, {"DISTILL.TEACHER.OPTS": ["train.init_checkpoint=mine.pth"]})
    assert teacher_recipe(own).cfg.MODEL.WEIGHTS == "mine.pth"


def test_a_backbone_to_begin_from_is_no_teacher(tmp_path):
    overrides = write_lazy_teacher(tmp_path, "R_50")
    state = torch.load(tmp_path / "teacher.pth")["model"]
    kept = {key: value for key, value in state.items() if key.startswith("backbone.bottom_up")}
    torch.save({"model": kept}, tmp_path / "backbone.pth")
    set_all(cfg := distillation_cfg(detector_cfg("faster_rcnn"), overrides), {"DISTILL.TEACHER.WEIGHTS": ""})
    set_all(cfg, {"DISTILL.TEACHER.OPTS": [f"train.init_checkpoint={tmp_path / 'backbone.pth'}"]})
    with pytest.raises(DistillError, match="The teacher would not be fully loaded from '.*backbone.pth'"):
        build_teacher(cfg)


def test_the_baselines_norms_are_synchronised(tmp_path):
    """What the test above runs on one CPU is what several GPUs would synchronise."""
    model = build_teacher(distillation_cfg(detector_cfg("faster_rcnn"), write_lazy_teacher(tmp_path, "R_50"))).model
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"SyncBatchNorm", "NaiveSyncBatchNorm"} <= kinds and not any(m.training for m in model.modules())
    assert isinstance(model.backbone, nn.Module)

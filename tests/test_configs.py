"""Every shipped config builds, and the distilled ones take a step on random images."""

from pathlib import Path

import pytest

from distill.config import load_config
from distill.data import check_datasets
from distill.engine import Trainer
from distill.modeling import distillation_model, teacher
from distill.recipes import YamlRecipe
from tests.helpers import ROOT, random_batch

CONFIGS = sorted(
    path
    for folder in ("configs", "projects")
    for path in (ROOT / folder).rglob("*.yaml")
    if not path.name.startswith("Base") and "Evidence" not in path.parts  # whose yaml files are tables
)
METHODS = ("review", "structural", "global", "aligned", "fgd", "mgd", "cwd", "pearson", "crosskd", "logit")
# folders and last words of configs without distillation
PLAIN = {"coco", "voc", "teacher", "student"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_builds_and_takes_a_step(path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # neither the model zoo nor ImageNet weights are to be had here: random ones, everything else as shipped
    monkeypatch.setattr(teacher, "load_detector", lambda recipe, role: recipe.build_detector())
    opts = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.TIMM.WEIGHTS",
        "",
        "DISTILL.TEACHER.OPTS",
        "[]" if "LSJ" in path.stem else "['MODEL.TIMM.WEIGHTS', '']",  # Python configs have no such key
        "DISTILL.ALIGNED.WARMUP_ITERS",  # in the first step its loss would be 0
        "0",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",  # pooling 512 is most of a step on the CPU
        "32",
    ]
    cfg = load_config(str(path), opts)
    check_datasets(cfg)
    model = Trainer.build_model(cfg).train()
    YamlRecipe(cfg).build_optimizer(model)
    losses = model(random_batch((64, 96), (64, 80)))
    sum(losses.values()).backward()
    distilled = isinstance(model, distillation_model.DistillationModel)
    assert distilled == PLAIN.isdisjoint([path.parent.name, path.stem.split("_")[-1]])
    names = {
        "review": "loss_review",
        "structural": "loss_structural",
        "global": "loss_local",  # the global loss itself waits for prototypes
        "aligned": "loss_aligned",
        "fgd": "loss_fgd_foreground",
        "mgd": "loss_mgd",
        "cwd": "loss_cwd",
        "pearson": "loss_pearson",
        "crosskd": "loss_cross_class",
        "logit": "loss_logit",
        "AttentionTransfer": "loss_attention",
    }
    words = (path.parent.name, path.stem.split("_")[0], path.stem.split("_")[-1])
    own = [losses[name] for method, name in names.items() if distilled and method in words]
    assert len(own) == distilled and all(loss > 0 for loss in own)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_papers_configs_are_not_balanced():
    papers = [path for path in CONFIGS if path.parent.name in METHODS]
    assert len(papers) > 15 and all(load_config(str(path)).DISTILL.BALANCE == 0 for path in papers)


def test_the_published_settings_of_crosskd_and_logit():
    crosskd = load_config(str(ROOT / "configs" / "crosskd" / "retinanet_R50_R101.yaml")).DISTILL.CROSSKD
    assert (crosskd.CLASS_WEIGHT, crosskd.BOX_WEIGHT, crosskd.BETA, crosskd.NUM_TEACHER_CONVS) == (1, 1, 1, 1)
    assert crosskd.ALIGN_SCALE
    logit = load_config(str(ROOT / "configs" / "logit" / "faster_rcnn_R50_R101.yaml")).DISTILL.LOGIT
    assert (logit.KIND, logit.ALPHA, logit.BETA, logit.TEMPERATURE) == ("DKD", 1, 0.25, 1)
    logit = load_config(str(ROOT / "configs" / "logit" / "retinanet_R50_R101.yaml")).DISTILL.LOGIT
    assert (logit.KIND, logit.LOSS_WEIGHT, logit.BOX_WEIGHT) == ("BCKD", 1, 4)


def test_the_published_settings_of_fgd_mgd_cwd_and_pearson():
    factors = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "GLOBAL_WEIGHT", "TEMPERATURE")
    expected = {
        "retinanet_R50_R101": ((1e-3, 5e-4, 5e-4, 5e-6, 0.5), [], (2e-5, 0.65), 10.0),
        "faster_rcnn_R50_R101": ((5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), ["p2", "p3", "p4", "p5"], (5e-7, 0.45), 6.0),
    }
    for name, (fgd, levels, mgd, pearson) in expected.items():
        own = {method: load_config(str(ROOT / "configs" / method / f"{name}.yaml")).DISTILL for method in METHODS[4:8]}
        assert tuple(own["fgd"].FGD[key] for key in factors) == fgd and levels == own["fgd"].FGD.LEVELS
        assert mgd == (own["mgd"].MGD.LOSS_WEIGHT, own["mgd"].MGD.MASK_RATIO) and levels == own["mgd"].MGD.LEVELS
        assert (own["cwd"].CWD.LOSS_WEIGHT, own["cwd"].CWD.TEMPERATURE) == (10.0, 1.0)
        assert pearson == own["pearson"].PEARSON.LOSS_WEIGHT


def test_the_published_settings_of_knowledge_review():
    weights = {
        "faster_rcnn_R18_R101": 1.2,
        "faster_rcnn_R50_R101": 1.0,
        "faster_rcnn_MobileNetV2_R50": 2.0,
        "faster_rcnn_R18_R101_LSJ": 1.2,
        "mask_rcnn_R18_R101": 1.5,
        "mask_rcnn_R50_R101": 0.8,
        "mask_rcnn_MobileNetV2_R50": 1.0,
        "retinanet_R50_R101": 1.0,
    }
    for name, weight in weights.items():
        cfg = load_config(str(ROOT / "configs" / "review" / f"{name}.yaml"))
        assert weight == cfg.DISTILL.REVIEW.LOSS_WEIGHT and cfg.DISTILL.REVIEW.MID_CHANNELS == 256
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS) == (180000, 8, (120000, 160000))
        assert (0.005 if name.startswith("retinanet") else 0.01) == cfg.SOLVER.BASE_LR
        if "MobileNetV2" in name:
            assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
        if name.startswith("retinanet"):
            assert cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA == 0.1


def test_the_published_settings_of_aligned_distillation():
    # (images in a batch, learning rate, iterations) of the teacher and of the student
    published = {
        "fcos_R50": ((8, 0.01, 180000), (16, 0.01, 90000)),
        "fcos_R50_x0.75": ((8, 0.01, 180000), (32, 0.02, 45000)),
        "fcos_R50_x0.5": ((8, 0.01, 180000), (32, 0.01, 45000)),
        "fcos_R50_x0.25": ((16, 0.01, 90000), (32, 0.02, 45000)),
    }
    students = sorted((ROOT / "configs" / "aligned").glob("*[0-9].yaml"))
    assert len(students) == 10
    for path in students:
        cfg = load_config(str(path))
        teacher = load_config(str(ROOT / cfg.DISTILL.TEACHER.CONFIG_FILE))
        assert (max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 400, 667)
        assert cfg.DISTILL.ALIGNED.LOSS_WEIGHT == 0.6 and cfg.DISTILL.ALIGNED.WARMUP_ITERS == 500
        assert teacher.MODEL.RESNETS.WIDTH_MULT == cfg.MODEL.RESNETS.WIDTH_MULT
        assert str(Path(cfg.DISTILL.TEACHER.WEIGHTS).parent) == teacher.OUTPUT_DIR
        images = [side.SOLVER.MAX_ITER * side.SOLVER.IMS_PER_BATCH for side in (teacher, cfg)]
        assert images == ([288000, 288000] if path.stem.startswith("voc") else [1440000, 1440000])
        if path.stem in published:
            for side, settings in zip((teacher, cfg), published[path.stem]):
                node = side.SOLVER
                assert settings == (node.IMS_PER_BATCH, node.BASE_LR, node.MAX_ITER), path
                assert node.WARMUP_ITERS == 500 and side.MODEL.FCOS.SCORE_THRESH_TEST == 0.05
                assert side.MODEL.BACKBONE.FREEZE_AT == 0 and side.MODEL.RESNETS.NORM == "naiveSyncBN"


@pytest.mark.parametrize("name, rate", [("faster_rcnn_R50_R101", 0.02), ("retinanet_R50_R101", 0.01)])
def test_the_published_settings_of_global_knowledge(name, rate):
    cfg = load_config(str(ROOT / "configs" / "global" / f"{name}.yaml"))
    node, own = cfg.SOLVER, cfg.DISTILL.GLOBAL
    assert (16, rate, 500) == (node.IMS_PER_BATCH, node.BASE_LR, node.WARMUP_ITERS)
    epoch = 117266 / 16
    assert [x / epoch for x in (*node.STEPS, node.MAX_ITER)] == pytest.approx([16, 22, 24], abs=0.01)
    assert "COCO-Detection" in cfg.MODEL.WEIGHTS and cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    assert (own.LOCAL_FOREGROUND_WEIGHT, own.LOCAL_BACKGROUND_WEIGHT, own.GLOBAL_WEIGHT) == (1, 4, 5)


def test_the_published_settings_of_structural_similarity():
    for path in sorted((ROOT / "configs" / "structural").glob("*.yaml")):
        node = load_config(str(path)).DISTILL.STRUCTURAL
        assert node.SCALE == "own_minmax" and node.LOSS_WEIGHT in (2.0, 4.0)
        assert (node.WINDOW_SIZE, node.SIGMA, node.EXPONENTS) == (11, 1.5, [1.0, 1.0, 1.0])
    pair = load_config(str(ROOT / "configs" / "structural" / "faster_rcnn_R50_cascade_X101.yaml"))
    teacher = load_config(str(ROOT / pair.DISTILL.TEACHER.CONFIG_FILE))
    assert pair.DISTILL.STRUCTURAL.ADAPTATION == "1x1"
    assert teacher.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and teacher.MODEL.RESNETS.NUM_GROUPS == 32

"""Every shipped config builds, and the distilled ones take a step on random images."""

from pathlib import Path

import pytest
from detectron2.modeling import build_model

from distill.config import load_config
from distill.data import check_datasets
from distill.engine import Trainer
from distill.modeling import distillation_model, teacher
from tests.helpers import ROOT, random_batch

CONFIGS = sorted(
    path
    for folder in ("configs", "projects")
    for path in (ROOT / folder).rglob("*.yaml")
    if not path.name.startswith("Base") and path.parent.name != "suites"
)
# folders and last words of configs without distillation
PLAIN = {"coco", "voc", "teacher", "student"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_builds_and_takes_a_step(path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # neither the model zoo nor ImageNet weights are to be had here: random ones, everything else as shipped
    monkeypatch.setattr(teacher, "load_detector", lambda cfg, role: build_model(cfg))
    opts = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.TORCHVISION.WEIGHTS",
        "",
        "DISTILL.TEACHER.OPTS",
        "['MODEL.TORCHVISION.WEIGHTS', '']",
        "DISTILL.ALIGNED.WARMUP_ITERS",  # in the first step its loss would be 0
        "0",
    ]
    cfg = load_config(str(path), opts)
    check_datasets(cfg)
    model = Trainer.build_model(cfg).train()
    Trainer.build_optimizer(cfg, model)
    losses = model(random_batch((64, 96), (64, 80)))
    sum(losses.values()).backward()
    distilled = isinstance(model, distillation_model.DistillationModel)
    assert distilled == PLAIN.isdisjoint([path.parent.name, path.stem.split("_")[-1]])
    names = {
        "review": "loss_review",
        "structural": "loss_structural",
        "global": "loss_local",  # the global loss itself waits for prototypes
        "aligned": "loss_aligned",
        "PearsonDistiller": "loss_pearson",
    }
    words = (path.parent.name, path.stem.split("_")[0])
    own = [losses[name] for method, name in names.items() if distilled and method in words]
    assert len(own) == distilled and all(loss > 0 for loss in own)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_papers_configs_are_not_balanced():
    papers = [path for path in CONFIGS if path.parent.name in ("review", "structural", "global", "aligned")]
    assert len(papers) > 15 and all(load_config(str(path)).DISTILL.BALANCE == 0 for path in papers)


def test_the_published_settings_of_knowledge_review():
    weights = {
        "faster_rcnn_R18_R101": 1.2,
        "faster_rcnn_R50_R101": 1.0,
        "faster_rcnn_MobileNetV2_R50": 2.0,
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


def test_the_published_settings_of_aligned_distillation():
    students = sorted((ROOT / "configs" / "aligned").glob("*[0-9].yaml"))
    assert len(students) == 10
    for path in students:
        cfg = load_config(str(path))
        teacher = load_config(str(ROOT / cfg.DISTILL.TEACHER.CONFIG_FILE))
        voc = path.stem.startswith("voc")
        assert (36000 if voc else 180000, 8) == (teacher.SOLVER.MAX_ITER, teacher.SOLVER.IMS_PER_BATCH)
        assert (9000 if voc else 45000, 32) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH)
        assert (max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 400, 667)
        assert cfg.DISTILL.ALIGNED.LOSS_WEIGHT == 0.6 and cfg.DISTILL.ALIGNED.WARMUP_ITERS == 500
        assert teacher.MODEL.RESNETS.WIDTH_MULT == cfg.MODEL.RESNETS.WIDTH_MULT
        assert str(Path(cfg.DISTILL.TEACHER.WEIGHTS).parent) == teacher.OUTPUT_DIR

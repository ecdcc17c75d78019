"""Every shipped pair with a Python config: it builds, and takes a step on random images."""

import pytest
import torch

from distill.data import check_datasets
from distill.modeling import DistillationModel, teacher
from distill.recipes import load_recipe
from tests.helpers import ROOT, random_batch
from tests.modeling.test_lazy_teachers import HAS_TRANSFORMERS, write_lazy_teacher

CONFIGS = sorted((ROOT / "configs" / "lazy").glob("*.py"))
# what stands in for teachers that Detectron2's package does not have, and that are too large for a test
TINY = {"ViTDet": "vitdet", "MViTv2": "mvitv2", "Swin": "swin"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds_and_takes_a_step(tmp_path, path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(teacher, "load_detector", lambda recipe, role: recipe.build_detector())
    opts = ["train.device=cpu"]
    tiny = next((own for name, own in TINY.items() if name in path.stem), "")
    if tiny and not HAS_TRANSFORMERS:
        pytest.skip("Detectron2 v0.6 has no ViT, Swin and MViT")
    if tiny:
        opts.append(f"distill.TEACHER.CONFIG_FILE={write_lazy_teacher(tmp_path, tiny)['DISTILL.TEACHER.CONFIG_FILE']}")
    recipe = load_recipe(str(path), opts)
    recipe.check()
    check_datasets(recipe.cfg)
    assert f"output/lazy/{path.stem}" == recipe.cfg.OUTPUT_DIR
    model = recipe.build_model().train()
    recipe.build_optimizer(model)
    losses = model(random_batch((64, 96), (64, 80)))
    assert all(loss.isfinite() for loss in losses.values())
    assert isinstance(model, DistillationModel) == (path.stem != "mask_rcnn_R50")
    if isinstance(model, DistillationModel):
        name = "loss_pearson" if path.stem.startswith(("retinanet", "fcos")) else "loss_review"
        assert losses[name] > 0
        sum(losses.values()).backward()
        assert not [name for name, p in model.distillers.named_parameters() if p.grad is None]
        given = next(p for p in model.student.backbone.fpn_output4.parameters())
        assert given.grad is not None and torch.isfinite(given.grad).all()


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if any(name in path.stem for name in TINY)], ids=lambda p: p.stem
)
def test_images_fit_into_the_square_of_their_teachers(path):
    recipe = load_recipe(str(path))
    assert recipe.cfg.DISTILL.TEACHER.WEIGHTS.startswith("https://dl.fbaipublicfiles.com/detectron2/")
    if "MViT" not in path.stem:
        assert recipe.cfg.INPUT.MAX_SIZE_TRAIN == 1024 and max(recipe.cfg.INPUT.MIN_SIZE_TRAIN) == 768


def test_the_published_schedule_of_pearson_distillation():
    cfg = load_recipe(str(ROOT / "configs" / "lazy" / "retinanet_R50_cascade_Swin_B.py")).cfg
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 180000 * 16 and cfg.DISTILL.PEARSON.LOSS_WEIGHT == 6.0

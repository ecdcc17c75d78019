"""What the trainer adds to Detectron2's."""

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

from distill.distillers import ReviewDistiller
from distill.engine import Trainer
from distill.errors import DistillError
from tests.helpers import detector_cfg, distillation_cfg, random_batch, set_all, write_teacher


class OneBatchTrainer(Trainer):
    """Trains on one random batch."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [random_batch((64, 96), (64, 96))] * cfg.SOLVER.MAX_ITER


class Counter(HookBase):
    def __init__(self):
        self.steps = []

    def after_step(self):
        self.steps.append(self.trainer.iter)


def test_a_distillers_hooks_run_with_the_trainer(tmp_path, monkeypatch):
    counter = Counter()
    monkeypatch.setattr(ReviewDistiller, "build_hooks", lambda self, model: [counter])
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **{"SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / "out")}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn")),
    )
    trainer = OneBatchTrainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.teacher.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert counter.steps == [0, 1, 2]
    after = trainer.model.teacher.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # training leaves the teacher alone


def test_adamw_has_detectron2s_groups_and_clipping(tmp_path):
    cfg = detector_cfg(
        "faster_rcnn", **{"SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.02, "SOLVER.WEIGHT_DECAY": 0.3}
    )
    set_all(cfg, {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1e-3})
    norm, conv = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)
    optimizer = Trainer.build_optimizer(cfg, torch.nn.Sequential(norm, conv))
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(conv.weight)] == 0.3 and decay[id(norm.weight)] == 0.0
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    assert conv.weight.grad.abs().max() <= 1e-3


def test_sgd_is_detectron2s_own():
    optimizer = Trainer.build_optimizer(detector_cfg("faster_rcnn"), torch.nn.Conv2d(3, 3, 1))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9


def test_evaluator_by_type(tmp_path):
    cfg = detector_cfg("faster_rcnn", **{"OUTPUT_DIR": str(tmp_path)})
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, kind in (("digit_scenes_val", COCOEvaluator), ("digit_scenes_voc_val", PascalVOCDetectionEvaluator)):
        DatasetCatalog.get(name)
        assert isinstance(Trainer.build_evaluator(cfg, name), kind)
    MetadataCatalog.get("strange").evaluator_type = "lvis"
    with pytest.raises(DistillError, match="strange has the evaluator_type 'lvis'"):
        Trainer.build_evaluator(cfg, "strange")

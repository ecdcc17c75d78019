"""What the trainer adds to Detectron2's."""

import json
import logging
import math

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage

from distill.distillers import ReviewDistiller
from distill.engine import Trainer
from distill.errors import DistillError
from distill.evaluation import VOCEvaluator
from distill.modeling.scaling import Scaling
from distill.recipes import YamlRecipe
from tests.helpers import aligned_cfg, detector_cfg, distillation_cfg, random_batch, set_all, write_teacher

put_image = EventStorage.put_image


class OneBatchTrainer(Trainer):
    """Trains on one random batch.

    Args:
        cfg: of the run.
        batches: what the recipe's own loader gives.
    """

    def __init__(self, cfg, batches=None):
        recipe = YamlRecipe(cfg)
        if batches is not None:
            recipe.build_train_loader = lambda num_workers: batches
        super().__init__(recipe)

    def build_train_loader(self):
        return [random_batch((64, 96), (64, 96))] * self.cfg.SOLVER.MAX_ITER * self.cfg.SOLVER.ACCUMULATE


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
    trainer.model.teacher.view(random_batch((64, 96))).features  # noqa: B018  folds its norms
    before = {k: v.clone() for k, v in trainer.model.teacher.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert counter.steps == [0, 1, 2]
    after = trainer.model.teacher.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # training leaves the teacher alone


@pytest.mark.parametrize("frozen", [False, True])
def test_a_distillers_weight_that_gets_no_gradient_ends_the_first_step(tmp_path, frozen):
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **{"SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / "out")}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn")),
    )
    trainer = OneBatchTrainer(cfg)
    forgotten = torch.nn.Linear(2, 2).requires_grad_(not frozen)
    trainer.model.distillers["ReviewDistiller"].forgotten = forgotten
    trainer.resume_or_load(resume=False)
    if frozen:
        trainer.train()
        assert trainer.iter == 3
    else:
        with pytest.raises(DistillError, match="2 weights of ReviewDistiller got no gradient .* forgotten.weight, "):
            trainer.train()
        assert trainer.iter == 0


def test_the_balance_is_kept_in_the_checkpoint_and_goes_on_from_it(tmp_path):
    settings = {"SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / "out")}
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **settings),
        write_teacher(tmp_path, detector_cfg("faster_rcnn")),
        **{"DISTILL.BALANCE": 0.5, "DISTILL.GRADIENT_LOG_PERIOD": 2},
    )
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    state = trainer.model.state_dict()
    mean = state["distillers.ReviewDistiller.log_gradient_ratio"]
    assert state["distillers.ReviewDistiller.num_measurements"] == 2  # iterations 0 and 2
    cfg.SOLVER.MAX_ITER = 4
    resumed = OneBatchTrainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert torch.equal(resumed.model.distillers["ReviewDistiller"].log_gradient_ratio, mean)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    weights = [line["weight/loss_review"] for line in lines]
    assert weights[-1] == pytest.approx(0.5 / math.exp(mean), rel=1e-5)


def test_a_run_that_begins_from_the_weights_of_another_forgets_its_balance(tmp_path):
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **{"SOLVER.MAX_ITER": 1, "OUTPUT_DIR": str(tmp_path / "out")}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn")),
        **{"DISTILL.BALANCE": 0.5},
    )
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "out" / "model_final.pth"), str(tmp_path / "other")
    other = OneBatchTrainer(cfg)
    other.resume_or_load(resume=False)
    own, given = (x.model.distillers["ReviewDistiller"] for x in (other, trainer))
    assert torch.equal(own.review.fusions[0].reduce.weight, given.review.fusions[0].reduce.weight)
    assert given.num_measurements == 1 and own.num_measurements == own.log_gradient_ratio == 0


def test_adamw_has_detectron2s_groups_and_clipping(tmp_path):
    cfg = detector_cfg(
        "faster_rcnn", **{"SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.02, "SOLVER.WEIGHT_DECAY": 0.3}
    )
    set_all(cfg, {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1e-3})
    norm, conv = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)
    optimizer = YamlRecipe(cfg).build_optimizer(torch.nn.Sequential(norm, conv))
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
    optimizer = YamlRecipe(detector_cfg("faster_rcnn")).build_optimizer(torch.nn.Conv2d(3, 3, 1))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9


def test_evaluator_by_type(tmp_path):
    cfg = detector_cfg("faster_rcnn", **{"OUTPUT_DIR": str(tmp_path)})
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, kind in (("digit_scenes_val", COCOEvaluator), ("digit_scenes_voc_val", VOCEvaluator)):
        DatasetCatalog.get(name)
        assert isinstance(YamlRecipe(cfg).build_evaluator(name), kind)
    MetadataCatalog.get("strange").evaluator_type = "boundaries"
    with pytest.raises(DistillError, match="strange has the evaluator_type 'boundaries'"):
        YamlRecipe(cfg).build_evaluator("strange")


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "fcos"])
def test_pictures_of_a_distilled_training_reach_tensorboard(tmp_path, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = str(tmp_path / "out")
    settings = {"SOLVER.MAX_ITER": 1, "SOLVER.ACCUMULATE": 2, "VIS_PERIOD": 1, "OUTPUT_DIR": out}
    cfg = distillation_cfg(detector_cfg(kind, **settings), write_teacher(tmp_path, detector_cfg(kind)))
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    events = EventAccumulator(out)
    events.Reload()
    assert len(events.Tags()["images"]) >= 1
    assert all(events.Images(tag)[0].width > 64 for tag in events.Tags()["images"])
    if kind != "faster_rcnn":  # which Detectron2 draws, once a batch
        assert all(len(events.Images(tag)) == 1 for tag in events.Tags()["images"])


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_process_that_writes_nothing_keeps_no_pictures(tmp_path, monkeypatch, kind):
    settings = {"SOLVER.MAX_ITER": 3, "VIS_PERIOD": 1, "OUTPUT_DIR": str(tmp_path / "out")}
    cfg = distillation_cfg(detector_cfg(kind, **settings), write_teacher(tmp_path, detector_cfg(kind)))
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    trainer = OneBatchTrainer(cfg)
    drawn = []
    monkeypatch.setattr(EventStorage, "put_image", lambda self, *args: (drawn.append(args), put_image(self, *args)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.iter == 3 and trainer.storage._vis_data == []
    assert bool(drawn) == (kind == "faster_rcnn")  # by Detectron2; ours draws where it is written


def test_another_optimizers_state_is_refused_before_a_step(tmp_path):
    for before, after in (("AdamW", "SGD"), ("SGD", "AdamW")):
        settings = {"SOLVER.MAX_ITER": 1, "SOLVER.OPTIMIZER": before, "OUTPUT_DIR": str(tmp_path / before)}
        cfg = detector_cfg("retinanet", **settings)
        trainer = OneBatchTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        cfg.SOLVER.OPTIMIZER = after
        with pytest.raises(DistillError, match="with another optimizer or other distillers, leave --resume out"):
            OneBatchTrainer(cfg).resume_or_load(resume=True)


def test_an_optimizers_state_of_an_earlier_torch_is_taken(tmp_path):
    settings = {"SOLVER.MAX_ITER": 1, "SOLVER.OPTIMIZER": "AdamW", "OUTPUT_DIR": str(tmp_path)}
    cfg = detector_cfg("retinanet", **settings)
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth")
    for group in saved["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        assert group.pop("foreach", 0) is None and group.pop("maximize", 0) is False
    torch.save(saved, tmp_path / "model_final.pth")
    cfg.SOLVER.MAX_ITER = 2
    resumed = OneBatchTrainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert resumed.start_iter == 1 and resumed.iter == 2


def test_nothing_to_train_on_or_to_evaluate_is_refused():
    cfg = detector_cfg("retinanet", **{"DATASETS.TRAIN": [], "DATASETS.TEST": []})
    with pytest.raises(DistillError, match="DATASETS.TRAIN is empty"):
        YamlRecipe(cfg).check()
    YamlRecipe(cfg).check_evaluation(False)
    with pytest.raises(DistillError, match="DATASETS.TEST is empty"):
        YamlRecipe(cfg).check_evaluation(True)


def test_weights_may_be_none_as_in_a_python_config(tmp_path):
    cfg = detector_cfg("retinanet", **{"OUTPUT_DIR": str(tmp_path)})
    cfg.MODEL.WEIGHTS = None
    trainer = OneBatchTrainer(cfg)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_a_script_of_ones_own_has_the_packages_log(tmp_path):
    logging.getLogger("distill").setLevel(logging.NOTSET)  # as nobody has set it up
    cfg = detector_cfg("retinanet", **{"OUTPUT_DIR": str(tmp_path)})
    OneBatchTrainer(cfg)
    assert "Model: RetinaNet, " in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("name, scale", [("LogitDistiller", 1.0), ("ReviewDistiller", 1.0), ("ReviewDistiller", 0.5)])
def test_precise_bn_runs_the_student_alone(tmp_path, monkeypatch, name, scale):
    settings = {
        "SOLVER.MAX_ITER": 2,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
        "TEST.PRECISE_BN.ENABLED": True,
        "TEST.PRECISE_BN.NUM_ITER": 3,
        "DISTILL.DISTILLERS": [name],
        "DISTILL.LOGIT.INSTANCES": "ground_truth",  # runs the box head a second time, which fvcore refuses
        "DISTILL.STUDENT.INPUT_SCALE": scale,
        "INPUT.MIN_SIZE_TEST": 400,
        "INPUT.MAX_SIZE_TEST": 667,
    }
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    batches = [random_batch((64, 96), (64, 96)) for _ in range(3)]
    trainer = OneBatchTrainer(distillation_cfg(detector_cfg("faster_rcnn"), teacher, **settings), batches)
    views = []
    view = trainer.model.teacher.view
    monkeypatch.setattr(trainer.model.teacher, "view", lambda batch: views.append(1) or view(batch))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert len(views) == 2  # one for each step
    student = trainer.model.student.train()
    norm = student.backbone.bottom_up.stem.conv1.norm
    means = []
    for batch in [Scaling(scale).batch(x) for x in batches]:
        norm.register_forward_hook(lambda module, given, _: means.append(given[0].mean((0, 2, 3))))
        student(batch)
        norm._forward_hooks.clear()
    state = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    torch.testing.assert_close(state["backbone.bottom_up.stem.conv1.norm.running_mean"], torch.stack(means).mean(0))


def test_precise_bn_of_an_aligned_teacher_is_refused(tmp_path):
    settings = {"MODEL.RESNETS.NORM": "BN", "TEST.PRECISE_BN.ENABLED": True, "OUTPUT_DIR": str(tmp_path)}
    with pytest.raises(DistillError, match="TEST.PRECISE_BN.ENABLED is True, and an AlignedTeacher runs its backbone"):
        OneBatchTrainer(aligned_cfg("retinanet", **settings), [])


def test_a_run_that_would_be_resumed_and_has_no_checkpoint_starts_anew(tmp_path):
    settings = {"DISTILL.STUDENT.INHERIT": ["roi_heads"], "OUTPUT_DIR": str(tmp_path / "out")}
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    trainer = OneBatchTrainer(distillation_cfg(detector_cfg("faster_rcnn"), teacher, **settings))
    trainer.resume_or_load(resume=True)
    own, given = (x.roi_heads.box_head.fc1.weight for x in (trainer.model.student, trainer.model.teacher.model))
    assert trainer.start_iter == 0 and torch.equal(own, given)

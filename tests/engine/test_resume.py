"""A training that goes on with another learning rate or weight decay than it began with."""

import logging

import pytest
import torch
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from distill.engine.steps import StepTrainer
from distill.recipes import YamlRecipe
from tests.engine.test_trainer import OneBatchTrainer
from tests.helpers import detector_cfg

SCHEDULE = {
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": [2, 5],
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.WARMUP_FACTOR": 0.1,
    "SOLVER.CHECKPOINT_PERIOD": 3,
}


def train(folder, until=6, resume=False, **changed):
    """The trainer at its end, and the learning rate of each step."""
    trainer = OneBatchTrainer(detector_cfg("retinanet", **{**SCHEDULE, "OUTPUT_DIR": str(folder), **changed}))
    trainer.max_iter = until
    trainer.resume_or_load(resume=resume)
    groups = trainer.optimizer.param_groups
    run_step, rates = trainer.run_step, []
    trainer.run_step = lambda: (rates.append([group["lr"] for group in groups]), run_step())
    trainer.train()
    return trainer, rates


@pytest.mark.parametrize("kind", ["yaml", "python"])
def test_the_configs_learning_rate_and_weight_decay_hold_after_resuming(tmp_path, monkeypatch, caplog, kind):
    if kind == "python":  # whose schedule is made when the training begins
        multiplier = WarmupParamScheduler(MultiStepParamScheduler([1, 0.1, 0.01], 6, [2, 5]), 0.1, 1 / 3)
        monkeypatch.setattr(YamlRecipe, "build_lr_scheduler", lambda self, optimizer: multiplier)
    _, whole = train(tmp_path / "whole")
    assert len(whole) == 6 and whole[3] != whole[5]
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    for changed in ({}, {"SOLVER.BASE_LR": 1e-4, "SOLVER.WEIGHT_DECAY": 0.01}):
        folder = tmp_path / str(len(changed))
        train(folder, until=3)  # in the middle of the schedule
        caplog.clear()
        with caplog.at_level(logging.INFO, "distill"):
            trainer, rates = train(folder, resume=True, **changed)
        if not changed:
            assert rates == whole[3:]  # to the bit
            assert "goes on as the config says" not in caplog.text
    assert rates == pytest.approx([pytest.approx([rate / 10 for rate in step]) for step in whole[3:]])
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.01}
    assert "learning rate 0.0001, no longer 0.001" in caplog.text
    assert "weight decay 0.01, no longer 0.0001" in caplog.text


def test_what_needs_a_state_that_was_not_kept_stays_as_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))

    def trainer(**settings):
        own = torch.optim.AdamW([weight], lr=0.1, **settings)
        return StepTrainer(torch.nn.Linear(1, 1), [], own, torch.device("cpu"))

    before, after = trainer(), trainer(amsgrad=True, betas=(0.8, 0.99))
    weight.grad = torch.ones(2)
    before.optimizer.step()
    after.load_state_dict(before.state_dict())
    after.optimizer.step()  # which would miss a state
    assert after.optimizer.param_groups[0]["betas"] == (0.8, 0.99)

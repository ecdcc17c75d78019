"""What goes wrong in one process of several, or in the midst of a training, costs as little as it can."""

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from distill.config import auto_scale_workers, check_output_dir, check_solver
from distill.distillers import ImitationDistiller
from distill.engine import Trainer
from distill.engine import launch as launch_module
from distill.engine.checkpoints import last_finite_checkpoint
from distill.engine.launch import ddp_device_ids
from distill.errors import DistillError
from tests.helpers import (
    ROOT,
    detector_cfg,
    distillation_cfg,
    random_batch,
    run_script,
    script_environment,
    set_all,
    write_teacher,
)

WORKER = "tests/engine/failure_worker.py"


def write_cfg(folder, kind="faster_rcnn", **overrides):
    student = detector_cfg(
        kind,
        **{"SOLVER.MAX_ITER": 6, "SOLVER.BASE_LR": 1e-4, "MODEL.RESNETS.NORM": "BN", "OUTPUT_DIR": str(folder / "out")},
    )
    teacher = write_teacher(folder, detector_cfg(kind))
    cfg = distillation_cfg(student, teacher, **{"DISTILL.DISTILLERS": ["ImitationDistiller"], **overrides})
    (folder / "cfg.yaml").write_text(cfg.dump())
    return cfg


def test_processes_agree_on_the_scale_of_gradients(tmp_path):
    result = run_script(WORKER, "overflow", str(tmp_path), timeout=120, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    passes = re.findall(r"rank \d backward passes (\d+)", result.stdout)
    assert len(passes) == 2 and passes[0] == passes[1] and int(passes[0]) >= 4, result.stdout


def test_what_one_process_cannot_read_costs_no_step(tmp_path):
    write_cfg(tmp_path)
    result = run_script(WORKER, "bad_input", str(tmp_path))
    assert result.returncode == 1 and "Cannot read the image 'three.jpg'" in result.stderr
    saved = tmp_path / "out" / (tmp_path / "out" / "last_checkpoint").read_text()
    assert saved.name == "model_0000002.pth"  # three steps were done, and the main process did not fail
    assert not list((tmp_path / "out").glob("*.tmp"))
    resumed = run_script(WORKER, "resume", str(tmp_path), processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "rank 0 starts at 3" in resumed.stdout and "rank 1 starts at 3" in resumed.stdout


def test_processes_that_see_different_checkpoints_are_refused(tmp_path):
    cfg = write_cfg(tmp_path)
    out = tmp_path / "out0"
    out.mkdir()
    (tmp_path / "out1").mkdir()
    model = Trainer.build_model(cfg)
    torch.save({"model": model.state_dict(), "iteration": 2}, out / "model_0000002.pth")
    (out / "last_checkpoint").write_text("model_0000002.pth")
    result = run_script(WORKER, "unshared", str(tmp_path), timeout=300, processes=2)
    assert result.returncode == 1 and "starts at" not in result.stdout
    expected = "--resume finds different checkpoints: process 0: .*model_0000002.pth, process 1: none. .* on a disk"
    assert re.search(expected, result.stderr), result.stderr[-3000:]


def test_weights_that_one_process_cannot_read_end_all_of_them(tmp_path):
    write_cfg(tmp_path)
    result = run_script(WORKER, "unreadable", str(tmp_path), timeout=300, processes=2)
    assert result.returncode == 1 and "starts at" not in result.stdout
    assert result.stderr.count("DistillError: Cannot load '' into the model: No such file") == 2


def test_a_failure_after_the_last_step_costs_no_step(tmp_path):
    class Unreadable(HookBase):
        def after_step(self):
            if self.trainer.iter == self.trainer.max_iter - 1:
                raise DistillError("an unreadable test image")

    trainer = OneBatchTrainer(write_cfg(tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Unreadable()])
    with pytest.raises(DistillError, match="test image"):
        trainer.train()
    resumed = OneBatchTrainer(write_cfg(tmp_path))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 6


def test_no_process_outlives_its_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, WORKER, "sleep", str(tmp_path)],
        cwd=ROOT,
        env=script_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)), 240)
        time.sleep(0.1)  # the files may still be empty
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
        assert all(is_alive(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), 60)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.2)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class OneBatchTrainer(Trainer):
    def build_train_loader(self):
        return [random_batch((64, 96), (64, 96))] * self.cfg.SOLVER.MAX_ITER


class Spoil(HookBase):
    """Makes the weights what a diverged training makes of them."""

    def __init__(self, at, part):
        self.at, self.part = at, part

    def after_step(self):
        if self.trainer.iter == self.at:
            with torch.no_grad():
                for weight in getattr(self.trainer.model.student, self.part).parameters():
                    weight.fill_(math.nan)


@pytest.mark.parametrize(
    "kind, part, more",
    [
        ("faster_rcnn", "proposal_generator", []),
        ("faster_rcnn", "roi_heads", []),
        ("retinanet", "head", ["CrossKDDistiller"]),
        ("fcos", "head", []),
    ],
)
def test_a_diverged_training_says_what_to_do(tmp_path, kind, part, more):
    distillers = {"DISTILL.DISTILLERS": ["ImitationDistiller", *more]}
    cfg = write_cfg(tmp_path, kind, **{"SOLVER.CHECKPOINT_PERIOD": 2}, **distillers)
    trainer = OneBatchTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Spoil(2, part)])
    with pytest.raises(DistillError) as error:
        trainer.train()
    text = str(error.value)
    assert "diverged in iteration 3" in text and "cls'" in text and "Lower SOLVER.BASE_LR (0.0001)" in text
    assert "BALANCE" in text and str(tmp_path / "out" / "model_0000001.pth") in text
    assert not (tmp_path / "out" / "model_0000002.pth").exists()  # its weights are not finite


def test_bad_input_after_a_divergence_leaves_no_checkpoint(tmp_path):
    class Unreadable(HookBase):
        def before_step(self):
            if self.trainer.iter == 2:
                raise DistillError("unreadable")

    trainer = OneBatchTrainer(write_cfg(tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Spoil(1, "roi_heads"), Unreadable()])
    with pytest.raises(DistillError, match="unreadable"):
        trainer.train()
    assert not list((tmp_path / "out").glob("*.pth"))


def test_the_last_finite_checkpoint_is_found(tmp_path):
    for index, value in enumerate((1.0, 2.0, math.nan)):
        path = tmp_path / f"model_{index}.pth"
        torch.save({"model": {"weight": torch.full((3,), value), "count": torch.tensor(1)}}, path)
        os.utime(path, (index, index))
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    shutil.copyfile(tmp_path / "model_0.pth", tmp_path / "previous_model_best.pth")  # the newest, of another run
    assert last_finite_checkpoint(str(tmp_path)) == str(tmp_path / "model_1.pth")
    assert last_finite_checkpoint(str(tmp_path), since=1.5) == ""


def test_what_distill_counts_in_iterations_scales_with_the_schedule():
    cfg = detector_cfg("faster_rcnn", **{"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.IMS_PER_BATCH": 16})
    set_all(
        cfg,
        {
            "SOLVER.MAX_ITER": 5000,
            "DISTILL.ALIGNED.WARMUP_ITERS": 500,
            "DISTILL.GLOBAL.UPDATE_PERIOD": 100,
            "DISTILL.GRADIENT_LOG_PERIOD": 1,
        },
    )
    cfg.DISTILL.VARIANTS.late = type(cfg)({"REVIEW": type(cfg)({"WARMUP_ITERS": 30})})
    cfg.freeze()
    scaled = auto_scale_workers(cfg, 16)
    assert scaled.is_frozen() and (scaled.SOLVER.MAX_ITER, scaled.SOLVER.IMS_PER_BATCH) == (2500, 32)
    node = scaled.DISTILL
    assert (node.ALIGNED.WARMUP_ITERS, node.GLOBAL.UPDATE_PERIOD, node.GRADIENT_LOG_PERIOD) == (250, 50, 1)
    assert node.VARIANTS.late.REVIEW.WARMUP_ITERS == 15 and node.REVIEW.WARMUP_ITERS == 0
    assert node == auto_scale_workers(scaled, 16).DISTILL  # once is enough
    assert cfg.DISTILL.ALIGNED.WARMUP_ITERS == 500


@pytest.mark.parametrize("period, expected", [(0, 0), (1, 1), (5000, 625)])
def test_no_period_scales_to_none(period, expected):
    cfg = detector_cfg("faster_rcnn", **{"SOLVER.REFERENCE_WORLD_SIZE": 1, "TEST.EVAL_PERIOD": period})
    cfg.SOLVER.CHECKPOINT_PERIOD = max(1, period)
    scaled = auto_scale_workers(cfg, 8)
    assert (expected, max(1, expected)) == (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD)


def test_the_trainer_scales_the_model_and_the_schedule_alike(tmp_path, monkeypatch):
    cfg = write_cfg(tmp_path, **{"SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.IMS_PER_BATCH": 4})
    cfg.DISTILL.IMITATION.WARMUP_ITERS = 10
    trainer = OneBatchTrainer(cfg)  # one process instead of two
    assert trainer.cfg.SOLVER.MAX_ITER == 12 and trainer.model.distillers["ImitationDistiller"].warmup_iters == 20


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"IMS_PER_BATCH": 0},
            "SOLVER.IMS_PER_BATCH is 0: expected a number of images above 0 that the 2 .*, such as 2",
        ),
        ({"IMS_PER_BATCH": 3}, "SOLVER.IMS_PER_BATCH is 3: .* 2 processes can share evenly, such as 4"),
        ({"MAX_ITER": -5}, "SOLVER.MAX_ITER is -5: expected a number of iterations above 0"),
        ({"REFERENCE_WORLD_SIZE": -1}, "SOLVER.REFERENCE_WORLD_SIZE is -1: expected the number of GPUs"),
        ({"REFERENCE_WORLD_SIZE": 5}, "SOLVER.IMS_PER_BATCH is 16: .* 5 processes can share evenly, such as 15"),
        ({"BASE_LR": -0.1}, "SOLVER.BASE_LR is -0.1: expected a learning rate"),
        ({"CHECKPOINT_PERIOD": 0}, "SOLVER.CHECKPOINT_PERIOD is 0: expected a number of iterations above 0"),
    ],
)
def test_impossible_numbers_are_named(values, message):
    cfg = detector_cfg("faster_rcnn", **{f"SOLVER.{key}": value for key, value in values.items()})
    with pytest.raises(DistillError, match=message):
        check_solver(cfg, 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DistillError, match="OUTPUT_DIR is .*file/out', which cannot be written: .*Not a directory"):
        check_output_dir(str(tmp_path / "file" / "out"))


def test_ddp_is_told_the_current_gpu_not_the_local_rank(monkeypatch):
    monkeypatch.setattr(comm, "get_local_rank", lambda: 3)  # as where each of four processes sees one GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert ddp_device_ids("cuda") == [0] and ddp_device_ids("cpu") is None


def test_a_model_on_the_cpu_of_a_machine_with_gpus_does_not_start_nccl(monkeypatch):
    import sys as system

    module = system.modules[launch_module.__module__]
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module, "_start_torchrun", lambda processes, args: started.append(processes))
    monkeypatch.setattr(module, "detectron2_launch", lambda *args, **kwargs: started.append("nccl"))
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    launch_module(print, args, "cpu")
    assert started == [2]
    with pytest.raises(DistillError, match="--num-gpus is 2, but this machine has 1"):
        launch_module(print, args, "cuda")


def test_an_evaluation_that_fails_leaves_the_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch, caplog):
    trainer = OneBatchTrainer(write_cfg(tmp_path))

    def fail(model):
        raise KeyError("a file of the evaluator")

    monkeypatch.setattr(trainer.recipe, "evaluate", fail)
    trainer.resume_or_load(resume=False)
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    with pytest.raises(DistillError, match="KeyError: 'a file of the evaluator' What was learned is safe"):
        trainer.train()
    assert Path(__file__).name in caplog.text and "in fail" in caplog.text  # the traceback
    assert torch.load(trainer.checkpointer.get_checkpoint_file())["iteration"] == trainer.max_iter - 1


@pytest.mark.parametrize("when", ["before_train", "before_step", "after_step"])
def test_a_failure_in_the_last_iteration_is_told_before_anything_is_evaluated(tmp_path, when, monkeypatch):
    def fail(hook):
        if when == "before_train" or hook.trainer.iter == hook.trainer.max_iter - 1:
            raise DistillError("unreadable")

    cfg = write_cfg(tmp_path, **{"SOLVER.MAX_ITER": 1})
    monkeypatch.setattr(ImitationDistiller, "build_hooks", lambda *_: [type("Unreadable", (HookBase,), {when: fail})()])
    trainer = OneBatchTrainer(cfg)
    monkeypatch.setattr(trainer.recipe, "evaluate", lambda model: pytest.fail("evaluated"))
    trainer.resume_or_load(resume=False)
    with pytest.raises(DistillError, match="unreadable"):
        trainer.train()


def test_a_finished_training_that_is_resumed_is_evaluated(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "distill")
    evaluated = []
    for done in (1, 2):
        trainer = OneBatchTrainer(write_cfg(tmp_path, **{"SOLVER.MAX_ITER": 1}))
        monkeypatch.setattr(trainer.recipe, "evaluate", lambda model: evaluated.append(1) or {})
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert len(evaluated) == done
        assert ("Nothing is left to train: 1 iterations are done" in caplog.text) == (done == 2)

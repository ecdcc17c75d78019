"""model_best.pth."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase

from distill.engine import Trainer, agreed_checkpoint
from tests.helpers import detector_cfg, random_batch


class ScriptedTrainer(Trainer):
    """Evaluates to what the test says, after every iteration."""

    scripted: list = []

    def build_train_loader(self):
        return [random_batch((64, 64))] * self.cfg.SOLVER.MAX_ITER

    def build_hooks(self):
        self.recipe.evaluate = lambda model: self.scripted[min(self.iter, self.cfg.SOLVER.MAX_ITER - 1)]
        return [*super().build_hooks(), Marker()]


class Marker(HookBase):
    """Writes the number of the iteration into a weight, ahead of its evaluation."""

    def before_step(self):
        with torch.no_grad():
            self.trainer.model.head.bbox_pred.bias.fill_(self.trainer.iter)


def train(folder, monkeypatch, results, resume=False, until=None, **overrides):
    cfg = detector_cfg("retinanet", **{"SOLVER.BASE_LR": 0.0, "TEST.EVAL_PERIOD": 1, **overrides})
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(folder), len(results)
    monkeypatch.setattr(ScriptedTrainer, "scripted", results)
    trainer = ScriptedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def best(folder):
    """The iteration whose weights are kept, and what is said of them."""
    content = torch.load(folder / "model_best.pth", weights_only=True)
    return int(content["model"]["head.bbox_pred.bias"][0].round()), content["best"]


def boxes(*values):
    return [{"bbox": {"AP": value, "AP50": 100 - value}} for value in values]


def test_the_best_is_kept_and_the_last_stays_the_last(tmp_path, monkeypatch):
    trainer = train(tmp_path, monkeypatch, boxes(1, 5, float("nan"), 5, 4))
    iteration, said = best(tmp_path)
    assert iteration == 1 and said == {"metric": "bbox/AP", "value": 5, "iterations": 2}
    assert agreed_checkpoint(trainer.checkpointer).endswith("model_final.pth")


def test_the_last_may_be_the_best(tmp_path, monkeypatch):
    trainer = train(tmp_path, monkeypatch, boxes(1, 2, 3))
    assert best(tmp_path)[0] == 2
    assert agreed_checkpoint(trainer.checkpointer).endswith("model_final.pth")


def test_a_resumed_run_remembers_the_best(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, boxes(1, 7, 2))
    resumed = train(tmp_path, monkeypatch, boxes(1, 7, 2, 6), resume=True)
    assert resumed.start_iter == 3 and best(tmp_path)[0] == 1
    train(tmp_path, monkeypatch, boxes(1, 7, 2, 6, 8), resume=True)
    assert best(tmp_path) == (4, {"metric": "bbox/AP", "value": 8, "iterations": 5})


def test_another_metric_has_a_best_of_its_own(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, boxes(7), **{"TEST.BEST_METRIC": "bbox/AP50"})  # 93
    train(tmp_path, monkeypatch, boxes(7, 9), resume=True)
    assert best(tmp_path) == (1, {"metric": "bbox/AP", "value": 9, "iterations": 2})


def test_a_run_that_begins_anew_has_a_best_of_its_own(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, boxes(1, 7, 2))
    train(tmp_path, monkeypatch, boxes(3, 2))
    assert best(tmp_path)[0] == 0
    assert torch.load(tmp_path / "previous_model_best.pth", weights_only=True)["best"]["value"] == 7
    train(tmp_path, monkeypatch, boxes(float("nan")))
    assert not (tmp_path / "model_best.pth").exists()


def test_a_full_disk_ends_no_training(tmp_path, monkeypatch, caplog):
    save = torch.save

    def refuse(content, file, *args, **more):
        if "model_best.pth" not in str(file):
            return save(content, file, *args, **more)
        Path(file).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    logging.getLogger("distill").addHandler(caplog.handler)
    trainer = train(tmp_path, monkeypatch, boxes(1, 2))
    logging.getLogger("distill").removeHandler(caplog.handler)
    assert "The best checkpoint so far cannot be saved: No space left" in caplog.text
    assert agreed_checkpoint(trainer.checkpointer).endswith("model_final.pth")
    assert not list(tmp_path.glob("model_best*"))
    monkeypatch.undo()
    train(tmp_path, monkeypatch, boxes(1, 2, 3), resume=True)
    monkeypatch.setattr(torch, "save", refuse)
    train(tmp_path, monkeypatch, boxes(1, 2, 3, 4), resume=True)
    assert best(tmp_path) == (2, {"metric": "bbox/AP", "value": 3, "iterations": 3})  # the one before is as it was


def test_resuming_never_goes_on_from_the_best(tmp_path, monkeypatch):
    trainer = train(tmp_path, monkeypatch, boxes(1, 2, 3))
    for name in ("last_checkpoint", "model_final.pth"):
        (tmp_path / name).unlink()
    assert (tmp_path / "model_best.pth").exists() and agreed_checkpoint(trainer.checkpointer) == ""
    assert set(torch.load(tmp_path / "model_best.pth", weights_only=True)) == {"model", "best"}


def test_a_best_that_cannot_be_read(tmp_path, monkeypatch, caplog):
    train(tmp_path, monkeypatch, boxes(9))
    (tmp_path / "model_best.pth").write_bytes(b"half")
    logging.getLogger("distill").addHandler(caplog.handler)
    train(tmp_path, monkeypatch, boxes(9, 3), resume=True)
    logging.getLogger("distill").removeHandler(caplog.handler)
    assert "model_best.pth cannot be read, and is now" in caplog.text and best(tmp_path)[1]["value"] == 3
    assert (tmp_path / "previous_model_best.pth").read_bytes() == b"half"


def test_a_value_of_numpys_is_a_number_in_the_file(tmp_path, monkeypatch):
    """PASCAL VOC's and the semantic evaluator return what weights_only=True does not read."""
    train(tmp_path, monkeypatch, boxes(np.float64(3)))
    assert type(best(tmp_path)[1]["value"]) is float
    train(tmp_path, monkeypatch, boxes(0, np.float64(2)), resume=True)
    assert best(tmp_path)[1] == {"metric": "bbox/AP", "value": 3, "iterations": 1}


@pytest.mark.parametrize(
    "metric, results, expected",
    [
        ("bbox/AP50", boxes(1, 5), (0, "bbox/AP50")),
        ("", [{"segm": {"AP": 2}, "bbox": {"AP": 1}}, {"segm": {"AP": 1}, "bbox": {"AP": 2}}], (1, "bbox/AP")),
        ("segm/AP", [{"segm": {"AP": 2}, "bbox": {"AP": 1}}, {"segm": {"AP": 1}, "bbox": {"AP": 2}}], (0, "segm/AP")),
        ("", [{"sem_seg": {"mIoU": 2}}, {"sem_seg": {"mIoU": 1}}], (0, "sem_seg/mIoU")),
        ("", [{"a": {"bbox": {"AP": 2}}, "b": {"bbox": {"AP": 1}}}, {"a": {"bbox": {"AP": 1}}}], (0, "a/bbox/AP")),
        ("b/bbox/AP", [{n: {"bbox": {"AP": v}} for n, v in x} for x in ((("a", 2), ("b", 1)), (("a", 1), ("b", 2)))],
         (1, "b/bbox/AP")),
    ],
)  # fmt: skip
def test_what_it_is_the_best_in(tmp_path, monkeypatch, metric, results, expected):
    train(tmp_path, monkeypatch, results, **{"TEST.BEST_METRIC": metric})
    iteration, said = best(tmp_path)
    assert (iteration, said["metric"]) == expected


def test_a_metric_that_no_evaluation_gives_is_one_warning(tmp_path, monkeypatch, caplog):
    logging.getLogger("distill").addHandler(caplog.handler)
    train(tmp_path, monkeypatch, boxes(1, 2), **{"TEST.BEST_METRIC": "bbox/mAP"})
    train(tmp_path / "none", monkeypatch, [{}, {}])
    logging.getLogger("distill").removeHandler(caplog.handler)
    records = {id(x) for x in caplog.records if "No best checkpoint is kept" in x.getMessage()}
    assert len(records) == 1
    assert "TEST.BEST_METRIC is 'bbox/mAP', which the evaluation does not give. Choose one of bbox/AP, " in caplog.text
    assert not (tmp_path / "model_best.pth").exists() and not (tmp_path / "none" / "model_best.pth").exists()

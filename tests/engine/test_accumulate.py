"""A step of several batches is a step of the one large batch."""

import json

import pytest
import torch
from detectron2.utils.events import EventStorage

from distill.config import check_solver
from distill.engine import Trainer
from distill.engine.steps import StepTrainer
from distill.errors import DistillError
from tests.engine.test_distributed import ALL_PROPOSALS
from tests.helpers import detector_cfg, distillation_cfg, random_batch, write_teacher

BATCHES = 3


class StoredTrainer(Trainer):
    """Trains on a stored batch, as a whole or image by image."""

    images: list = []

    def build_train_loader(self):
        n = len(self.images) // self.cfg.SOLVER.ACCUMULATE
        return [self.images[i : i + n] for i in range(0, len(self.images), n)] * self.cfg.SOLVER.MAX_ITER


def train(cfg, folder, accumulate):
    cfg.SOLVER.ACCUMULATE, cfg.OUTPUT_DIR = accumulate, str(folder)
    torch.manual_seed(0)
    trainer = StoredTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    log = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return before, trainer, log


def config(tmp_path, *names, **settings):
    return distillation_cfg(
        detector_cfg("faster_rcnn", **{**ALL_PROPOSALS, **settings}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{
            "DISTILL.DISTILLERS": [f"{name}Distiller" for name in names],
            "DISTILL.REVIEW.NORM": "",  # GN divides by deviations of two cells, which are all rounding
            "DISTILL.REVIEW.MID_CHANNELS": 32,
        },
    )


@pytest.mark.parametrize(
    "precision, bound, names",
    [
        ("float32", 1e-5, ["Review", "Imitation"]),
        ("float32", 1e-4, ["FGD", "CWD"]),  # whose softmax rounds more
        ("bfloat16", 2e-2, ["Review", "Imitation"]),
    ],
)
def test_equals_the_large_batch(tmp_path, monkeypatch, precision, bound, names):
    amp = {"SOLVER.AMP.ENABLED": precision == "bfloat16"}
    # of distillers that divide by numbers of images and cells, not of objects that a batch happens to have
    cfg = config(tmp_path, *names, **amp, **{"SOLVER.MAX_ITER": 1})
    differences = []
    for draw in range(3):
        monkeypatch.setattr(StoredTrainer, "images", random_batch(*[(64, 96)] * BATCHES))
        runs = [train(cfg, tmp_path / f"{draw}_{n}", n) for n in (1, BATCHES)]
        logs = [log[0] for _, _, log in runs]
        losses = [key for key in logs[0] if "loss" in key and "/" not in key]
        assert "total_loss" in losses and len(losses) > 6
        for key in losses:
            assert logs[1][key] == pytest.approx(logs[0][key], rel=bound, abs=bound), key
        updates = []
        for before, trainer, _ in runs:
            weights = {k: v for k, v in trainer.model.state_dict().items() if "gradient_ratio" not in k and v.dim()}
            updates.append(torch.cat([(weights[key] - before[key]).flatten() for key in weights]))
        assert updates[0].norm() > 0
        differences.append(((updates[1] - updates[0]).norm() / updates[0].norm()).item())
        # now and then a ReLU's input rounds to the other side of zero, and its gradient is another: draw again
        if differences[-1] <= bound:
            return
    raise AssertionError(f"differs by {differences} in three draws, at most {bound} is rounding")


def test_ramps_logs_and_measurements_count_steps(tmp_path, monkeypatch):
    settings = {"SOLVER.MAX_ITER": 4, "SOLVER.BASE_LR": 0.0}
    cfg = config(tmp_path, "Review", "Imitation", **settings)
    cfg.DISTILL.REVIEW.WARMUP_ITERS, cfg.DISTILL.IMITATION.DECAY, cfg.DISTILL.GRADIENT_LOG_PERIOD = 8, 1.0, 1
    monkeypatch.setattr(StoredTrainer, "images", random_batch((64, 96), (64, 96)))
    _, trainer, log = train(cfg, tmp_path / "out", 2)
    assert [line["iteration"] for line in log] == [3]
    assert (log[0]["weight/loss_review"], log[0]["weight/loss_imitation"]) == (3 / 8, 1 / 4)
    assert {int(distiller.num_measurements) for distiller in trainer.model.distillers.values()} == {4}


class Counter(torch.nn.Module):
    """Two losses of a number, and the batches that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.seen = []

    def forward(self, batch):
        self.seen.append(batch)
        return {"loss_a": self.weight[0] * batch, "loss_b": self.weight[1].square() + self.weight[1] * batch**2}


def test_the_mean_gradient_of_so_many_batches_makes_a_step(monkeypatch):
    model, logged = Counter(), []
    batches = torch.rand(6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    trainer = StepTrainer(model, batches, optimizer, torch.device("cpu"), accumulate=3)
    monkeypatch.setattr(trainer, "_write_metrics", lambda losses, data_time: logged.append((losses, data_time)))
    weight = torch.zeros(2, dtype=torch.float64)
    for part in (batches[:3], batches[3:]):
        expected = {"loss_a": weight[0] * part.mean(), "loss_b": weight[1] ** 2 + weight[1] * part.square().mean()}
        gradient = torch.stack([part.mean(), 2 * weight[1] + part.square().mean()])
        trainer.run_step()
        weight = weight - gradient
        torch.testing.assert_close(model.weight.detach(), weight)
        torch.testing.assert_close(logged[-1][0], expected)
        assert not any(x.requires_grad for x in logged[-1][0].values()) and logged[-1][1] >= 0
    assert len(model.seen) == 6


def test_a_model_may_return_one_loss():
    model = torch.nn.Linear(1, 1, bias=False)
    trainer = StepTrainer(model, [torch.ones(1)], torch.optim.SGD(model.parameters(), 1.0), torch.device("cpu"))
    before = model.weight.item()
    with EventStorage() as storage:
        trainer.run_step()
        assert storage.latest()["total_loss"][0] == pytest.approx(before)
    assert model.weight.item() == pytest.approx(before - 1)


def test_a_number_below_one_is_refused():
    cfg = detector_cfg("fcos", **{"SOLVER.ACCUMULATE": 0})
    with pytest.raises(DistillError, match="SOLVER.ACCUMULATE is 0: expected the number of batches that make a step"):
        check_solver(cfg, 1)

"""What a training step of each row costs: the rows' trainings step by step in turns, in one process."""

import logging
import statistics
import time

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from distill.data import register_from_config
from distill.engine import Trainer

logger = logging.getLogger("detectron2.evidence")

WARMUP = 3


class _Steps:
    """A training that is taken one step at a time, with the distillers' hooks and without those that write."""

    def __init__(self, cfg: CfgNode) -> None:
        register_from_config(cfg)
        self.trainer = Trainer(cfg)
        self.trainer.resume_or_load(resume=False)
        own = [hook for hook in self.trainer._hooks if type(hook).__module__.startswith("distill")]
        self.trainer._hooks = own
        self.trainer.iter = self.trainer.start_iter = 0
        self.trainer.model.train()
        with EventStorage(0) as self.trainer.storage:
            self.trainer.before_train()

    def __call__(self) -> None:
        trainer = self.trainer
        with trainer.storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            trainer.storage.step()
        trainer.iter += 1


def with_own_names(cfg: CfgNode, owner: str) -> None:
    """Renames the datasets that a config registers, for another may give one of their names to other data.

    Args:
        cfg: is changed.
        owner: what the names begin with from now on.
    """
    names = {entry.partition("=")[0] for entry in cfg.DATASETS.REGISTER}
    cfg.DATASETS.REGISTER = [f"{owner}/{entry}" for entry in cfg.DATASETS.REGISTER]
    for key in ("TRAIN", "TEST"):
        cfg.DATASETS[key] = [f"{owner}/{name}" if name in names else name for name in cfg.DATASETS[key]]


def measure(configs: dict[str, CfgNode], baselines: dict[str, str], rounds: int) -> dict[str, dict]:
    """Times the steps.

    Args:
        configs: the config of each row; the names of their datasets are changed.
        baselines: by row, the one that it is compared with, or itself.
        rounds: how many steps of each count, after a few that do not.

    Returns:
        By row, ``ms`` (median) and ``ratio`` (median over the rounds of its time divided by its baseline's).
    """
    for name, cfg in configs.items():
        with_own_names(cfg, name)
    steps = {name: _Steps(cfg) for name, cfg in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = logged = time.perf_counter()
    for index in range(rounds + WARMUP):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= WARMUP:
                times[name].append((time.perf_counter() - begin) * 1e3)
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            left = (logged - started) / (index + 1) * (rounds + WARMUP - 1 - index)
            logger.info(f"round {index + 1} of {rounds + WARMUP}, {left:.0f} s left")
    return {
        name: {
            "ms": round(statistics.median(values), 1),
            "ratio": round(statistics.median(own / base for own, base in zip(values, times[baselines[name]])), 3),
        }
        for name, values in times.items()
    }

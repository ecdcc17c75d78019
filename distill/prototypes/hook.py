"""Searches the prototypes before training, and again while the student changes."""

import logging
import time
from collections.abc import Mapping, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from ..modeling.distillation_model import DistillationModel
from .bank import PrototypeBank
from .collect import InstanceCollector, training_images
from .select import select_prototypes

logger = logging.getLogger(__name__)


class PrototypeHook(HookBase):
    """Searches the prototypes before the first step and every so many iterations.

    Every process collects its share of the instances; the picks are made in the main process and sent to all. A run
    that is resumed has its prototypes from the checkpoint.

    Args:
        model: student and teacher.
        bank: where to put the prototypes.
        period: iterations from one search to the next; 0 for an epoch.
        max_images: how many images a class may have.
        min_box_size: the shorter side that a box must have, in pixels of the image as the detectors see it.
        selection: arguments of :func:`select_prototypes`.
    """

    def __init__(
        self,
        model: DistillationModel,
        bank: PrototypeBank,
        period: int,
        max_images: int,
        min_box_size: float,
        selection: Mapping[str, float],
    ) -> None:
        self._model = model
        self._bank = bank
        self._period = period
        self._max_images = max_images
        self._min_box_size = min_box_size
        self._selection = dict(selection)
        self._collector: InstanceCollector | None = None

    def before_train(self) -> None:
        cfg = self.trainer.cfg
        if not self._period:
            self._period = max(1, len(training_images(cfg)) // cfg.SOLVER.IMS_PER_BATCH)
        if not self._bank.searches:
            self.search()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done < self.trainer.max_iter:
            self.search()

    def search(self) -> None:
        """Collects the instances and replaces the prototypes."""
        started = time.perf_counter()
        levels = list(self._bank.levels)
        if self._collector is None:
            cfg = self.trainer.cfg
            self._collector = InstanceCollector(cfg, levels, self._max_images, self._min_box_size)
        shares = comm.gather(self._collector.collect(self._model), dst=0)
        found = None
        if comm.is_main_process():
            shares = [share for share in shares if share]
            instances = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
            found = find_prototypes(instances, levels, self._bank.num_classes, self._selection, self._model.device)
        found = comm.all_gather(found)[0]
        self._bank.replace(found)
        if comm.is_main_process():
            counts = {level: len(found[level]["labels"]) for level in levels}
            known = {label for level in levels for label in found[level]["labels"].tolist()}
            logger.info(
                f"Prototypes: {sum(counts.values())} ({', '.join(f'{k}: {v}' for k, v in counts.items())}) of "
                f"{len(known)} classes, picked among {len(instances['labels'])} instances, in "
                f"{time.perf_counter() - started:.1f} s"
            )
            if not known:
                logger.warning(
                    f"No class has a prototype, so nothing global is learned: no box has a shorter side of at least "
                    f"DISTILL.GLOBAL.MIN_BOX_SIZE ({self._min_box_size} pixels), or there are too few of them."
                )


def find_prototypes(
    instances: Mapping[str, Tensor],
    levels: Sequence[str],
    num_classes: int,
    selection: Mapping[str, float],
    device: torch.device,
) -> dict[str, dict[str, Tensor]]:
    """Picks the prototypes of each class at each level.

    Args:
        instances: what :meth:`InstanceCollector.collect` returns.
        levels: names of the levels.
        num_classes: number of classes.
        selection: arguments of :func:`select_prototypes`.
        device: where to compute.

    Returns:
        For each level the buffers of :class:`LevelPrototypes`, with as many rows as there are prototypes, class by
        class in the order of the picks.
    """
    found = {}
    for level in levels:
        picks = []
        for label in range(num_classes):
            rows = (instances["labels"] == label).nonzero()[:, 0]
            sides = (instances[f"{side}.{level}"][rows].to(device) for side in ("student", "teacher"))
            picks.append(rows[select_prototypes(*sides, **selection).cpu()])
        picks = torch.cat(picks)
        found[level] = {
            "student": instances[f"student.{level}"][picks],
            "teacher": instances[f"teacher.{level}"][picks],
            **{name: instances[name][picks] for name in ("labels", "images", "boxes")},
        }
    return found

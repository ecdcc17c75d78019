"""Searches the prototypes before training, and again while the student changes."""

import logging
import time
from collections.abc import Mapping, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from ..errors import DistillError
from ..modeling.distillation_model import DistillationModel
from .bank import PrototypeBank
from .collect import InstanceCollector
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
        min_box_size: what the shorter side of a box must exceed, in pixels of the image file.
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
        recipe = getattr(self.trainer, "recipe", None)
        if recipe is None:
            raise DistillError(
                f"A {type(self.trainer).__name__} has no recipe, by which prototypes read the training images: set "
                "trainer.recipe = distill.recipes.as_recipe(cfg), or use distill.engine.Trainer."
            )
        self._collector = InstanceCollector(recipe, list(self._bank.levels), self._max_images, self._min_box_size)
        if not self._period:
            images = recipe.cfg.SOLVER.IMS_PER_BATCH * recipe.cfg.SOLVER.ACCUMULATE
            self._period = max(1, self._collector.num_training_images // images)
        if self._bank.is_empty:
            self.search()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done < self.trainer.max_iter:
            self.search()

    def search(self) -> None:
        """Collects the instances and replaces the prototypes."""
        started = time.perf_counter()
        collected = self._collector.collect(self._model)
        common = _gather(collected, ("labels", "images", "boxes"))
        found = {}
        for level in self._bank.levels:  # one after the other, since all of them may be too much for one process
            instances = _gather(collected, (f"student.{level}", f"teacher.{level}"))
            if comm.is_main_process():
                found[level] = find_prototypes(
                    {**common, **instances}, level, self._bank.num_classes, self._selection, self._model.device
                )
        found = comm.all_gather(found)[0]
        self._bank.replace(found)
        if comm.is_main_process():
            self._report(found, len(common.get("labels", ())), time.perf_counter() - started)

    def _report(self, found: Mapping[str, Mapping[str, Tensor]], num_instances: int, seconds: float) -> None:
        counts = {level: len(own["labels"]) for level, own in found.items()}
        known = {label for own in found.values() for label in own["labels"].tolist()}
        logger.info(
            f"Prototypes: {sum(counts.values())} ({', '.join(f'{k}: {v}' for k, v in counts.items())}) of {len(known)} "
            f"of {self._bank.num_classes} classes, picked among {num_instances} instances, in {seconds:.1f} s"
        )
        if not known:
            logger.warning(
                f"No class has a prototype, so nothing global is learned: no box has a shorter side of more than "
                f"DISTILL.GLOBAL.MIN_BOX_SIZE ({self._min_box_size} pixels of its file), or each class has fewer "
                "than four."
            )


def _gather(collected: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """In the main process, the rows of all processes; elsewhere, or where no process has any, nothing."""
    shares = comm.gather({name: collected[name] for name in names if name in collected}, dst=0)
    shares = [share for share in shares if share]
    return {name: torch.cat([share[name] for share in shares]) for name in names} if shares else {}


def find_prototypes(
    instances: Mapping[str, Tensor],
    level: str,
    num_classes: int,
    selection: Mapping[str, float],
    device: torch.device,
) -> dict[str, Tensor]:
    """Picks the prototypes of each class at a level.

    Args:
        instances: what :meth:`InstanceCollector.collect` returns.
        level: the name of the level.
        num_classes: number of classes.
        selection: arguments of :func:`select_prototypes`.
        device: where to compute.

    Returns:
        The buffers of :class:`LevelPrototypes`, with as many rows as there are prototypes, class by class in the order
        of the picks.

    Raises:
        DistillError: a feature is not finite.
    """
    if not instances:
        return {"labels": torch.zeros(0, dtype=torch.int64)}
    picks = []
    for label in range(num_classes):
        rows = (instances["labels"] == label).nonzero()[:, 0]
        sides = (instances[f"{side}.{level}"][rows].to(device) for side in ("student", "teacher"))
        try:
            picks.append(rows[select_prototypes(*sides, **selection).cpu()])
        except ValueError as error:
            raise DistillError(f"Cannot find prototypes of class {label} at {level}: {error}") from error
    picks = torch.cat(picks)
    return {
        "student": instances[f"student.{level}"][picks],
        "teacher": instances[f"teacher.{level}"][picks],
        **{name: instances[name][picks] for name in ("labels", "images", "boxes")},
    }

"""Hooks of the trainer, one job each."""

import logging
import math
import os
from typing import Any

import torch
from detectron2.engine import HookBase
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..errors import DistillError

logger = logging.getLogger(__name__)

# what the best checkpoint is the best in, the first that is evaluated
METRICS = ("bbox/AP", "segm/AP", "panoptic_seg/PQ", "sem_seg/mIoU")


class BestCheckpoint(HookBase):
    """Keeps the checkpoint that does best on the test sets, ``model_best.pth``, beside the periodic ones.

    Detectron2's ``BestCheckpointer`` forgets the best when a run is resumed, which then goes on from the best, not
    from the last. Belongs behind ``EvalHook``, in the main process.

    Args:
        checkpointer: of the run.
        metric: what is to be high, such as "segm/AP" or, of several test sets, "NAME/segm/AP"; empty for the first of
            :data:`METRICS` that is evaluated, of the first test set.
    """

    name = "model_best"

    def __init__(self, checkpointer: Checkpointer, metric: str = "") -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._best: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """Of the checkpoint, which holds under "best" the metric, its value and the number of iterations."""
        return os.path.join(self._checkpointer.save_dir, f"{self.name}.pth")

    def before_train(self) -> None:
        if not self.trainer.start_iter or not os.path.isfile(self.path):
            return
        try:
            self._best = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True).get("best", {})
        except Exception as error:  # one that was killed while it wrote leaves half a file
            logger.warning(f"{self.path} cannot be read and will be replaced: {type(error).__name__}: {error}")

    def after_step(self) -> None:
        self._update(self.trainer.iter + 1)

    def after_train(self) -> None:
        self._update(self.trainer.iter)
        if self._metric and not self._best:
            found = [key for key in self._fresh_scalars() if "/" in key]
            logger.warning(
                f"No best checkpoint was kept: TEST.BEST_METRIC is {self._metric!r}, which no evaluation gave. Choose "
                f"one of {', '.join(found) or 'those that it gives'}."
            )

    def _fresh_scalars(self) -> dict[str, float]:
        storage = self.trainer.storage
        return {key: value for key, (value, at) in storage.latest().items() if at == storage.iter}

    def _update(self, done: int) -> None:
        fresh = self._fresh_scalars()
        wanted = (self._metric,) if self._metric else METRICS
        metric = next((k for name in wanted for k in fresh if k == name or k.endswith(f"/{name}")), None)
        if metric is None:  # nothing was evaluated in this step
            return
        value = fresh[metric]
        before = self._best.get("value", -math.inf) if self._best.get("metric") == metric else -math.inf
        if not value > before:  # NaN is not
            return
        self._best = {"metric": metric, "value": value, "iterations": done}
        last = self._checkpointer.get_checkpoint_file() if self._checkpointer.has_checkpoint() else ""
        self._checkpointer.save(self.name, best=self._best)
        if last:  # what --resume goes on from stays the last
            self._checkpointer.tag_last_checkpoint(os.path.basename(last))
        logger.info(f"{self.path} is the best so far, with {metric} {value:.2f} after {done} iterations")


class CheckGradients(HookBase):
    """After the first step, refuses distillers with weights that got no gradient.

    Such a weight would stay random for the whole training, and with several processes DistributedDataParallel would
    end the second step with an error that does not name it.

    Args:
        distillers: by name.
    """

    def __init__(self, distillers: nn.ModuleDict) -> None:
        self._distillers = distillers

    def after_step(self) -> None:
        """
        Raises:
            DistillError: some weight got no gradient.
        """
        if self.trainer.iter > self.trainer.start_iter:
            return
        for name, distiller in self._distillers.items():
            idle = [key for key, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
            if idle:
                raise DistillError(
                    f"{len(idle)} weights of {name} got no gradient in the first step, so they do not train: "
                    f"{', '.join(idle[:5])}. Use them in every forward, build none for what is not compared, or freeze "
                    "them by requires_grad_(False)."
                )


class DrawDenseDetections(HookBase):
    """Draws what a dense detector finds in the images that it trains on, every VIS_PERIOD iterations.

    Detectron2 draws R-CNN's proposals in their forward pass; since v0.6 it has the drawing of RetinaNet and FCOS, but
    calls it nowhere.

    Args:
        detector: with ``visualize_training``.
        period: in iterations.
    """

    def __init__(self, detector: nn.Module, period: int) -> None:
        self._detector = detector
        self._period = period

    def before_train(self) -> None:
        self._handle = self._detector.register_forward_hook(self._draw)

    def after_train(self) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _draw(self, detector: nn.Module, args: tuple, output: Any) -> None:
        if not detector.training or self.trainer.iter % self._period:
            return
        detector.eval()
        try:
            # without the size of the file, so that boxes are in pixels of the image as it is given
            found = detector([{"image": x["image"]} for x in args[0]])
        finally:
            detector.train()
        detector.visualize_training(args[0], [x["instances"] for x in found])

"""Hooks of the trainer, one job each."""

import logging
import math
import os
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from ..errors import DistillError
from ..modeling import DistillationModel
from .checkpoints import PREVIOUS_BEST, write_file

logger = logging.getLogger(__name__)

# what the best checkpoint is the best in, the first that is evaluated
METRICS = ("bbox/AP", "segm/AP", "panoptic_seg/PQ", "sem_seg/mIoU")


class BestCheckpoint(HookBase):
    """Keeps the weights that do best on the test sets, ``model_best.pth``, beside the periodic checkpoints.

    Detectron2's ``BestCheckpointer`` forgets the best when a run is resumed, which then goes on from the best, not
    from the last. Belongs behind ``EvalHook``, in the main process.

    Args:
        checkpointer: of the run.
        metric: what is to be high, such as "segm/AP" or, of several test sets, "NAME/segm/AP"; empty for the first of
            :data:`METRICS` that is evaluated, of the first test set.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str = "") -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._best: dict[str, Any] = {}
        self._seen: dict | None = None
        self._has_warned = False

    @property
    def path(self) -> str:
        """Of the file, which holds under "best" the metric, its value and the number of iterations."""
        return os.path.join(self._checkpointer.save_dir, "model_best.pth")

    def before_train(self) -> None:
        if not os.path.isfile(self.path):
            return
        previous = os.path.join(self._checkpointer.save_dir, PREVIOUS_BEST)
        if not self.trainer.start_iter:  # or --resume would take another training's best for this one's
            os.replace(self.path, previous)
            logger.info(f"The best of an earlier training is now {previous}")
            return
        try:
            self._best = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True).get("best", {})
        except Exception as error:
            os.replace(self.path, previous)
            logger.warning(f"{self.path} cannot be read, and is now {previous}: {type(error).__name__}: {error}")

    def after_step(self) -> None:
        self._update(self.trainer.iter + 1)

    def after_train(self) -> None:
        self._update(min(self.trainer.iter, self.trainer.max_iter))

    def _update(self, done: int) -> None:
        if self.trainer.results is self._seen:  # nothing was evaluated since
            return
        self._seen = self.trainer.results
        found = flatten_results_dict(self._seen or {})
        wanted = (self._metric,) if self._metric else METRICS
        metric = next((k for name in wanted for k in found if k == name or k.endswith(f"/{name}")), None)
        if metric is None:
            if self._metric and found and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    f"No best checkpoint is kept: TEST.BEST_METRIC is {self._metric!r}, which the evaluation does not "
                    f"give. Choose one of {', '.join(found)}."
                )
            return
        value = float(found[metric])  # numpy's, of some evaluators, is nothing that weights_only=True reads
        before = self._best.get("value", -math.inf) if self._best.get("metric") == metric else -math.inf
        if not value > before:  # NaN is not
            return
        best = {"metric": metric, "value": value, "iterations": done}
        try:
            write_file(self.path, {"model": self._checkpointer.model.state_dict(), "best": best})
        except (OSError, RuntimeError) as error:  # a full disk ends no training for a file beside
            logger.error(f"The best checkpoint so far cannot be saved: {error}")
            return
        self._best = best
        logger.info(f"{self.path} is the best so far, with {metric} {value:.2f} after {done} iterations")


class Evaluate(hooks.EvalHook):
    """Detectron2's, which also evaluates a training that fails in its last iteration, before it tells the failure, and
    of several processes only those that failed: not this one."""

    _reached = -1  # also where another hook fails before the training

    def after_step(self) -> None:
        self._reached = self.trainer.iter
        super().after_step()

    def after_train(self) -> None:
        if self.trainer.start_iter >= self.trainer.max_iter or self._reached == self.trainer.max_iter - 1:
            super().after_train()


class StudentAlone(nn.Module):
    """A distilled student without its teacher and distillers, as Detectron2's ``PreciseBN`` hook is to run it.

    Args:
        model: of the run.
    """

    def __init__(self, model: DistillationModel) -> None:
        super().__init__()
        self.student = model.student
        self._forward = model.forward_student

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """See :meth:`DistillationModel.forward_student`."""
        return self._forward(batched_inputs)


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
        self._drawn_at = -1
        self._handle = self._detector.register_forward_hook(self._draw)

    def after_train(self) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _draw(self, detector: nn.Module, args: tuple, output: Any) -> None:
        due = self.trainer.iter % self._period == 0 and self.trainer.iter != self._drawn_at
        if not detector.training or not due:  # a step may have several batches
            return
        self._drawn_at = self.trainer.iter
        detector.eval()
        try:
            # without the size of the file, so that boxes are in pixels of the image as it is given
            found = detector([{"image": x["image"]} for x in args[0]])
        finally:
            detector.train()
        # Detectron2's Visualizer takes annotations from the CPU alone
        drawn = [{**x, "instances": x["instances"].to("cpu")} for x in args[0]]
        detector.visualize_training(drawn, [x["instances"] for x in found])


class DropPictures(HookBase):
    """Drops what is drawn in a process that writes nothing: Detectron2 has every process draw, and keeps the pictures
    until they are written."""

    def after_step(self) -> None:
        self.trainer.storage.clear_images()

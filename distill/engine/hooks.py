"""Hooks of the trainer, one job each."""

from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn

from ..errors import DistillError


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

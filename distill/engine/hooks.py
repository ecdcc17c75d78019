"""Hooks of the trainer, one job each."""

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

"""One step of the optimizer, in any precision and over one batch or several."""

import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

logger = logging.getLogger(__name__)


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, on any device, with gradients over several batches.

    Args:
        model: what is trained.
        data_loader: batches in Detectron2's format.
        optimizer: of the model.
        device: of the model.
        dtype: what is computed in under autocast; None for no autocast.
        accumulate: number of batches whose mean gradient makes a step. Iterations count steps.
        other_dtype: what parts of the model compute in that have a precision of their own. Gradients are scaled where
            it or ``dtype`` is float16, in which small ones would become zero.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: Optimizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
        other_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device, self.dtype, self.accumulate = device, dtype, accumulate
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=torch.float16 in (dtype, other_dtype))

    def run_step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        data_time, mean_losses = 0.0, {}
        for left in reversed(range(self.accumulate)):
            started = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - started
            for key, loss in self._backward(data, is_last=left == 0).items():
                mean_losses[key] = mean_losses.get(key, 0.0) + loss.detach() / self.accumulate
        self._write_metrics(mean_losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, data: list[dict], is_last: bool) -> dict[str, Tensor]:
        """Adds the gradient of a batch; between processes it is exchanged once a step, after the last."""
        waits = isinstance(self.model, DistributedDataParallel) and not is_last
        with self.model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                losses = self.model(data)
                if isinstance(losses, Tensor):  # as SimpleTrainer has it
                    losses = {"total_loss": losses}
                total = sum(losses.values())
            self.grad_scaler.scale(total / self.accumulate).backward()
        return losses

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's trainer of the same precision has it."""
        if self.dtype is None and not self.grad_scaler.is_enabled():
            return super().state_dict()
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, also that of a training in another precision. The optimizer keeps its
        settings, such as the learning rate before the schedule: the config may have changed since.

        Args:
            state_dict: what it returned.

        Raises:
            ValueError: it is of another optimizer, which torch would find out in the next step only.
        """
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        groups = self.optimizer.param_groups
        lacking = own[0].keys() - groups[0].keys()  # torch fills in what its earlier releases did not have
        if lacking:
            raise ValueError(f"the optimizer's state is another optimizer's: it lacks {', '.join(sorted(lacking))}.")
        changes = {}
        for group, settings in zip(groups, own):
            changes.update(_go_on_with(settings, group))
        if changes:
            texts = [f"{key.replace('_', ' ')} {now}, no longer {before}" for key, (before, now) in changes.items()]
            logger.info(f"The optimizer goes on as the config says now: {'; '.join(texts)}")
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _go_on_with(settings: dict[str, Any], group: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Gives a group of an optimizer, as a checkpoint brought it back, the settings of today's config.

    Args:
        settings: of today. Their learning rate is that before the schedule, which has come further since.
        group: is changed.

    Returns:
        By name, what it was and what it is now, of what changed.
    """
    before, now = (x.get("initial_lr", x["lr"]) for x in (group, settings))
    # the last two need a state of the optimizer's that another one did not keep
    kept = ("lr", "initial_lr", "amsgrad", "capturable")
    settings = {key: value for key, value in settings.items() if key not in kept}
    changes = {key: (group.get(key), value) for key, value in settings.items() if group.get(key) != value}
    group.update(settings)
    if before != now:
        changes["learning_rate"] = (before, now)
        group["lr"] = group["lr"] * now / before if before else now
        group["initial_lr"] = now
    return changes

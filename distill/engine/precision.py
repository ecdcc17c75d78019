"""Mixed precision, on CUDA and on the CPU."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.optim import Optimizer


class MixedPrecisionTrainer(SimpleTrainer):
    """Detectron2's ``AMPTrainer``, on any device and in either type; gradients are scaled in float16 only.

    Args:
        model: what is trained.
        data_loader: batches in Detectron2's format.
        optimizer: of the model.
        device: of the model.
        dtype: what is computed in under autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: Optimizer,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device, self.dtype = device, dtype
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """One training step."""
        started = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - started
        with torch.autocast(self.device.type, self.dtype):
            losses = self.model(data)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """As ``AMPTrainer`` has it."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, also that of a training in another precision."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

"""Mixed precision, on CUDA and on the CPU."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DistillError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What a training computes in under autocast.

    Args:
        cfg: the full config, of which SOLVER.AMP and MODEL.DEVICE are used.

    Returns:
        The type; None without mixed precision.

    Raises:
        DistillError: SOLVER.AMP.PRECISION is unknown, or is float16 on the CPU.
    """
    node, on_cpu = cfg.SOLVER.AMP, torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if node.PRECISION not in ("auto", *_DTYPES) or (node.ENABLED and on_cpu and node.PRECISION == "float16"):
        expected = "'auto' or 'bfloat16' on the CPU" if on_cpu else "'auto', 'float16' or 'bfloat16'"
        raise DistillError(f"SOLVER.AMP.PRECISION is {node.PRECISION!r}: expected {expected}.")
    if not node.ENABLED:
        return None
    return _DTYPES.get(node.PRECISION, torch.bfloat16 if on_cpu else torch.float16)


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


def keep_coordinates(detector: nn.Module) -> None:
    """Has what a detector computes boxes and losses from leave its networks in float32.

    Detectron2 rounds boxes to the type of the features before it pools them. In float16 that costs half a pixel at
    1000; in bfloat16, which has 8 bits, 4 pixels.

    Args:
        detector: any of Detectron2's; its backbone, RPN head, box predictors and dense head get a forward hook.
    """
    heads = getattr(detector, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    parts = [
        detector.backbone,
        getattr(detector, "head", None),
        getattr(getattr(detector, "proposal_generator", None), "rpn_head", None),
        *(predictor if isinstance(predictor, (nn.ModuleList, list)) else [predictor]),
    ]
    for part in parts:
        if part is not None:
            part.register_forward_hook(lambda module, args, output: _as_float(output), prepend=True)


def _as_float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return {key: _as_float(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)(_as_float(value) for value in output)
    return output

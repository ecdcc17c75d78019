"""How much each distiller's losses weigh in a step: its own weight, the ramps, and the balance of gradients."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import DistillError

logger = logging.getLogger(__name__)

_MOMENTUM = 0.9
_HIGH_RATIO = 3.0
_PATIENCE = 5  # measurements in a row


class LossWeights:
    """Weighs the distillers' losses, and measures their gradients beside the detection losses'.

    Every ``period`` iterations the gradient of each distiller's unweighted losses at the student's features is
    measured (one backward pass from the losses down to the features for each distiller and one for the detection
    losses, none through the backbone). With ``balance`` b, a distiller's losses are scaled by b / r, r being the
    running geometric mean of |distiller's gradient| / |detection losses' gradient|, over the images of all processes.
    It is kept in the distiller's ``gradient_ratio``, and so in the checkpoint. To Detectron2's event storage go
    ``weight/LOSS`` of each loss and ``gradient_ratio/NAME`` of each distiller, the latter times the weight that is
    applied (of several, the largest).

    Args:
        distillers: by name.
        max_iter: number of iterations of the training, for the ramps.
        period: how often gradients are measured, in iterations; 0 for never.
        balance: b; 0 for no scaling.

    Raises:
        DistillError: a number is out of range, or there is a balance but nothing is to be measured.
    """

    def __init__(self, distillers: nn.ModuleDict, max_iter: int = 1, period: int = 0, balance: float = 0.0) -> None:
        for key, value in (("GRADIENT_LOG_PERIOD", period), ("BALANCE", balance)):
            if value < 0:
                raise DistillError(f"DISTILL.{key} is {value}: expected 0 (off) or more.")
        if balance and not period:
            raise DistillError(
                f"DISTILL.BALANCE is {balance}, but DISTILL.GRADIENT_LOG_PERIOD is 0, so that no gradient is measured. "
                "Set it to a number of iterations, such as 50."
            )
        self._distillers = distillers
        self._max_iter = max_iter
        self._period = period
        self._balance = balance
        self._scales: dict[str, float] = {}
        self._times_high = dict.fromkeys(distillers, 0)

    def __call__(
        self,
        detection: Mapping[str, Tensor],
        distilled: Mapping[str, Mapping[str, Tensor]],
        features: Mapping[str, Tensor],
    ) -> dict[str, dict[str, float]]:
        """
        Args:
            detection: the student's detection losses, ``Tensor[]`` by name.
            distilled: for each distiller its unweighted losses, ``Tensor[]`` by name.
            features: the student's features by level, from which all of these were computed.

        Returns:
            For each distiller, what each of its losses is to be multiplied by.

        Raises:
            DistillError: a distiller's losses do not depend on the student's features, or nothing can be balanced.
        """
        storage = get_event_storage()
        if self._balance and not self._scales:
            self._update_scales()  # what a checkpoint brought
        if self._period and torch.is_grad_enabled():
            unmeasured = self._balance and len(self._scales) < len(self._distillers)
            if storage.iter % self._period == 0 or unmeasured:
                ratios = self._measure(detection, distilled, list(features.values()))
                self._update_scales()
                self._report(ratios, self._weights(distilled, storage.iter))
        weights = self._weights(distilled, storage.iter)
        for losses in weights.values():
            for key, weight in losses.items():
                storage.put_scalar(f"weight/{key}", weight, smoothing_hint=False)
        return weights

    def _weights(self, distilled: Mapping[str, Mapping[str, Tensor]], iteration: int) -> dict[str, dict[str, float]]:
        return {
            name: {
                key: self._distillers[name].weight_at(iteration, self._max_iter, _own_name(key, name))
                * self._scales.get(name, 1.0)
                for key in losses
            }
            for name, losses in distilled.items()
        }

    def _update_scales(self) -> None:
        if not self._balance:
            return
        for name, distiller in self._distillers.items():
            mean_log, count = distiller.gradient_ratio.tolist()
            if count:
                self._scales[name] = self._balance / math.exp(mean_log)

    def _measure(
        self,
        detection: Mapping[str, Tensor],
        distilled: Mapping[str, Mapping[str, Tensor]],
        features: Sequence[Tensor],
    ) -> dict[str, float]:
        """The ratios of this step, of the unweighted losses; the running means follow."""
        inputs = [x for x in features if x.requires_grad]
        if not inputs:
            if self._balance:
                raise DistillError(
                    "DISTILL.BALANCE compares gradients at the student's features, and these need none: its whole "
                    "backbone is frozen. Set DISTILL.BALANCE 0."
                )
            return {}
        # a distiller that had nothing to compare in this process still takes its place in the sum over processes
        squares = [_squared_gradient_norm(detection, inputs, None)]
        squares += [_squared_gradient_norm(distilled[name], inputs, name) for name in self._distillers]
        squares = torch.stack(squares)
        if comm.get_world_size() > 1:
            dist.all_reduce(squares)
        own, *others = squares.tolist()
        ratios = {
            name: math.sqrt(other / own) if own > 0 else math.nan for name, other in zip(self._distillers, others)
        }
        ratios = {name: ratio for name, ratio in ratios.items() if 0 < ratio < math.inf}
        for name, ratio in ratios.items():
            state = self._distillers[name].gradient_ratio
            mean_log, count = state.tolist()
            momentum = min(_MOMENTUM, count / (count + 1))
            state.copy_(torch.tensor([momentum * mean_log + (1 - momentum) * math.log(ratio), count + 1]))
        return ratios

    def _report(self, ratios: Mapping[str, float], weights: Mapping[str, Mapping[str, float]]) -> None:
        storage = get_event_storage()
        largest = {name: max(losses.values(), default=0.0) for name, losses in weights.items()}
        applied = {name: ratio * largest[name] for name, ratio in ratios.items()}
        for name, ratio in applied.items():
            storage.put_scalar(f"gradient_ratio/{name}", ratio, smoothing_hint=False)
            self._times_high[name] = self._times_high[name] + 1 if ratio > _HIGH_RATIO else 0
            if self._times_high[name] == _PATIENCE:
                logger.warning(
                    f"{name}'s gradient at the student's features has been more than {_HIGH_RATIO:g} times the "
                    f"detection losses' in {_PATIENCE} measurements ({ratio:.1f} times now): it may drown them. Lower "
                    "its LOSS_WEIGHT, or set DISTILL.BALANCE, such as 0.5."
                )
        if applied:
            texts = (f"{name} {ratio:.3g} (weight {largest[name]:.3g})" for name, ratio in applied.items())
            logger.info(f"Gradients at the features, relative to the detection losses': {', '.join(texts)}")


def _own_name(key: str, distiller: str) -> str:
    """The name that a distiller gave to a loss, before a variant's was added to it."""
    _, slash, variant = distiller.partition("/")
    return key.removesuffix(f"_{variant}") if slash else key


def _squared_gradient_norm(losses: Mapping[str, Tensor], inputs: Sequence[Tensor], distiller: str | None) -> Tensor:
    """Squared norm of the gradient of the losses' sum at the inputs, summed over them; the graph is kept."""
    zero = inputs[0].new_zeros((), dtype=torch.float32)
    if not losses:
        return zero
    total = sum(losses.values())
    # in float16 small gradients vanish and large ones overflow, so the loss is scaled as a gradient scaler does it
    for scale in (2.0**16, 2.0**8, 1.0) if inputs[0].dtype == torch.float16 else (1.0,):
        gradients = torch.autograd.grad(total * scale, inputs, retain_graph=True, allow_unused=True)
        gradients = [x.float() / scale for x in gradients if x is not None]
        norm = sum((x.square().sum() for x in gradients), zero)
        if norm.isfinite():
            break
    if distiller and not gradients:
        raise DistillError(
            f"{distiller}'s losses ({', '.join(losses)}) do not depend on the student's features, so the student "
            "learns nothing from them. Compute them from student.features or student.box_head, and detach neither."
        )
    return norm

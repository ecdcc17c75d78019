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

    Every ``period`` iterations (and, of a distiller that had nothing to compare so far, in each) the gradient of each
    distiller's unweighted losses at the student's features is measured (one backward pass from the losses down to the
    features for each distiller and one for the detection losses, none through the backbone). With ``balance`` b, a
    distiller's losses are scaled by b / r, r being the running geometric mean of |distiller's gradient| / |detection
    losses' gradient|, over the images of all processes. It is kept in the distiller, and so in the checkpoint. To
    Detectron2's event storage go ``weight/LOSS`` of each loss and ``gradient_ratio/NAME`` of each distiller, the latter
    with its losses weighted as they are applied.

    Args:
        distillers: by name.
        max_iter: number of iterations of the training, for the decay; None for no decay.
        period: how often gradients are measured, in iterations; 0 for never.
        balance: b; 0 for no scaling. A distiller whose ratio has not been measured yet has no weight.

    Raises:
        DistillError: a number is out of range, or there is a balance but nothing is to be measured.
    """

    def __init__(
        self, distillers: nn.ModuleDict, max_iter: int | None = None, period: int = 0, balance: float = 0.0
    ) -> None:
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
        self._is_first = True
        self._measured_at: int | None = None

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
            DistillError: a distiller's loss does not depend on the student's features (found in the first call), or
                nothing can be balanced.
        """
        storage = get_event_storage()
        inputs = [x for x in features.values() if x.requires_grad]
        if torch.is_grad_enabled():
            if self._is_first:
                _check_dependence(distilled, inputs)
                self._update_scales()  # what a checkpoint brought
            wanted = list(self._distillers)
            if not (self._period and storage.iter % self._period == 0):  # those that had nothing to compare so far
                wanted = [name for name in wanted if self._balance and name not in self._scales]
            if wanted and storage.iter != self._measured_at:  # once a step, which may have several batches
                self._measured_at = storage.iter
                self._measure(detection, {name: distilled[name] for name in wanted}, inputs)
            self._is_first = False
        weights = self._weights(distilled, storage.iter)
        for losses in weights.values() if comm.is_main_process() else ():  # which alone writes them
            for key, weight in losses.items():
                storage.put_scalar(f"weight/{key}", weight, smoothing_hint=False)
        return weights

    def _weights(self, distilled: Mapping[str, Mapping[str, Tensor]], iteration: int) -> dict[str, dict[str, float]]:
        scales = {name: self._scales.get(name, 0.0) if self._balance else 1.0 for name in distilled}
        return {
            name: {
                key: scales[name] * self._distillers[name].weight_at(iteration, self._max_iter, _own_name(key, name))
                for key in losses
            }
            for name, losses in distilled.items()
        }

    def _update_scales(self) -> None:
        for name, distiller in self._distillers.items():
            if self._balance and distiller.num_measurements:
                self._scales[name] = self._balance / math.exp(distiller.log_gradient_ratio.item())

    def _measure(
        self,
        detection: Mapping[str, Tensor],
        distilled: Mapping[str, Mapping[str, Tensor]],
        inputs: Sequence[Tensor],
    ) -> None:
        """Measures the ratios of this step, lets the running means follow, and logs the ratios."""
        if not inputs:
            if self._balance:
                raise DistillError(
                    "DISTILL.BALANCE compares gradients at the student's features, and these need none: its whole "
                    "backbone is frozen. Set DISTILL.BALANCE 0."
                )
            return
        measured = _gradient_ratios(detection, distilled, inputs)
        for name, ratio in measured.items():
            distiller = self._distillers[name]
            count = distiller.num_measurements.item()
            momentum = min(_MOMENTUM, count / (count + 1))
            distiller.log_gradient_ratio.mul_(momentum).add_((1 - momentum) * math.log(ratio))
            distiller.num_measurements += 1
        self._update_scales()

        weights = self._weights(distilled, get_event_storage().iter)
        applied = {name: ratio * max(weights[name].values(), default=0.0) for name, ratio in measured.items()}
        uneven = [name for name in distilled if self._distillers[name].decay and self._distillers[name].undecayed]
        if uneven:  # some of their losses have another weight than the others
            weighted = {name: {k: x * weights[name][k] for k, x in distilled[name].items()} for name in uneven}
            applied.update(_gradient_ratios(detection, weighted, inputs))
        self._report(applied)

    def _report(self, ratios: Mapping[str, float]) -> None:
        storage = get_event_storage()
        for name, ratio in ratios.items():
            storage.put_scalar(f"gradient_ratio/{name}", ratio, smoothing_hint=False)
            self._times_high[name] = self._times_high[name] + 1 if ratio > _HIGH_RATIO else 0
            if self._times_high[name] == _PATIENCE:
                advice = (
                    "LOSS_WEIGHT or DISTILL.BALANCE" if self._balance else "LOSS_WEIGHT, or set DISTILL.BALANCE 0.5"
                )
                logger.warning(
                    f"{name}'s gradient at the student's features has been more than {_HIGH_RATIO:g} times the "
                    f"detection losses' in {_PATIENCE} measurements ({ratio:.1f} times now): it may drown them. Lower "
                    f"its {advice}."
                )
        if ratios:
            texts = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
            logger.info(f"Gradients at the features, relative to the detection losses': {texts}")


def _own_name(key: str, distiller: str) -> str:
    """The name that a distiller gave to a loss, before a variant's was added to it."""
    _, slash, variant = distiller.partition("/")
    return key.removesuffix(f"_{variant}") if slash else key


def _check_dependence(distilled: Mapping[str, Mapping[str, Tensor]], inputs: Sequence[Tensor]) -> None:
    for name, losses in distilled.items() if inputs else ():
        for key, loss in losses.items():
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
            if all(x is None for x in gradients):
                raise DistillError(
                    f"{name}'s loss {key!r} does not depend on the student's features, so the student learns nothing "
                    "from it. Compute it from student.features or student.box_head, and detach neither."
                )


def _gradient_ratios(
    detection: Mapping[str, Tensor], distilled: Mapping[str, Mapping[str, Tensor]], inputs: Sequence[Tensor]
) -> dict[str, float]:
    """|gradient of a distiller's losses| / |gradient of the detection losses|, over all processes, where both are
    finite and not zero."""
    # a distiller that had nothing to compare in this process still takes its place in the sum over processes
    squares = torch.stack([_squared_gradient_norm(losses, inputs) for losses in (detection, *distilled.values())])
    if comm.get_world_size() > 1:
        dist.all_reduce(squares)
    reference, *others = squares.tolist()
    return {
        name: math.sqrt(other / reference)
        for name, other in zip(distilled, others)
        if 0 < reference < math.inf and 0 < other < math.inf
    }


def _squared_gradient_norm(losses: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Squared norm of the gradient of the losses' sum at the inputs, summed over them; the graph is kept."""
    norm = inputs[0].new_zeros((), dtype=torch.float32)
    total = sum(losses.values())
    # in mixed precision small gradients vanish and large ones overflow, so the loss is scaled as a gradient scaler does
    for scale in (2.0**16, 2.0**8, 1.0):
        gradients = torch.autograd.grad(total * scale, inputs, retain_graph=True, allow_unused=True)
        norm = sum(((x.float() / scale).square().sum() for x in gradients if x is not None), torch.zeros_like(norm))
        if _all_agree(norm.isfinite()):
            break
    return norm


def _all_agree(flag: Tensor) -> bool:
    """Whether a flag is set in all processes. A process that went on alone would wait for the others in the collectives
    of a backward pass, such as those of SyncBN."""
    if comm.get_world_size() > 1:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)

"""What every distillation method is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError

if TYPE_CHECKING:  # distill.modeling imports this very module
    from ..modeling.views import DetectorView


class Distiller(nn.Module):
    """A distillation method: two views of one batch in, named losses out.

    A subclass registers in ``DISTILLER_REGISTRY`` and is built as ``Name(cfg, student_shape, teacher_shape)``,
    the shapes being what ``backbone.output_shape()`` returns (``dict[str, ShapeSpec]``). Its own parameters train
    with the student and are saved under ``distillers.Name.``. See docs/extending.md.

    Args:
        loss_weight: what all of its losses are multiplied by.
        warmup_iters: the weight grows linearly from zero over so many iterations.
        decay: the weight falls linearly to zero over this last part of the training, from 0 (never) to 1 (all along).

    Attributes:
        undecayed: names of losses whose weight does not fall.
        levels: names of the backbone's levels whose features it compares; None for all that both sides have. Levels of
            the student that neither a distiller nor a head takes are frozen.
        unactivated_towers: numbers of convolutions: before the last so many of a dense student's towers it asks for
            what the activation was given, see :meth:`DetectorView.tower_inputs`.

    Raises:
        DistillError: one of the arguments is out of range.
    """

    undecayed: Sequence[str] = ()
    levels: Sequence[str] | None = None
    unactivated_towers: Sequence[int] = ()

    def __init__(self, loss_weight: float = 1.0, warmup_iters: int = 0, decay: float = 0.0) -> None:
        super().__init__()
        if warmup_iters < 0:
            raise DistillError(f"{type(self).__name__}: WARMUP_ITERS is {warmup_iters}, expected 0 or more iterations.")
        if not 0 <= decay <= 1:
            raise DistillError(
                f"{type(self).__name__}: DECAY is {decay}, expected the part of the training, from 0 (never) to 1 (all "
                "of it), over which the weight falls to zero."
            )
        self.loss_weight = loss_weight
        self.warmup_iters = warmup_iters
        self.decay = decay
        # Size of its gradient relative to the detection losses': the running mean of its logarithm, and how often it
        # was measured; see distill.modeling.loss_weights
        self.register_buffer("log_gradient_ratio", torch.tensor(0.0))
        self.register_buffer("num_measurements", torch.tensor(0))

    @staticmethod
    def weight_settings(node: CfgNode) -> dict[str, float]:
        """The arguments of this class, from a distiller's config node.

        Args:
            node: what :func:`distill.config.add_weight_config` was called on.

        Returns:
            Keyword arguments.
        """
        return {"loss_weight": node.LOSS_WEIGHT, "warmup_iters": node.WARMUP_ITERS, "decay": node.DECAY}

    def reset(self) -> None:
        """Forgets what belongs to one run: called when a run begins, also from the weights of another, and not when it
        is resumed."""
        self.log_gradient_ratio.zero_()
        self.num_measurements.zero_()

    def weight_at(self, iteration: int, max_iter: int | None, loss: str = "") -> float:
        """The weight of one of its losses at an iteration.

        Args:
            iteration: counted from 0.
            max_iter: number of iterations of the training; None where it is not known, so that nothing decays.
            loss: the name of the loss, as ``forward`` returns it.

        Returns:
            ``loss_weight`` times the two ramps.
        """
        grown = min(1.0, iteration / self.warmup_iters) if self.warmup_iters else 1.0
        left = 1.0
        if max_iter and self.decay and loss not in self.undecayed:
            left = min(1.0, max(0.0, (max_iter - iteration) / (self.decay * max_iter)))
        return self.loss_weight * grown * left

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        """Compares the two detectors on one batch.

        Args:
            student: the student's view, with gradient.
            teacher: the teacher's view, without gradient. Only those of its results are computed that you use.

        Returns:
            At least one loss by name, ``Tensor[]``, float32, before any weight; they are weighted, then added to the
            detection losses. Each depends on the student's features; where a batch has nothing to compare, it is 0
            times something of the student's. A name contains "loss", or Detectron2 does not print it.

        Raises:
            DistillError: this method does not fit the two detectors. What it returns is checked by the
                ``DistillationModel``, which raises the same.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(student, teacher)")

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        """Hooks for what happens between steps; they run with the trainer's own.

        Args:
            model: the ``DistillationModel`` that this distiller is part of.

        Returns:
            The hooks; none by default.
        """
        return []


def shared_levels(
    requested: Sequence[str], student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec], key: str
) -> list[str]:
    """Decides which FPN levels a distiller compares.

    Args:
        requested: names of levels; empty for all that both sides have.
        student_shape: the student's features, by level.
        teacher_shape: the teacher's features, by level.
        key: the config key of ``requested``, for the messages.

    Returns:
        Names of levels, finest first.

    Raises:
        DistillError: a side lacks a level, none is shared, or a level's strides differ.
    """
    sides = {"student": student_shape, "teacher": teacher_shape}
    levels = list(requested) or [level for level in student_shape if level in teacher_shape]
    for side, shape in sides.items():
        lacking = [level for level in levels if level not in shape]
        if lacking:
            raise DistillError(
                f"{key} asks for {', '.join(lacking)}, which the {side} does not have: it has {', '.join(shape)}. "
                f"Choose {key} among the levels that both have."
            )
    if not levels:
        raise DistillError(
            f"Student and teacher share no level: the student has {', '.join(student_shape)}, the teacher "
            f"{', '.join(teacher_shape)}. Give both an FPN with levels of the same names, or say by "
            "DISTILL.STUDENT.LEVELS which level is which."
        )
    for level in levels:
        strides = student_shape[level].stride, teacher_shape[level].stride
        if strides[0] != strides[1]:
            raise DistillError(
                f"Level {level} has stride {strides[0]} in the student and {strides[1]} in the teacher, so their "
                f"cells do not lie on each other. Leave it out of {key}; for a student that sees the images at half "
                "their size, set DISTILL.STUDENT.INPUT_SCALE 0.5, which shifts its levels (docs/methods.md)."
            )
    return sorted(levels, key=lambda level: student_shape[level].stride)

"""Cross-head distillation (CrossKD): Wang, Chen, Zheng, Li, Cheng, Hou, CVPR 2024, arXiv 2306.11369."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import align_scale, cross_box_loss, cross_class_loss
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller
from .build import DISTILLER_REGISTRY
from .instances import mean_over_processes

TOWERS = ("classes", "boxes")


@DISTILLER_REGISTRY.register()
class CrossKDDistiller(Distiller):
    """Sends features from inside the student's head through the end of the teacher's, and compares what comes out with
    what the teacher says. So the detection losses and the distillation act on different outputs.

    Args:
        channels: of the student's and of the teacher's towers.
        adaptation: for each of the two towers, what brings the student's features to the teacher's channels.
        num_teacher_convs: how many of each tower's convolutions they go through, before the one that predicts.
        align_scale: whether they first get the mean and the standard deviation of the teacher's, channel by channel.
        beta: of the quality focal loss.
        class_weight: factor of the classification.
        box_weight: factor of the boxes.
        weight_settings: arguments of :class:`Distiller`.
    """

    levels = ()  # but those that the heads take

    @configurable
    def __init__(
        self,
        *,
        channels: tuple[int, int],
        adaptation: nn.ModuleDict,
        num_teacher_convs: int,
        align_scale: bool,
        beta: float,
        class_weight: float,
        box_weight: float,
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.channels = channels
        self.adaptation = adaptation
        self.num_teacher_convs = num_teacher_convs
        self.align_scale = align_scale
        self.unactivated_towers = (num_teacher_convs,) if align_scale else ()
        self.beta = beta
        self.class_weight = class_weight
        self.box_weight = box_weight

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.CROSSKD, "DISTILL.CROSSKD"
        if node.NUM_TEACHER_CONVS < 0:
            raise DistillError(f"{key}.NUM_TEACHER_CONVS is {node.NUM_TEACHER_CONVS}: expected 0 or more, such as 1.")
        if node.BETA != 0 and node.BETA < 1:  # |t - s|^BETA has no finite gradient where both agree
            raise DistillError(f"{key}.BETA is {node.BETA}: expected 0, or a number of 1 or more, such as 1.")
        # Detectron2's dense heads have as many channels as their features
        sides = [dict.fromkeys(TOWERS, list(shape.values())[-1]) for shape in (student_shape, teacher_shape)]
        return {
            "channels": tuple(side[TOWERS[0]].channels for side in sides),
            "adaptation": build_adaptation(TOWERS, *sides, node.ADAPTATION, f"{key}.ADAPTATION"),
            "num_teacher_convs": node.NUM_TEACHER_CONVS,
            "align_scale": node.ALIGN_SCALE,
            "beta": node.BETA,
            "class_weight": node.CLASS_WEIGHT,
            "box_weight": node.BOX_WEIGHT,
            **cls.weight_settings(node),
        }

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        self._check(*model.frozen_views([]))  # before the first step
        return []

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        self._check(student, teacher)
        end = {"num_convs": self.num_teacher_convs, "is_activated": not self.align_scale}
        towers = [
            [self.adaptation[name](level) for level in levels]
            for name, levels in zip(TOWERS, student.tower_inputs(**end))
        ]
        if self.align_scale:
            own = teacher.start_towers(self.num_teacher_convs)
            towers = [[align_scale(*pair) for pair in zip(*levels)] for levels in zip(towers, own)]
            logits, deltas = teacher.finish_towers(*own, **end)
        else:
            logits, deltas = teacher.class_logits, teacher.box_deltas
        cross, cross_deltas = teacher.finish_towers(*towers, **end)
        cross, logits = (
            torch.cat([permute_to_N_HWA_K(x, teacher.num_classes) for x in levels], 1) for levels in (cross, logits)
        )
        boxes = [teacher.decode(x) for x in (cross_deltas, deltas)]
        positives = mean_over_processes(student.num_positive_anchors, cross.device)
        return {
            "loss_cross_class": self.class_weight * cross_class_loss(cross, logits, self.beta) / positives,
            "loss_cross_box": self.box_weight * cross_box_loss(*boxes, logits) / positives,
        }

    def _check(self, student: DetectorView, teacher: DetectorView) -> None:
        """Refuses detectors of which one's features cannot go through the other's head."""
        if not (student.is_dense and teacher.is_dense):
            raise DistillError(
                "CrossKDDistiller sends features through the head of a dense detector: expected RetinaNet or FCOS as "
                "student and as teacher."
            )
        for view, channels in zip((student, teacher), self.channels):
            view.check_towers(self.num_teacher_convs, channels)
        levels = student.head_levels, teacher.head_levels
        if levels[0] != levels[1]:
            raise DistillError(
                f"The student's head stands on {', '.join(levels[0])} and the teacher's on {', '.join(levels[1])}: "
                "CrossKDDistiller needs the same levels on both sides."
            )

"""Distillation of classifications: KD (arXiv 1503.02531), DKD (2203.08679) and BCKD (2308.14286)."""

from collections.abc import Mapping

from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import box_overlap, decoupled_divergence, quality_focal_loss, soft_label_divergence
from ..modeling.classes import build_class_map
from ..modeling.views import DetectorView
from .base import Distiller
from .build import DISTILLER_REGISTRY
from .instances import (
    INSTANCES,
    check_anchors,
    check_classifications,
    check_corner_anchors,
    instance_boxes,
    mean_over_processes,
    paired_logits,
)

KINDS = ("KD", "DKD", "BCKD")


@DISTILLER_REGISTRY.register()
class LogitDistiller(Distiller):
    """Compares classifications: of the student's positive proposals or positive anchors (KD, DKD), or of all anchors,
    and their boxes (BCKD, dense detectors alone).

    Args:
        kind: "KD", "DKD" or "BCKD".
        instances: see :func:`distill.distillers.instances.instance_boxes`.
        temperature: of KD and DKD.
        alpha: of DKD, factor of the true class against the others.
        beta: of DKD, factor of the classes among the others.
        box_weight: of BCKD, factor of the boxes' loss.
        class_map: by the student's class, the teacher's; None where both have the same.
        weight_settings: arguments of :class:`Distiller`.
    """

    levels = ()

    @configurable
    def __init__(
        self,
        *,
        kind: str,
        instances: str = "proposals",
        temperature: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.25,
        box_weight: float = 4.0,
        class_map: Mapping[int, int] | None = None,
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.kind = kind
        self.instances = instances
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.box_weight = box_weight
        self.class_map = class_map

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.LOGIT, "DISTILL.LOGIT"
        for name, choices in (("KIND", KINDS), ("INSTANCES", INSTANCES)):
            if node[name] not in choices:
                raise DistillError(f"{key}.{name} is {node[name]!r}: expected one of {', '.join(choices)}.")
        if node.TEMPERATURE <= 0:
            raise DistillError(f"{key}.TEMPERATURE is {node.TEMPERATURE}: expected a number above 0, such as 1.")
        return {
            "kind": node.KIND,
            "instances": node.INSTANCES,
            "temperature": node.TEMPERATURE,
            "alpha": node.ALPHA,
            "beta": node.BETA,
            "box_weight": node.BOX_WEIGHT,
            "class_map": build_class_map(cfg),
            **cls.weight_settings(node),
        }

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        views = model.frozen_views([])  # an error before the first step
        self._check(*views)
        check_corner_anchors(*views)
        return []

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        self._check(student, teacher)
        if self.kind == "BCKD":
            return self._binary_losses(student, teacher)
        found = instance_boxes(student, self.instances)
        pairs = paired_logits(student, teacher, self.instances, *found, self.class_map)
        if self.kind == "KD":
            divergence = soft_label_divergence(pairs.student, pairs.teacher, self.temperature)
        else:
            factors = self.alpha, self.beta, self.temperature
            divergence = decoupled_divergence(pairs.student, pairs.teacher, pairs.labels, *factors)
        return {"loss_logit": divergence.sum() / mean_over_processes(len(divergence), divergence.device)}

    def _binary_losses(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        check_anchors(student, teacher)
        logits, scores = student.anchor_logits, teacher.anchor_logits.float().sigmoid()
        if self.class_map is not None:
            logits, scores = logits[..., list(self.class_map)], scores[..., list(self.class_map.values())]
        boxes = [view.decode(view.box_deltas) for view in (student, teacher)]
        difference = (scores - logits.float().sigmoid()).abs().amax(2).detach()
        positives = mean_over_processes(student.num_positive_anchors, logits.device)
        return {
            "loss_logit": quality_focal_loss(logits, scores).sum() / positives,
            "loss_logit_box": self.box_weight * (difference * (1 - box_overlap(*boxes))).sum() / positives,
        }

    def _check(self, student: DetectorView, teacher: DetectorView) -> None:
        what = f"LogitDistiller of DISTILL.LOGIT.KIND {self.kind}", "leave this distiller out"
        check_classifications(student, teacher, self.class_map, *what, with_softmax=self.kind != "BCKD")
        if self.kind == "BCKD" and not student.is_dense:
            raise DistillError(
                "DISTILL.LOGIT.KIND is BCKD, which compares classes one by one, as RetinaNet and FCOS tell them apart: "
                "expected KD or DKD for a detector with a box head."
            )

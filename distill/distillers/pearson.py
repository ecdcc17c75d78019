"""Pearson-correlation distillation (PKD): Cao et al., NeurIPS 2022, arXiv 2207.02039."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..losses import pearson_loss
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


@DISTILLER_REGISTRY.register()
class PearsonDistiller(Distiller):
    """Compares features by their correlation, channel by channel; the levels are summed. Scale and offset play no part,
    so a teacher of another family can teach.

    Args:
        levels: names of the levels, finest first.
        adaptation: by level, what brings the student's features to the teacher's channels.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(self, *, levels: Sequence[str], adaptation: nn.ModuleDict, **weight_settings: float) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.PEARSON, "DISTILL.PEARSON"
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        levels = levels if node.LEVELS else levels[:4]
        return {
            "levels": levels,
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            **cls.weight_settings(node),
        }

    def forward(
        self, student: DetectorView, teacher: DetectorView, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`Distiller.forward`.

        Args:
            student: the student's view.
            teacher: the teacher's view.
            weights: by level, ``Tensor[N, 1, H, W]``, weights of the cells.
        """
        losses = [
            pearson_loss(
                self.adaptation[level](student.features[level]), teacher.features[level], weights and weights[level]
            )
            for level in self.levels
        ]
        return {"loss_pearson": sum(losses)}

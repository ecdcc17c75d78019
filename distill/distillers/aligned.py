"""Multi-scale aligned distillation: Qi, Kuen, Gu et al., CVPR 2021, arXiv 2109.04875."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..losses import aligned_loss
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


@DISTILLER_REGISTRY.register()
class AlignedDistiller(Distiller):
    """Compares the levels of a student that sees the images at a smaller scale with the teacher's that lie on them.

    The scale is DISTILL.STUDENT.INPUT_SCALE, and the views are aligned by it for any distiller. The teacher is meant to
    be an ``AlignedTeacher``, whose levels are fused from both scales.

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
        node, key = cfg.DISTILL.ALIGNED, "DISTILL.ALIGNED"
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        features = [self.adaptation[level](student.features[level]) for level in self.levels]
        return {"loss_aligned": aligned_loss(features, [teacher.features[level] for level in self.levels])}

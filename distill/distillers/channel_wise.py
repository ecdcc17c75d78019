"""Channel-wise knowledge distillation (CWD): Shu et al., ICCV 2021, arXiv 2011.13256."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import channel_wise_loss
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


@DISTILLER_REGISTRY.register()
class CWDDistiller(Distiller):
    """Compares where in the map each channel is large, channel by channel.

    Args:
        levels: names of the levels, finest first.
        adaptation: by level, what brings the student's features to the teacher's channels.
        temperature: see :func:`distill.losses.channel_wise_loss`.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self, *, levels: Sequence[str], adaptation: nn.ModuleDict, temperature: float, **weight_settings: float
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation
        self.temperature = temperature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.CWD, "DISTILL.CWD"
        if node.TEMPERATURE <= 0:
            raise DistillError(f"{key}.TEMPERATURE is {node.TEMPERATURE}: expected a number above 0, such as 1.")
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            "temperature": node.TEMPERATURE,
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        features = [self.adaptation[level](student.features[level]) for level in self.levels]
        target = [teacher.features[level] for level in self.levels]
        return {"loss_cwd": channel_wise_loss(features, target, self.temperature)}

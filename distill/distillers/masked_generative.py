"""Masked generative distillation (MGD): Yang et al., ECCV 2022, arXiv 2205.01529."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import generation_loss, random_cells
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


@DISTILLER_REGISTRY.register()
class MGDDistiller(Distiller):
    """Has the teacher's features generated from the student's, of which random cells are masked.

    Args:
        levels: names of the levels, finest first.
        channels: the teacher's channels at them.
        adaptation: by level, what brings the student's features to the teacher's channels.
        mask_ratio: the share of the cells that is masked.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        channels: Sequence[int],
        adaptation: nn.ModuleDict,
        mask_ratio: float,
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation
        self.mask_ratio = mask_ratio
        # as torch initialises them, like the published ones
        self.generation = nn.ModuleDict(
            {
                level: nn.Sequential(
                    nn.Conv2d(number, number, 3, padding=1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(number, number, 3, padding=1),
                )
                for level, number in zip(levels, channels, strict=True)
            }
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.MGD, "DISTILL.MGD"
        if not 0 <= node.MASK_RATIO < 1:
            raise DistillError(f"{key}.MASK_RATIO is {node.MASK_RATIO}: expected a share from 0 to below 1.")
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "channels": [teacher_shape[level].channels for level in levels],
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            "mask_ratio": node.MASK_RATIO,
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        generated = []
        for level in self.levels:
            features = self.adaptation[level](student.features[level])
            generated.append(self.generation[level](features * random_cells(features, self.mask_ratio)))
        return {"loss_mgd": generation_loss(generated, [teacher.features[level] for level in self.levels])}

"""Structural similarity: de Rijk, Schneider, Cordts, Gavrila, NeurIPS 2022, arXiv 2211.13133."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import structural_loss
from ..losses.structural import SCALES
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY

Criterion = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def structural_criterion(cfg: CfgNode) -> Criterion:
    """The structural loss with the settings of DISTILL.STRUCTURAL.

    Args:
        cfg: the full config.

    Returns:
        :func:`distill.losses.structural_loss`, of the student's and the teacher's levels.

    Raises:
        DistillError: a setting is out of range.
    """
    node = cfg.DISTILL.STRUCTURAL
    expected = {
        "SCALE": (node.SCALE in SCALES, f"one of {', '.join(SCALES)}"),
        "WINDOW_SIZE": (node.WINDOW_SIZE > 0 and node.WINDOW_SIZE % 2 == 1, "an odd number of cells, such as 11"),
        "SIGMA": (node.SIGMA > 0, "a number of cells above 0"),
        "K1": (node.K1 > 0, "a number above 0, such as 0.01"),
        "K2": (node.K2 > 0, "a number above 0, such as 0.03"),
        "EXPONENTS": (
            len(node.EXPONENTS) == 3 and min(node.EXPONENTS) >= 0 < max(node.EXPONENTS),
            "three numbers, for luminance, contrast and structure, none negative and not all 0",
        ),
    }
    for key, (is_valid, meaning) in expected.items():
        if not is_valid:
            raise DistillError(f"DISTILL.STRUCTURAL.{key} is {node[key]!r}: expected {meaning}.")
    return partial(
        structural_loss,
        scale=node.SCALE,
        window_size=node.WINDOW_SIZE,
        sigma=node.SIGMA,
        k1=node.K1,
        k2=node.K2,
        exponents=tuple(node.EXPONENTS),
    )


@DISTILLER_REGISTRY.register()
class StructuralDistiller(Distiller):
    """Compares the adapted features of the student with the teacher's by structural similarity.

    Args:
        levels: names of the levels, finest first.
        adaptation: by level, what brings the student's features to the teacher's channels.
        criterion: the loss, of the student's and the teacher's levels.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self, *, levels: Sequence[str], adaptation: nn.ModuleDict, criterion: Criterion, **weight_settings: float
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation
        self.criterion = criterion

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.STRUCTURAL, "DISTILL.STRUCTURAL"
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            "criterion": structural_criterion(cfg),
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        features = [self.adaptation[level](student.features[level]) for level in self.levels]
        return {"loss_structural": self.criterion(features, [teacher.features[level] for level in self.levels])}

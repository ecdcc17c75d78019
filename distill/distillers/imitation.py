"""Imitation by a norm of the difference: the baselines that structural similarity is measured against."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import imitation_loss, region_weights
from ..losses.imitation import NORMS, REGIONS
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


@DISTILLER_REGISTRY.register()
class ImitationDistiller(Distiller):
    """Compares the adapted features of the student with the teacher's cell by cell.

    Args:
        levels: names of the levels, finest first.
        adaptation: by level, what brings the student's features to the teacher's channels.
        norm: see :func:`distill.losses.imitation_loss`.
        region: see :func:`distill.losses.region_weights`, on the ground-truth boxes.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self, *, levels: Sequence[str], adaptation: nn.ModuleDict, norm: str, region: str, **weight_settings: float
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation
        self.norm = norm
        self.region = region

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.IMITATION, "DISTILL.IMITATION"
        for name, choices in (("NORM", NORMS), ("REGION", REGIONS)):
            if node[name] not in choices:
                raise DistillError(f"{key}.{name} is {node[name]!r}: expected one of {', '.join(choices)}.")
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            "norm": node.NORM,
            "region": node.REGION,
            **cls.weight_settings(node),
        }

    def forward(
        self, student: DetectorView, teacher: DetectorView, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`Distiller.forward`.

        Args:
            student: the student's view.
            teacher: the teacher's view.
            weights: by level, ``Tensor[N, 1, H, W]``, weights of the cells beside those of the region.
        """
        features = [self.adaptation[level](student.features[level]) for level in self.levels]
        target = [teacher.features[level] for level in self.levels]
        cells = None if weights is None else [weights[level] for level in self.levels]
        if self.region != "all":
            boxes = [x.gt_boxes.tensor for x in student.ground_truth]
            regions = [
                region_weights(boxes, tuple(x.shape[2:]), student.strides[level], self.region)
                for level, x in zip(self.levels, target)
            ]
            cells = regions if cells is None else [x * y for x, y in zip(regions, cells)]
        return {"loss_imitation": imitation_loss(features, target, self.norm, cells)}

"""Pearson-correlation distillation (PKD): Cao et al., NeurIPS 2022, arXiv 2207.02039."""

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from distill.config import add_weight_config
from distill.distillers import DISTILLER_REGISTRY, Distiller, build_adaptation, shared_levels
from distill.losses import in_float32


def add_config(cfg: CfgNode) -> None:
    """Adds DISTILL.PEARSON; called before a config that names this module in DISTILL.IMPORTS is read."""
    cfg.DISTILL.PEARSON = CfgNode()
    # Published: 6 for a teacher with a box head (R-CNN), 10 for RetinaNet and FCOS
    add_weight_config(cfg.DISTILL.PEARSON, loss_weight=6.0)
    # FPN levels to compare. Empty: the four finest that student and teacher share, as published.
    cfg.DISTILL.PEARSON.LEVELS = []


@in_float32
def pearson_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 minus the correlation of the two ``Tensor[N, C, H, W]``, averaged over channels; equation 4 of the paper.

    ``weights``, ``Tensor[N, 1, H, W]``, count cells more or less in all averages over batch and space.
    """
    weights = torch.ones_like(teacher[:, :1]) if weights is None else weights
    weights = weights / weights.sum().clamp(min=1e-6)

    def average(x: Tensor) -> Tensor:
        return (x * weights).sum((0, 2, 3), keepdim=True)

    # 1e-6 is added to the deviation, not inside its root, where it would drown one of 0.001. A constant channel counts
    # as 0: it would have a gradient of a million.
    standardized = []
    for x in (student - average(student), teacher - average(teacher)):
        deviation = average(x.square()).clamp(min=1e-14).sqrt()
        standardized.append(torch.where(deviation > 1e-6, x / (deviation + 1e-6), 0.0))
    return average((standardized[0] - standardized[1]).square()).mean() / 2


@DISTILLER_REGISTRY.register()
class PearsonDistiller(Distiller):
    """Compares features by their Pearson correlation, channel by channel; the levels are summed."""

    @configurable
    def __init__(self, *, levels: list[str], adaptation: nn.ModuleDict, **weight_settings: float) -> None:
        super().__init__(**weight_settings)
        self.levels = levels
        self.adaptation = adaptation

    @classmethod
    def from_config(cls, cfg: CfgNode, student_shape: dict, teacher_shape: dict) -> dict:
        node = cfg.DISTILL.PEARSON
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, "DISTILL.PEARSON.LEVELS")
        levels = levels if node.LEVELS else levels[:4]
        adaptation = build_adaptation(levels, student_shape, teacher_shape)
        return {"levels": levels, "adaptation": adaptation, **cls.weight_settings(node)}

    def forward(self, student, teacher, weights=None) -> dict[str, Tensor]:
        pairs = {k: (self.adaptation[k](student.features[k]), teacher.features[k]) for k in self.levels}
        return {"loss_pearson": sum(pearson_loss(*pairs[k], weights and weights[k]) for k in self.levels)}

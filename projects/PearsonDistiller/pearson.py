"""Pearson-correlation distillation (PKD): Cao et al., NeurIPS 2022, arXiv 2207.02039."""

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from distill.config import add_weight_config
from distill.distillers import DISTILLER_REGISTRY, Distiller, build_adaptation, shared_levels
from distill.losses import in_float32


def add_config(cfg: CfgNode) -> None:
    """Adds DISTILL.PEARSON; called before a config that names this module in DISTILL.IMPORTS is read."""
    cfg.DISTILL.PEARSON = CfgNode()
    add_weight_config(cfg.DISTILL.PEARSON)
    # FPN levels to compare. Empty: all that student and teacher share.
    cfg.DISTILL.PEARSON.LEVELS = []


def standardize(features: Tensor) -> Tensor:
    """``Tensor[N, C, H, W]`` with mean 0 and deviation 1 of each channel over batch and space."""
    centred = features - features.mean((0, 2, 3), keepdim=True)
    return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-6).sqrt()


@in_float32
def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the correlation of the two ``Tensor[N, C, H, W]``, averaged over channels; equation 4 of the paper."""
    return F.mse_loss(standardize(student), standardize(teacher)) / 2


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
        adaptation = build_adaptation(levels, student_shape, teacher_shape)
        return {"levels": levels, "adaptation": adaptation, **cls.weight_settings(node)}

    def forward(self, student, teacher) -> dict[str, Tensor]:
        pairs = [(self.adaptation[level](student.features[level]), teacher.features[level]) for level in self.levels]
        return {"loss_pearson": sum(pearson_loss(*pair) for pair in pairs)}

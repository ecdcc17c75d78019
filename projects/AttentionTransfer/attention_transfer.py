"""Attention transfer: Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from distill.config import add_weight_config
from distill.distillers import DISTILLER_REGISTRY, Distiller, shared_levels
from distill.losses import in_float32


def add_config(cfg: CfgNode) -> None:
    """Adds DISTILL.ATTENTION; called before a config that names this module in DISTILL.IMPORTS is read."""
    cfg.DISTILL.ATTENTION = CfgNode()
    add_weight_config(cfg.DISTILL.ATTENTION, loss_weight=1.0)
    # FPN levels to compare. Empty: all that student and teacher share.
    cfg.DISTILL.ATTENTION.LEVELS = []


@in_float32
def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of two attention maps, averaged over the images; equation 2 of the paper.

    An image's attention map is the sum of its squared channels, divided by its l2 norm. So the two
    ``Tensor[N, C, H, W]`` may have different numbers of channels.
    """
    own, others = (F.normalize(x.square().sum(1).flatten(1)) for x in (student, teacher))
    return (own - others).square().sum(1).clamp(min=1e-12).sqrt().mean()


@DISTILLER_REGISTRY.register()
class AttentionTransferDistiller(Distiller):
    """Compares where student and teacher have large features; the levels are summed."""

    @configurable
    def __init__(self, *, levels: list[str], **weight_settings: float) -> None:
        super().__init__(**weight_settings)
        self.levels = levels

    @classmethod
    def from_config(cls, cfg: CfgNode, student_shape: dict, teacher_shape: dict) -> dict:
        node = cfg.DISTILL.ATTENTION
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, "DISTILL.ATTENTION.LEVELS")
        return {"levels": levels, **cls.weight_settings(node)}

    def forward(self, student, teacher) -> dict[str, Tensor]:
        losses = [attention_loss(student.features[level], teacher.features[level]) for level in self.levels]
        return {"loss_attention": torch.stack(losses).sum()}

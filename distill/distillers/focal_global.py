"""Focal and global distillation (FGD): Yang et al., CVPR 2022, arXiv 2111.11837."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import focal_losses, focal_weights, generation_loss
from ..modeling.views import DetectorView
from .adaptation import build_adaptation
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY


class GlobalContext(nn.Module):
    """Adds to each cell what is gathered from the whole map (the GcBlock of GCNet, Cao et al., 2019).

    F + conv(ReLU(norm(conv(Σ softmax(conv(F)) F)))), the softmax over the cells. It starts as the identity, since its
    last convolution starts at zero. arXiv 2111.11837, equation 11.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: ``Tensor[N, C, H, W]``.

        Returns:
            A tensor of the same shape.
        """
        weights = self.attention(x).flatten(2).softmax(2)
        context = (x.flatten(2) * weights).sum(2)
        return x + self.transform(context[:, :, None, None])


@DISTILLER_REGISTRY.register()
class FGDDistiller(Distiller):
    """Compares features on objects and beside them, where the teacher looks, and what both sides gather globally.

    Args:
        levels: names of the levels, finest first.
        channels: the teacher's channels at them.
        adaptation: by level, what brings the student's features to the teacher's channels.
        temperature: of the attention maps.
        factors: of the parts "foreground", "background", "attention" and "global".
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        channels: Sequence[int],
        adaptation: nn.ModuleDict,
        temperature: float,
        factors: Mapping[str, float],
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.adaptation = adaptation
        self.temperature = temperature
        self.factors = dict(factors)
        self.student_context, self.teacher_context = (
            nn.ModuleDict({level: GlobalContext(number) for level, number in zip(levels, channels, strict=True)})
            for _ in range(2)
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node, key = cfg.DISTILL.FGD, "DISTILL.FGD"
        if node.TEMPERATURE <= 0:
            raise DistillError(f"{key}.TEMPERATURE is {node.TEMPERATURE}: expected a number above 0, such as 0.5.")
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, f"{key}.LEVELS")
        return {
            "levels": levels,
            "channels": [teacher_shape[level].channels for level in levels],
            "adaptation": build_adaptation(levels, student_shape, teacher_shape, node.ADAPTATION, f"{key}.ADAPTATION"),
            "temperature": node.TEMPERATURE,
            "factors": {
                "foreground": node.FOREGROUND_WEIGHT,
                "background": node.BACKGROUND_WEIGHT,
                "attention": node.ATTENTION_WEIGHT,
                "global": node.GLOBAL_WEIGHT,
            },
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        boxes = [x.gt_boxes.tensor for x in student.ground_truth]
        focal, gathered = [], []
        for level in self.levels:
            own, target = self.adaptation[level](student.features[level]), teacher.features[level]
            masks = focal_weights(boxes, tuple(target.shape[2:]), student.strides[level])
            focal.append(torch.stack(focal_losses(own, target, *masks, self.temperature)))
            gathered.append((self.student_context[level](own), self.teacher_context[level](target)))
        parts = dict(zip(("foreground", "background", "attention"), torch.stack(focal).sum(0)))
        parts["global"] = generation_loss(*zip(*gathered))
        return {f"loss_fgd_{name}": self.factors[name] * part for name, part in parts.items()}

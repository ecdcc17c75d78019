"""Knowledge review (ReviewKD): Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from ..errors import DistillError
from ..losses import hierarchical_context_loss
from ..modeling.views import DetectorView
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY
from .structural import Criterion, structural_criterion


class AttentionBasedFusion(nn.Module):
    """Attention-based fusion (ABF): one step of the review, from a coarser level to the next finer one.

    x = norm(conv1x1(features)); with a coarser x', y = x' upsampled, z = sigmoid(conv1x1([x, y])) and
    x <- x z_1 + y z_2; the output is norm(conv3x3(x)). arXiv 2104.09044, section 3.3.

    Args:
        in_channels: channels of the student's level.
        mid_channels: channels of x.
        out_channels: channels of the teacher's level.
        fuse: False for the coarsest level, which has nothing to fuse with.
        norm: a norm in Detectron2's terms.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool, norm: str = "BN") -> None:
        super().__init__()
        self.reduce = Conv2d(in_channels, mid_channels, 1, bias=False, norm=get_norm(norm, mid_channels))
        # with a bias and torch's initialisation, as published
        self.attention = Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.project = Conv2d(mid_channels, out_channels, 3, padding=1, bias=False, norm=get_norm(norm, out_channels))
        for conv in (self.reduce, self.project):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Tensor, coarser: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: ``Tensor[N, in_channels, H, W]``, the student's level.
            coarser: ``Tensor[N, mid_channels, H', W']``, the fused x of the next coarser level; None for the
                coarsest.

        Returns:
            The output, ``Tensor[N, out_channels, H, W]``, and the fused x, ``Tensor[N, mid_channels, H, W]``.
        """
        x = self.reduce(features)
        if self.attention is not None:
            # conv1x1([x, y]) in two halves: no copy of both, and that of y before it is upsampled
            own, other = self.attention.weight.split(x.shape[1], 1)
            z = F.conv2d(x, own, self.attention.bias)
            y, z_y = (F.interpolate(t, size=x.shape[-2:], mode="nearest") for t in (coarser, F.conv2d(coarser, other)))
            z = (z + z_y).sigmoid()
            x = torch.addcmul(x * z[:, :1], y, z[:, 1:])
        return self.project(x), x


class ReviewModule(nn.Module):
    """The review of a whole pyramid: each level is fused with what has been gathered from the coarser ones.

    Args:
        in_channels: channels of the student's levels, finest first.
        out_channels: channels of the teacher's levels, finest first.
        mid_channels: channels inside the fusion.
        norm: a norm in Detectron2's terms.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], mid_channels: int, norm: str = "BN"
    ) -> None:
        super().__init__()
        coarsest = len(in_channels) - 1
        self.fusions = nn.ModuleList(
            AttentionBasedFusion(c_in, mid_channels, c_out, fuse=level < coarsest, norm=norm)
            for level, (c_in, c_out) in enumerate(zip(in_channels, out_channels, strict=True))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """
        Args:
            features: the student's levels, ``Tensor[N, in_channels[i], H_i, W_i]``, finest first.

        Returns:
            For each level a ``Tensor[N, out_channels[i], H_i, W_i]``, finest first.
        """
        outputs, fused = [], None
        for fusion, level in zip(reversed(self.fusions), reversed(features), strict=True):
            output, fused = fusion(level, fused)
            outputs.append(output)
        return outputs[::-1]


def _check_norm(norm: str, channels: Collection[int]) -> None:
    try:
        for number in channels:
            get_norm(norm, number)
    except (KeyError, ValueError) as error:
        raise DistillError(
            f"DISTILL.REVIEW.NORM is {norm!r}: expected one of Detectron2's, such as 'BN', 'SyncBN', or 'GN' where 32 "
            f"divides the channels, which are {', '.join(map(str, sorted(channels)))} here (MID_CHANNELS and the "
            "teacher's)."
        ) from error


@DISTILLER_REGISTRY.register()
class ReviewDistiller(Distiller):
    """Compares the reviewed pyramid of the student with the teacher's.

    Args:
        levels: names of the levels, finest first.
        in_channels: the student's channels at them.
        out_channels: the teacher's channels at them.
        mid_channels: channels inside the fusion.
        norm: norm of the fusion modules, in Detectron2's terms.
        criterion: the loss, of the reviewed and the teacher's levels: the hierarchical context loss as published, or
            structural similarity.
        weight_settings: arguments of :class:`Distiller`.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int,
        norm: str,
        criterion: Criterion,
        **weight_settings: float,
    ) -> None:
        super().__init__(**weight_settings)
        self.levels = list(levels)
        self.review = ReviewModule(in_channels, out_channels, mid_channels, norm)
        self.criterion = criterion

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
    ) -> dict:
        node = cfg.DISTILL.REVIEW
        if node.CRITERION not in ("HCL", "SSIM"):
            raise DistillError(f"DISTILL.REVIEW.CRITERION is {node.CRITERION!r}: expected 'HCL' or 'SSIM'.")
        if any(size < 1 for size in node.POOL_SIZES):
            raise DistillError(
                f"DISTILL.REVIEW.POOL_SIZES is {list(node.POOL_SIZES)}: expected sizes of at least 1. Whole maps are "
                "always compared, and not listed."
            )
        if node.MID_CHANNELS < 1:
            raise DistillError(f"DISTILL.REVIEW.MID_CHANNELS is {node.MID_CHANNELS}: expected at least 1.")
        by_context = partial(hierarchical_context_loss, pool_sizes=tuple(node.POOL_SIZES))
        levels = shared_levels(node.LEVELS, student_shape, teacher_shape, "DISTILL.REVIEW.LEVELS")
        out_channels = [teacher_shape[level].channels for level in levels]
        _check_norm(node.NORM, {node.MID_CHANNELS, *out_channels})
        return {
            "levels": levels,
            "in_channels": [student_shape[level].channels for level in levels],
            "out_channels": out_channels,
            "mid_channels": node.MID_CHANNELS,
            "norm": node.NORM,
            "criterion": by_context if node.CRITERION == "HCL" else structural_criterion(cfg),
            **cls.weight_settings(node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> dict[str, Tensor]:
        features = [student.features[level] for level in self.levels]
        try:
            reviewed = self.review(features)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DistillError(
                f"Level {self.levels[-1]} is a single cell in this batch ({len(features[-1])} image), which batch norm "
                "cannot normalise. Train on larger images or more of them per process, leave the level out of "
                "DISTILL.REVIEW.LEVELS, or set DISTILL.REVIEW.NORM to 'GN'."
            ) from error
        target = [teacher.features[level] for level in self.levels]
        return {"loss_review": self.criterion(reviewed, target)}

"""FPN backbones for small students: the FPN on a network of another library, and slimmed ResNets."""

import itertools
import logging
import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..config import family, slim_config

logger = logging.getLogger(__name__)


def build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Detectron2's FPN, from MODEL.FPN, on all features of a network.

    Above the coarsest one, RetinaNet and FCOS get two strided convolutions (as in
    ``build_retinanet_resnet_fpn_backbone``), all others a max pooling (as in ``build_resnet_fpn_backbone``).

    Args:
        cfg: the full config.
        bottom_up: the network.

    Returns:
        The backbone, with levels named p2, p3, ... by the logarithm of their stride.
    """
    shape = bottom_up.output_shape()
    *_, coarsest = shape
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    if family(cfg.MODEL.META_ARCHITECTURE) in ("RetinaNet", "FCOS"):
        top_block = LastLevelP6P7(shape[coarsest].channels, out_channels, in_feature=coarsest)
    else:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{int(math.log2(shape[coarsest].stride))}"
    return FPN(
        bottom_up=bottom_up,
        in_features=list(shape),
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_slimmable_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet with an FPN, all of the ResNet's widths multiplied by MODEL.RESNETS.WIDTH_MULT.

    The FPN keeps its channels, so that a slim student's levels fit a wide teacher's. RetinaNet and FCOS get the levels
    of ``build_retinanet_resnet_fpn_backbone``, all others those of ``build_resnet_fpn_backbone``. For the capacities of
    multi-scale aligned distillation (arXiv 2109.04875).

    Args:
        cfg: the full config.
        input_shape: of the images.

    Returns:
        The backbone.

    Raises:
        DistillError: see :func:`distill.config.slim_config`.
    """
    cfg = slim_config(cfg)
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, input_shape)


def freeze_unused_levels(detector: nn.Module, compared: Sequence[str] = ()) -> None:
    """Freezes the convolutions of an FPN's first and last levels where nobody takes them.

    Detectron2's RetinaNet builders always make P7, which a detector on P2 to P6 leaves out, and a network's first stage
    may be finer than the heads' levels. A weight without gradient is an error on several GPUs.

    Args:
        detector: any; nothing is done to one with another kind of backbone, or whose heads do not name their levels.
        compared: levels that are used, besides those of the detector's heads.
    """
    whole = getattr(detector, "backbone", None)
    backbone = getattr(whole, "fpn", whole)
    top = getattr(backbone, "top_block", None)
    used = list(getattr(detector, "head_in_features", []))
    for part in ("proposal_generator", "roi_heads", "sem_seg_head"):
        for name in ("in_features", "mask_in_features", "keypoint_in_features"):
            used += getattr(getattr(detector, part, None), name, None) or []
    if not used:  # who knows what another kind of detector takes
        return
    used += compared
    unused = {}
    if isinstance(whole, FPN):  # an AlignedBackbone's half-size image takes the finest, too
        for level in itertools.takewhile(lambda level: level not in used, backbone.output_shape()):
            for part in ("lateral", "output"):
                name = f"fpn_{part}{level[1:]}"
                unused[name] = getattr(backbone, name, None)  # none of p6
    if isinstance(top, LastLevelP6P7):
        *_, p6, p7 = backbone.output_shape()
        if p7 not in used:
            unused["top_block.p7"] = top.p7
            if p6 not in used:
                unused["top_block.p6"] = top.p6
    unused = {name: conv for name, conv in unused.items() if conv is not None}
    for conv in unused.values():
        conv.requires_grad_(False)
    if unused:
        logger.info(f"Frozen, since neither the heads nor a distiller takes their levels: {', '.join(unused)}")

"""FPN backbones for small students: torchvision's classification networks, and slimmed ResNets."""

import itertools
import math
import os
from collections.abc import Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ..config import slim_config
from ..errors import DistillError

_PROBE = 256  # side of the image that the strides are read from, in pixels


class TorchvisionBackbone(Backbone):
    """Taps a torchvision classification network at chosen nodes; what lies behind the last one is dropped.

    Args:
        name: a name of torchvision.models.
        out_features: nodes of the network (see torchvision.models.feature_extraction), finest first. Their names
            are those of the features.
        norm: what takes the place of the network's batch norms, in Detectron2's terms. Statistics and affine
            weights are kept where the norm has them.
        weights: empty for random ones, a name of torchvision's weights, or a file with a state dict.
        freeze_at: as MODEL.BACKBONE.FREEZE_AT of Detectron2's ResNet: 0 freezes nothing, 1 the first convolution
            and its norm, k all up to out_features[k - 2].

    Raises:
        DistillError: no such network, node or weights, or the nodes' strides do not double from one to the next.
    """

    def __init__(
        self, name: str, out_features: Sequence[str], norm: str = "FrozenBN", weights: str = "", freeze_at: int = 0
    ) -> None:
        super().__init__()
        network = _build_network(name, weights)
        _freeze(network, out_features, freeze_at)
        self.body = _extractor(network, out_features)
        self._out_features = list(out_features)
        self._measure()
        _replace_batch_norms(self.body, norm)

    def _measure(self) -> None:
        """Reads channels and strides of the features off one empty image."""
        self.body.eval()
        with torch.no_grad():
            features = self.body(torch.zeros(1, 3, _PROBE, _PROBE))
        self.body.train()
        shapes = {k: tuple(v.shape) for k, v in features.items()}
        if any(len(shape) != 4 or _PROBE % shape[2] for shape in shapes.values()):
            raise DistillError(f"MODEL.TORCHVISION.OUT_FEATURES must be maps whose strides are whole; got {shapes}.")
        self._out_feature_channels = {k: shape[1] for k, shape in shapes.items()}
        self._out_feature_strides = {k: _PROBE // shape[2] for k, shape in shapes.items()}
        strides = list(self._out_feature_strides.values())
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
            raise DistillError(
                f"MODEL.TORCHVISION.OUT_FEATURES have strides {strides}; an FPN needs each to be twice the one before."
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: ``Tensor[N, 3, H, W]``, H and W multiples of the coarsest stride.

        Returns:
            The features by node, ``Tensor[N, C, H / stride, W / stride]``.
        """
        return self.body(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def _build_network(name: str, weights: str) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise DistillError(
            f"MODEL.TORCHVISION.NAME: torchvision has no classification network {name!r}. It has: {', '.join(known)}."
        )
    is_file = os.path.isfile(weights)
    try:
        network = torchvision.models.get_model(name, weights=weights if weights and not is_file else None)
        if is_file:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # a wrong name, a failed download, another network's weights
        raise DistillError(
            f"MODEL.TORCHVISION.WEIGHTS: cannot use {weights!r} for {name}: {error}. Give a file with its state dict, "
            "a name of torchvision's weights such as 'IMAGENET1K_V1' (needs internet unless it is cached), or ''."
        ) from error
    return network


def _extractor(network: nn.Module, out_features: Sequence[str]) -> nn.Module:
    try:
        if not out_features:
            raise ValueError
        return create_feature_extractor(network, list(out_features))
    except ValueError:
        nodes = get_graph_node_names(network)[0]
        raise DistillError(
            f"MODEL.TORCHVISION.OUT_FEATURES is {list(out_features)}: expected nodes of the network, at least one. "
            f"Its nodes are {', '.join(nodes)}; a module's name stands for its last node."
        ) from None


def _freeze(network: nn.Module, out_features: Sequence[str], freeze_at: int) -> None:
    if not 0 <= freeze_at <= len(out_features) + 1:
        raise DistillError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; with {len(out_features)} OUT_FEATURES it can be 0 to "
            f"{len(out_features) + 1}."
        )
    if freeze_at == 1:
        stem = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][:2]
        for module in stem[: 1 + isinstance(stem[1], nn.BatchNorm2d)]:
            module.requires_grad_(False)
    elif freeze_at > 1:
        # an extractor holds just the modules that its output depends on
        _extractor(network, out_features[freeze_at - 2 : freeze_at - 1]).requires_grad_(False)


def _replace_batch_norms(module: nn.Module, norm: str) -> None:
    """Puts ``norm`` in the place of trainable batch norms below ``module``, FrozenBN in that of frozen ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = not child.weight.requires_grad
            new = get_norm("FrozenBN" if frozen else norm, child.num_features) or nn.Identity()
            new.load_state_dict(child.state_dict(), strict=False)
            if hasattr(new, "eps"):
                new.eps = child.eps
            setattr(module, name, new)
        else:
            _replace_batch_norms(child, norm)


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
    if cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS"):
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
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on a torchvision network, from MODEL.TORCHVISION, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT.

    Args:
        cfg: the full config.
        input_shape: not used; backbone builders are given it.

    Returns:
        The backbone, see :func:`build_fpn`.

    Raises:
        DistillError: see :class:`TorchvisionBackbone`.
    """
    node = cfg.MODEL.TORCHVISION
    bottom_up = TorchvisionBackbone(
        node.NAME, node.OUT_FEATURES, node.NORM, node.WEIGHTS, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return build_fpn(cfg, bottom_up)


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
    """Freezes the convolutions of an FPN's last levels where nobody takes them.

    Detectron2's RetinaNet builders always make P7, which a detector on P2 to P6 leaves out. A weight without gradient
    is an error on several GPUs.

    Args:
        detector: any; nothing is done to one with another kind of backbone.
        compared: levels that are used, besides those of the detector's heads.
    """
    backbone = getattr(detector, "backbone", None)
    backbone = getattr(backbone, "fpn", backbone)
    top = getattr(backbone, "top_block", None)
    used = [*compared, *getattr(detector, "head_in_features", [])]
    for part in ("proposal_generator", "roi_heads"):
        used += getattr(getattr(detector, part, None), "in_features", [])
    if used and isinstance(top, LastLevelP6P7):
        *_, p6, p7 = backbone.output_shape()
        if p7 not in used:
            top.p7.requires_grad_(False)
            if p6 not in used:
                top.p6.requires_grad_(False)

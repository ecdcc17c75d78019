"""The multi-scale teacher of aligned distillation: Qi, Kuen, Gu et al., CVPR 2021, arXiv 2109.04875."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.transforms import ResizeTransform
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, META_ARCH_REGISTRY, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ..config import CLASS_NODES, detector_config
from ..errors import DistillError
from .backbones import freeze_unused_levels
from .fusion import CrossFeatureFusion
from .scaling import check_downsampling, downsample
from .wrapper import Wrapper, rename_state

SCALES = ("high", "low", "fused")


class AlignedBackbone(Wrapper, Backbone):
    """An FPN that fuses the pyramid of an image with that of the image at half its size.

    A level of the image, of stride s, is fused with the level of the half-size image whose own stride is s / 2: P3 with
    P2, and so on. The FPN's finest level has no counterpart at full size and is computed at half size only. Above an
    FPN that pools its last level (R-CNN's), one more is pooled at full size.

    Args:
        fpn: Detectron2's FPN.
        fusion: the module that fuses two aligned maps, for all levels.
        downsampling: how the half-size image comes from the normalised, padded one, see :func:`downsample`.
        scale: which pyramid ``forward`` returns: "high", "low" or "fused".

    Raises:
        DistillError: the backbone is no FPN of two levels or more, or an argument is unknown.
    """

    wrapped = "fpn"  # checkpointers look weights up by their names in the state dict

    def __init__(self, fpn: FPN, fusion: nn.Module, downsampling: str = "nearest", scale: str = "fused") -> None:
        super().__init__()
        if not isinstance(fpn, FPN) or len(fpn.in_features) < 2:
            raise DistillError(
                f"AlignedTeacher shifts the levels of an FPN by one, and its backbone is a {type(fpn).__name__}: "
                "expected Detectron2's FPN on two stages or more, such as build_retinanet_resnet_fpn_backbone."
            )
        check_downsampling(downsampling, "MODEL.ALIGNED_TEACHER.DOWNSAMPLING")
        if scale not in SCALES:
            raise DistillError(f"TEST.SCALES is {scale!r}: expected one of {', '.join(SCALES)}.")
        self.fpn = fpn
        self.fusion = fusion
        self.downsampling = downsampling
        self.scale = scale
        shape = fpn.output_shape()
        _, *self._out_features = shape
        self._pool = LastLevelMaxPool() if isinstance(fpn.top_block, LastLevelMaxPool) else None
        if self._pool:
            coarsest = shape[self._out_features[-1]]
            name = f"p{int(math.log2(coarsest.stride)) + 1}"
            self._out_features.append(name)
            shape[name] = ShapeSpec(channels=coarsest.channels, stride=2 * coarsest.stride)
        self._out_feature_channels = {name: shape[name].channels for name in self._out_features}
        self._out_feature_strides = {name: shape[name].stride for name in self._out_features}
        self._low_levels = dict(zip(self._out_features, shape))  # each level's finer neighbour
        self._size_divisibility = 2 * fpn.size_divisibility
        self._served: dict[str, Tensor] | None = None

    @property
    def size_divisibility(self) -> int:
        """What images are padded to, so that half their size is what the FPN wants."""
        return self._size_divisibility

    def high(self, images: Tensor) -> dict[str, Tensor]:
        """The pyramid of the whole images.

        Args:
            images: ``Tensor[N, 3, H, W]``, normalised and padded.

        Returns:
            By level ``Tensor[N, C, H / stride, W / stride]``.
        """
        fpn = copy.copy(self.fpn)  # with the same weights, but without its finest level, which nobody would use
        fpn.in_features, fpn._out_features = fpn.in_features[1:], fpn._out_features[1:]
        fpn.lateral_convs, fpn.output_convs = fpn.lateral_convs[:-1], fpn.output_convs[:-1]
        features = fpn(images)
        if self._pool:
            *_, coarsest = features.values()
            features[self._out_features[-1]] = self._pool(coarsest)[0]
        return features

    def low(self, images: Tensor) -> dict[str, Tensor]:
        """The pyramid of the half-size images, by the names of the levels that it is aligned with.

        Args:
            images: ``Tensor[N, 3, H / 2, W / 2]``, normalised and padded.

        Returns:
            By level ``Tensor[N, C, H / stride, W / stride]``, in the whole image's pixels.
        """
        features = self.fpn(images)
        return {name: features[own] for name, own in self._low_levels.items()}

    def fused(self, high: dict[str, Tensor], low: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both pyramids in one.

        Args:
            high: what :meth:`high` returned.
            low: what :meth:`low` returned.

        Returns:
            By level, tensors of the same shapes.
        """
        return {name: self.fusion(high[name], low[name]) for name in high}

    @contextlib.contextmanager
    def serving(self, features: dict[str, Tensor]) -> Iterator[None]:
        """Makes ``forward`` return given features, whatever the images.

        Args:
            features: by level.
        """
        self._served = features
        try:
            yield
        finally:
            self._served = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: ``Tensor[N, 3, H, W]``, normalised and padded.

        Returns:
            The pyramid of ``scale``, by level ``Tensor[N, C, H / stride, W / stride]``.
        """
        if self._served is not None:
            return self._served
        if self.scale == "high":
            return self.high(images)
        low = self.low(downsample(images, 2, self.downsampling))
        return low if self.scale == "low" else self.fused(self.high(images), low)


@BACKBONE_REGISTRY.register()
def build_aligned_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlignedBackbone:
    """The backbone of :class:`AlignedTeacher`, around that of MODEL.ALIGNED_TEACHER.BACKBONE.

    Args:
        cfg: the full config.
        input_shape: of the images.

    Returns:
        The backbone.

    Raises:
        DistillError: see :class:`AlignedBackbone`.
    """
    node = cfg.MODEL.ALIGNED_TEACHER
    fpn = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    fusion = CrossFeatureFusion(cfg.MODEL.FPN.OUT_CHANNELS, node.REDUCTION)
    return AlignedBackbone(fpn, fusion, node.DOWNSAMPLING, cfg.TEST.SCALES)


@META_ARCH_REGISTRY.register()
class AlignedTeacher(Wrapper):
    """A detector that is trained at full scale, at half scale and on a fusion of both, with one set of weights.

    To the outside it is the detector: its state dict has the detector's own keys, besides those under ``fusion.``, and
    attributes that it lacks are the detector's. arXiv 2109.04875, section 3.2.

    Args:
        detector: a Detectron2 detector on an :class:`AlignedBackbone`.
        fused_loss_weight: factor of the losses on the fused features.

    Raises:
        DistillError: the detector has another backbone.
    """

    wrapped = "detector"

    @configurable
    def __init__(self, *, detector: nn.Module, fused_loss_weight: float = 0.4) -> None:
        super().__init__()
        if not isinstance(detector.backbone, AlignedBackbone):
            raise DistillError(
                f"AlignedTeacher got a detector on a {type(detector.backbone).__name__}: expected an AlignedBackbone."
            )
        self.detector = detector
        self.loss_weights = {"high": 1.0, "low": 1.0, "fused": fused_loss_weight}
        inner = "detector.backbone."
        rename_state(self, [(f"{inner}fpn.", "backbone."), (f"{inner}fusion.", "fusion."), ("detector.", "")])

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arch = cfg.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE
        if arch not in CLASS_NODES:
            raise DistillError(
                f"MODEL.ALIGNED_TEACHER.META_ARCHITECTURE is {arch!r}: expected one of {', '.join(CLASS_NODES)}."
            )
        cfg = detector_config(cfg)
        cfg.MODEL.ALIGNED_TEACHER.BACKBONE = cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.NAME = "build_aligned_backbone"
        try:
            detector = build_model(cfg)
        except KeyError as error:
            nodes = [cfg.MODEL[node] for node in ("RPN", "ROI_HEADS", "RETINANET", "FCOS")]
            if not any(error.args[0] in node.IN_FEATURES for node in nodes):
                raise
            raise DistillError(
                f"AlignedTeacher's heads ask for {error}, which its backbone does not have: they take the FPN's levels "
                "but the finest, such as p3 to p7 of p2 to p7. Shift the IN_FEATURES of the heads, or let "
                "MODEL.FPN.IN_FEATURES begin one stage finer."
            ) from error
        freeze_unused_levels(detector)
        return {"detector": detector, "fused_loss_weight": cfg.MODEL.ALIGNED_TEACHER.FUSED_LOSS_WEIGHT}

    @property
    def fusion(self) -> nn.Module:
        """The module that fuses two aligned maps."""
        return self.detector.backbone.fusion

    def forward(self, batched_inputs: list[dict]) -> Any:
        """
        Args:
            batched_inputs: a batch in Detectron2's format.

        Returns:
            In training the detector's losses on each of the three pyramids, ``dict[str, Tensor[]]``, their names ending
            in ``_high``, ``_low`` and ``_fused``; in evaluation what the detector returns, on TEST.SCALES.
        """
        return self._losses(batched_inputs) if self.training else self._detect(batched_inputs)

    def _losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        backbone = self.detector.backbone
        device = self.detector.device  # moved once, or each of the detector's passes would
        batched_inputs = [{**x, "image": x["image"].to(device)} for x in batched_inputs]
        images = self.detector.preprocess_image(batched_inputs).tensor
        high, low = backbone.high(images), backbone.low(downsample(images, 2, backbone.downsampling))
        pyramids = {"high": high, "low": low, "fused": backbone.fused(high, low)}
        # a dense detector's running number of positive anchors, which are the same on all three, moves once a step
        before = {k: v for k, v in vars(self.detector).items() if k == "loss_normalizer"}
        losses = {}
        for scale, features in pyramids.items():
            vars(self.detector).pop("loss_normalizer", None)
            vars(self.detector).update(before)
            with backbone.serving(features):
                own = self.detector(batched_inputs)
            losses.update({f"{name}_{scale}": loss * self.loss_weights[scale] for name, loss in own.items()})
        return losses

    def _detect(self, batched_inputs: list[dict]) -> list[dict]:
        """Detects on the pyramid of TEST.SCALES; half-size images are made by Detectron2's own resize, as a
        deployed student gets them."""
        backbone = self.detector.backbone
        own = backbone.size_divisibility // 2  # what the detector alone pads to
        if backbone.scale == "high":
            with _padding_to(backbone, own):
                return self.detector(batched_inputs)
        sizes = [tuple(map(int, x["image"].shape[-2:])) for x in batched_inputs]  # tensors while fvcore counts
        small = [_resize(x["image"], -(-h // 2), -(-w // 2)) for x, (h, w) in zip(batched_inputs, sizes)]
        halves = [{**x, "image": image} for x, image in zip(batched_inputs, small)]
        with _padding_to(backbone, own):
            images = self.detector.preprocess_image(halves).tensor
        features = backbone.low(images)
        inputs = [{"height": h, "width": w, **x} for x, (h, w) in zip(batched_inputs, sizes)]
        if backbone.scale == "fused":
            images = self.detector.preprocess_image(inputs).tensor
            features = backbone.fused(backbone.high(images), features)
        else:  # boxes end where the half-size image does, which for odd sizes is half a pixel further
            for x, image in zip(inputs, small):
                x["image"] = image.new_zeros(()).expand(3, 2 * image.shape[-2], 2 * image.shape[-1])
        with backbone.serving(features):
            return self.detector(inputs)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resizes ``Tensor[C, H, W]`` as Detectron2's data loader does."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    resized = ResizeTransform(*pixels.shape[:2], height, width).apply_image(pixels)
    return torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))


@contextlib.contextmanager
def _padding_to(backbone: AlignedBackbone, divisibility: int) -> Iterator[None]:
    own, backbone._size_divisibility = backbone._size_divisibility, divisibility
    try:
        yield
    finally:
        backbone._size_divisibility = own

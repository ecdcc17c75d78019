"""Detectron2's FCOS, made buildable from a yaml config."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS as _FCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


class FCOS(_FCOS):
    """Detectron2's FCOS, which on v0.6 cannot label an image without boxes, and cannot train in mixed precision, where
    its boxes and the annotations differ in type: this one can."""

    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> tuple[list, list]:
        """See the base class. An image without boxes is given one that lies outside and that no point matches."""
        return super().label_anchors(anchors, [x if len(x) else self._unmatched(x) for x in gt_instances])

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list,
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """See the base class. Predictions count in float32."""
        logits, deltas, centerness = (
            [level.float() for level in levels] for levels in (pred_logits, pred_anchor_deltas, pred_centerness)
        )
        return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)

    def _unmatched(self, instances: Instances) -> Instances:
        return Instances(
            instances.image_size,
            gt_boxes=Boxes(torch.full((1, 4), -1.0, device=self.device)),
            gt_classes=torch.zeros(1, dtype=torch.int64, device=self.device),
        )


def build_fcos(cfg: CfgNode) -> FCOS:
    """Builds FCOS from ``MODEL.FCOS``; Detectron2 itself has it for Python configs only.

    Args:
        cfg: the full config.

    Returns:
        The detector, not yet on MODEL.DEVICE.
    """
    node = cfg.MODEL.FCOS
    backbone = build_backbone(cfg)
    shape = backbone.output_shape()
    in_shape = [shape[level] for level in node.IN_FEATURES]
    detector = FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=in_shape,
            num_classes=node.NUM_CLASSES,
            conv_dims=[in_shape[0].channels] * node.NUM_CONVS,
            norm=_group_norm if node.NORM == "GN" else node.NORM,
            prior_prob=node.PRIOR_PROB,
        ),
        head_in_features=list(node.IN_FEATURES),
        num_classes=node.NUM_CLASSES,
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    detector.input_format = cfg.INPUT.FORMAT  # its drawing asks for it
    return detector


def _group_norm(channels: int) -> nn.GroupNorm:
    """Detectron2's "GN", also for fewer than its 32 groups: RetinaNetHead tries a norm on one channel first."""
    return nn.GroupNorm(min(32, channels), channels)


if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY._do_register("FCOS", build_fcos)

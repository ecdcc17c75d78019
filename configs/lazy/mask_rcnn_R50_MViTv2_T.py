"""Mask R-CNN R50, taught by Mask R-CNN on MViTv2-T (box AP 48.3), COCO.

The teacher's config is in a source checkout of Detectron2's main branch; timm must be installed:
--teacher-config DETECTRON2/projects/MViTv2/configs/mask_rcnn_mvitv2_t_3x.py
"""

from .mask_rcnn_R50 import dataloader, lr_multiplier, model, optimizer, train

distill = dict(
    TEACHER=dict(
        CONFIG_FILE="",
        WEIGHTS="https://dl.fbaipublicfiles.com/detectron2/MViTv2/mask_rcnn_mvitv2_t_3x/f307611773/"
        "model_final_1a1c30.pkl",
    ),
    DISTILLERS=["ReviewDistiller"],
    REVIEW=dict(LOSS_WEIGHT=0.8),
)
train.output_dir = "output/lazy/mask_rcnn_R50_MViTv2_T"

"""Mask R-CNN R50, taught by Cascade R-CNN on ViTDet-B (box AP 54.0), COCO.

The teacher's config is in a source checkout of Detectron2's main branch; timm must be installed:
--teacher-config DETECTRON2/projects/ViTDet/configs/COCO/cascade_mask_rcnn_vitdet_b_100ep.py
"""

from .mask_rcnn_R50 import dataloader, lr_multiplier, model, optimizer, train

# the teacher pads to a square of 1024 pixels
dataloader.train.mapper.augmentations[0].update(short_edge_length=(640, 672, 704, 736, 768), max_size=1024)
distill = dict(
    TEACHER=dict(
        CONFIG_FILE="",
        WEIGHTS="https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_vitdet_b/f325358525/"
        "model_final_435fa9.pkl",
    ),
    DISTILLERS=["ReviewDistiller"],
    REVIEW=dict(LOSS_WEIGHT=0.8),
)
train.output_dir = "output/lazy/mask_rcnn_R50_cascade_ViTDet_B"

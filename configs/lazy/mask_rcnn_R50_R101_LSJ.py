"""Mask R-CNN R50, taught by Detectron2's best R101-FPN (large-scale jitter, 400 epochs, box AP 48.9), COCO."""

from .mask_rcnn_R50 import dataloader, lr_multiplier, model, optimizer, train

distill = dict(
    TEACHER=dict(CONFIG_FILE="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),  # and the model zoo's weights
    DISTILLERS=["ReviewDistiller"],
    REVIEW=dict(LOSS_WEIGHT=0.8),
)
train.output_dir = "output/lazy/mask_rcnn_R50_R101_LSJ"

"""Mask R-CNN R50, taught by Cascade R-CNN on ViTDet-L (box AP 57.6), COCO.

The teacher's config is in a source checkout of Detectron2's main branch; timm must be installed:
--teacher-config DETECTRON2/projects/ViTDet/configs/COCO/cascade_mask_rcnn_vitdet_l_100ep.py
"""

from .mask_rcnn_R50_cascade_ViTDet_B import dataloader, distill, lr_multiplier, model, optimizer, train

distill.TEACHER.WEIGHTS = (
    "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28.pkl"
)
train.output_dir = "output/lazy/mask_rcnn_R50_cascade_ViTDet_L"

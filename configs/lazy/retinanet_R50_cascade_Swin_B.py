"""RetinaNet R50, taught by Cascade R-CNN on Swin-B (box AP 53.9), COCO, by Pearson correlation (PKD).

PKD, arXiv 2207.02039, reports 37.4 -> 41.5 for this student from a Swin teacher of its own, over 24 epochs, with its
levels paired in another way (docs/methods.md). The teacher's config is in a source checkout of Detectron2's main
branch; timm must be installed:
--teacher-config DETECTRON2/projects/ViTDet/configs/COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py
"""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model = _zoo.model
dataloader = _zoo.dataloader
optimizer = _zoo.optimizer
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train = _zoo.train
train.max_iter = 180000

# the teacher pads to a square of 1024 pixels
dataloader.train.mapper.augmentations[0].update(short_edge_length=(640, 672, 704, 736, 768), max_size=1024)
distill = dict(
    TEACHER=dict(
        CONFIG_FILE="",
        WEIGHTS="https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_swin_b_in21k/f342979038/"
        "model_final_246a82.pkl",
    ),
    DISTILLERS=["PearsonDistiller"],
    PEARSON=dict(LOSS_WEIGHT=6.0),
)
train.output_dir = "output/lazy/retinanet_R50_cascade_Swin_B"

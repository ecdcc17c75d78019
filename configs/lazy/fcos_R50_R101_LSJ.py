"""FCOS R50, taught by Detectron2's best R101-FPN, a Mask R-CNN (box AP 48.9), COCO, by Pearson correlation (PKD)."""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model = _zoo.model
dataloader = _zoo.dataloader
optimizer = _zoo.optimizer
lr_multiplier = _zoo.lr_multiplier
train = _zoo.train

distill = dict(
    TEACHER=dict(CONFIG_FILE="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),  # and the model zoo's weights
    DISTILLERS=["PearsonDistiller"],
    PEARSON=dict(LOSS_WEIGHT=6.0),
)
train.output_dir = "output/lazy/fcos_R50_R101_LSJ"

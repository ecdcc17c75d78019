"""The student of most pairs here: Detectron2's Mask R-CNN R50-FPN, 1x, COCO. It is a config of its own, too."""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model = _zoo.model
dataloader = _zoo.dataloader
optimizer = _zoo.optimizer
lr_multiplier = _zoo.lr_multiplier
train = _zoo.train
train.output_dir = "output/lazy/mask_rcnn_R50"

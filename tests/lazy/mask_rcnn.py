"""A small Mask R-CNN on digit scenes, from Detectron2's own Python config."""

from detectron2 import model_zoo

from .shrink import shrink_data, shrink_rcnn, shrink_resnet

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, optimizer, lr_multiplier, train = (
    _zoo[name] for name in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
shrink_resnet(model)
shrink_rcnn(model, classes=10)
shrink_data(dataloader)
optimizer.lr = 0.001
train.init_checkpoint = ""
train.max_iter = 2
train.seed = 1
train.eval_period = 0
del dataloader.evaluator

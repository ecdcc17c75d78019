"""A small FCOS on digit scenes, from Detectron2's own Python config."""

from detectron2 import model_zoo

from .mask_rcnn import dataloader, lr_multiplier, optimizer, train
from .shrink import shrink_dense, shrink_resnet

model = model_zoo.get_config("common/models/fcos.py").model
shrink_resnet(model)
shrink_dense(model, classes=10)
dataloader.train.mapper.use_instance_mask = False

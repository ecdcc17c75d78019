"""Makes the models of Detectron2's Python configs small enough for tests."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

CHANNELS, CLASSES = 16, 3
DENSE_CHANNELS = 32  # group norm has 32 groups


def shrink_resnet(model, norm="FrozenBN"):
    """ResNet-18, which has no choice of where its stride is."""
    stages = model.backbone.bottom_up.stages
    stages.depth = 18
    stages.pop("stride_in_1x1", None)
    stages.norm = model.backbone.bottom_up.stem.norm = norm
    model.backbone.bottom_up.freeze_at = 0
    model.pixel_std = [58.0, 57.0, 57.0]  # a random ResNet enlarges what it gets


def shrink_rcnn(model, channels=CHANNELS, classes=CLASSES):
    """The FPN's width, the proposals and the heads of an R-CNN."""
    model.backbone.out_channels = channels
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.head.in_channels = channels
    rpn.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
    rpn.pre_nms_topk, rpn.post_nms_topk = (50, 50), (50, 20)
    heads.num_classes, heads.batch_size_per_image = classes, 16
    box_heads = heads.box_heads if "box_heads" in heads else [heads.box_head]
    predictors = heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]
    for head, predictor in zip(box_heads, predictors):
        head.input_shape = ShapeSpec(channels=channels, height=7, width=7)
        head.conv_dims, head.fc_dims = [channels for _ in head.conv_dims[:1]], [32]
        predictor.input_shape = ShapeSpec(channels=32)
    if "mask_head" in heads:
        heads.mask_head.input_shape = ShapeSpec(channels=channels, width=14, height=14)
        heads.mask_head.conv_dims = [channels, channels]


def shrink_dense(model, classes=CLASSES):
    """The FPN's width and the head of RetinaNet or FCOS."""
    model.backbone.out_channels = DENSE_CHANNELS
    model.backbone.top_block.in_channels = DENSE_CHANNELS if "in_feature" in model.backbone.top_block else 512
    model.head.input_shape = [ShapeSpec(channels=DENSE_CHANNELS)] * 5
    model.head.conv_dims = [DENSE_CHANNELS]
    model.num_classes = classes


def shrink_data(dataloader, size=64, batch=2):
    """Digit scenes at a small size, and no worker processes."""
    for part, name in ((dataloader.train, "digit_scenes_train"), (dataloader.test, "digit_scenes_val")):
        part.dataset.names = name
        part.num_workers = 0
        part.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=size, max_size=size)]
    dataloader.train.mapper.instance_mask_format = "bitmask"
    dataloader.train.total_batch_size = batch

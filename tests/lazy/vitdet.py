"""A tiny ViTDet: two blocks, 64 channels, images padded to a square of 256 pixels. On Detectron2's main branch only."""

from detectron2 import model_zoo

from .shrink import CHANNELS, shrink_rcnn

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.update(
    img_size=256, embed_dim=64, depth=2, num_heads=2, window_size=4, window_block_indexes=[0], drop_path_rate=0.5
)
model.backbone.out_channels, model.backbone.square_pad = CHANNELS, 256
shrink_rcnn(model)

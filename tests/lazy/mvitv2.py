"""A tiny MViTv2 under an FPN. On Detectron2's main branch only."""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import MViT
from torch import nn

from .shrink import shrink_rcnn

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
_constants = model_zoo.get_config("common/data/constants.py").constants
model.pixel_mean, model.pixel_std = _constants.imagenet_rgb256_mean, _constants.imagenet_rgb256_std
model.input_format = "RGB"
model.backbone.bottom_up = L(MViT)(
    img_size=256,
    embed_dim=16,
    depth=4,
    num_heads=1,
    last_block_indexes=(0, 1, 2, 3),
    residual_pooling=True,
    drop_path_rate=0.5,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    out_features=("scale2", "scale3", "scale4", "scale5"),
)
model.backbone.in_features = "${.bottom_up.out_features}"
shrink_rcnn(model)

"""A tiny Swin under an FPN, images padded to a square of 256 pixels. On Detectron2's main branch only."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from .shrink import shrink_rcnn

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
_constants = model_zoo.get_config("common/data/constants.py").constants
model.pixel_mean, model.pixel_std = _constants.imagenet_rgb256_mean, _constants.imagenet_rgb256_std
model.input_format = "RGB"
model.backbone.bottom_up = L(SwinTransformer)(
    depths=[1, 1, 2, 1], drop_path_rate=0.5, embed_dim=16, num_heads=[1, 2, 4, 8], window_size=4
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.square_pad = 256
shrink_rcnn(model)

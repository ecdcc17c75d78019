"""The small model of a new baseline: SyncBN, NaiveSyncBN in the heads. NAME is replaced."""

from detectron2 import model_zoo

from .shrink import shrink_rcnn, shrink_resnet

model = model_zoo.get_config("new_baselines/mask_rcnn_NAME_FPN_100ep_LSJ.py").model
if "stages" in model.backbone.bottom_up:
    shrink_resnet(model, "SyncBN")
else:
    model.backbone.bottom_up.update(depth=13, w_a=36.44, w_0=24, w_m=2.49, group_width=8)  # 200 MF
shrink_rcnn(model)

"""The imitation distiller in a model."""

import math

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.helpers import detector_cfg, distillation_cfg, random_batch, write_teacher


def test_weights_of_cells_count_within_its_region(tmp_path):
    teacher = write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24))
    settings = {"DISTILL.DISTILLERS": ["ImitationDistiller"], "DISTILL.IMITATION.REGION": "boxes"}
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), teacher, **settings)).train()
    imitation, seen = model.distillers["ImitationDistiller"], []
    imitation.register_forward_hook(lambda module, views, losses: seen.extend([*views, losses["loss_imitation"]]))
    batch = random_batch((64, 96), (61, 75))
    with EventStorage():
        model(batch)
    student, teacher, alone = seen
    given = {level: torch.rand(2, 1, *teacher.features[level].shape[2:]) for level in imitation.levels}
    for weights, loss in ((None, alone), (given, imitation(student, teacher, given)["loss_imitation"])):
        parts = []
        for level in imitation.levels:
            target, stride = teacher.features[level], teacher.strides[level]
            cells = torch.zeros(2, 1, *target.shape[2:])
            for index, record in enumerate(batch):
                for x0, y0, x1, y1 in (record["instances"].gt_boxes.tensor / stride).tolist():
                    cells[index, :, int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = 1
            cells = cells if weights is None else cells * weights[level]
            difference = (imitation.adaptation[level](student.features[level]) - target).square().mean(1, keepdim=True)
            parts.append((difference * cells).sum() / cells.sum())
        torch.testing.assert_close(loss, torch.stack(parts).mean())

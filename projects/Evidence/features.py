#!/usr/bin/env python3
"""What a teacher's features are made of, and so what a squared error to them teaches.

    python projects/Evidence/features.py --config-file output/evidence/.../config.yaml MODEL.WEIGHTS WEIGHTS

For each level of the FPN, over the first images of DATASETS.TRAIN: the variance (around each channel's mean) of the
cells that touch a ground-truth box and of the others, and how much of the whole variance lies along one direction, and
between images (the variance of an image's mean).
"""

import argparse

import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import Tensor

from distill.config import load_config, student_config
from distill.data import register_from_config
from distill.losses import region_weights
from distill.modeling.checkpoint import load_detector


def describe(features: Tensor, inside: Tensor) -> tuple[float, float, float, float]:
    """Where the variance of a level is.

    Args:
        features: ``Tensor[N, C, H, W]``.
        inside: ``Tensor[N, H, W]``, bool: the cells that touch an object.

    Returns:
        The mean square around the channels' means of the cells inside and of those outside, and of the variance the
        share of the first principal component, and that of the images' means.
    """
    cells = features.double().permute(0, 2, 3, 1)
    cells = cells - cells.mean((0, 1, 2))
    flat = cells.flatten(0, 2)
    variances = torch.linalg.eigvalsh(flat.T @ flat)
    outside = ~inside
    return (
        cells[inside].square().mean().item(),
        cells[outside].square().mean().item(),
        (variances[-1] / variances.sum()).item(),
        (cells.mean((1, 2)).square().mean() / cells.square().mean()).item(),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger(name="distill")
    cfg = student_config(load_config(args.config_file, args.opts))
    register_from_config(cfg)
    model = load_detector(cfg, "detector").eval()
    mapper = DatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False))
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)[: args.images]
    inputs = [mapper(record) for record in records]
    boxes = [x["instances"].gt_boxes.tensor for x in inputs]
    rows = []
    features = model.backbone(model.preprocess_image(inputs).tensor)
    for name, shape in model.backbone.output_shape().items():
        level = features[name].cpu()
        inside = region_weights(boxes, level.shape[-2:], shape.stride, "boxes")[:, 0] > 0
        rows.append([name, inside.double().mean().item(), *describe(level, inside)])
    headers = ["level", "share of cells on objects", "variance there", "variance elsewhere", "first component"]
    print(tabulate(rows, [*headers, "between images"], tablefmt="pipe", floatfmt=".2f"))


if __name__ == "__main__":
    main()

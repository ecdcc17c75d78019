#!/usr/bin/env python3
"""Draws the prototypes of a run of global knowledge: for each class a sheet of the image crops that were picked.

    python tools/show_prototypes.py --config-file output/CONFIG/config.yaml --weights output/CONFIG/model_final.pth \\
        --output DIR [--classes NAME ...]

A row for each FPN level, the picks in their order from left to right.
"""

import argparse
import logging
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from torch import Tensor

from distill.data import register_from_config
from distill.errors import DistillError
from distill.recipes import load_recipe

logger = logging.getLogger("detectron2.prototypes")

KEY = ".prototypes.levels."


def read_prototypes(path: str) -> dict[str, dict[str, Tensor]]:
    """The prototypes that a checkpoint holds.

    Args:
        path: a checkpoint of a run with GlobalKnowledgeDistiller.

    Returns:
        For each level "labels", "images" and "boxes", see :class:`distill.prototypes.bank.LevelPrototypes`.

    Raises:
        DistillError: the file cannot be read or holds no prototypes.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True).get("model", {})
    except Exception as error:  # whatever torch raises for a missing or damaged file
        raise DistillError(f"Cannot read the checkpoint {path!r}: {error}. Give a run's model_final.pth.") from error
    owners = {key.partition(KEY)[0] for key in state if KEY in key}
    if len(owners) > 1:
        raise DistillError(f"The checkpoint {path!r} holds the prototypes of several distillers: {', '.join(owners)}.")
    levels: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if KEY in key:
            level, _, name = key.partition(KEY)[2].partition(".")
            levels.setdefault(level, {})[name] = value
    if not any((kept["labels"] >= 0).any() for kept in levels.values()):
        raise DistillError(
            f"The checkpoint {path!r} holds no prototypes: expected one of a run with GlobalKnowledgeDistiller, saved "
            "after its first search."
        )
    return levels


def draw_class(
    levels: dict[str, dict[str, Tensor]], label: int, name: str, images: list[dict], margin: float, path: Path
) -> int:
    """Draws the prototypes of a class.

    Args:
        levels: what :func:`read_prototypes` returns.
        label: the class.
        name: its name.
        images: the training images, in Detectron2's dataset format.
        margin: how much of the surroundings a crop shows, as a share of the box's size on each side.
        path: the PNG to write.

    Returns:
        How many prototypes it has; none are drawn if it is 0.
    """
    picks = {level: (kept["labels"] == label).nonzero()[:, 0] for level, kept in levels.items()}
    most = max(len(rows) for rows in picks.values())
    if not most:
        return 0
    figure, axes = plt.subplots(len(levels), most, figsize=(1.1 * most + 0.6, 1.1 * len(levels) + 0.4), squeeze=False)
    for row, (level, rows) in zip(axes, picks.items()):
        for axis in row:
            axis.axis("off")
        row[0].text(-0.1, 0.5, level, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
        for axis, index in zip(row, rows.tolist()):
            image = read_image(images[int(levels[level]["images"][index])]["file_name"], "RGB")
            x0, y0, x1, y1 = levels[level]["boxes"][index].tolist()
            dx, dy = margin * (x1 - x0), margin * (y1 - y0)
            height, width = image.shape[:2]
            rows_shown = slice(max(int(y0 - dy), 0), min(int(y1 + dy) + 1, height))
            columns_shown = slice(max(int(x0 - dx), 0), min(int(x1 + dx) + 1, width))
            axis.imshow(image[rows_shown, columns_shown])
    figure.suptitle(name, fontsize=10)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return sum(len(rows) for rows in picks.values())


def show(config_file: str, weights: str, output: str, only: list[str], margin: float, opts: list[str]) -> None:
    """Writes a sheet for each class.

    Args:
        config_file: the config that the run was trained with, for its datasets.
        weights: its checkpoint.
        output: the folder to write.
        only: names of classes; empty for all.
        margin: see :func:`draw_class`.
        opts: overrides of the config.

    Raises:
        DistillError: the checkpoint holds no prototypes, or a class does not exist.
    """
    levels = read_prototypes(weights)
    recipe = load_recipe(config_file, opts)
    cfg = recipe.cfg
    register_from_config(cfg)
    images = recipe.training_images()
    last = max(int(kept["images"].max()) for kept in levels.values())
    if last >= len(images):
        raise DistillError(
            f"A prototype is of image {last}, but {', '.join(cfg.DATASETS.TRAIN)} has {len(images)} images: give the "
            "config that this checkpoint was trained with."
        )
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    unknown = [name for name in only if name not in names]
    if unknown:
        raise DistillError(f"--classes names {', '.join(unknown)}, but the classes are {', '.join(names)}.")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(names):
        if not only or name in only:
            path = folder / f"{label:03d}_{''.join(c if c.isalnum() else '_' for c in name)}.png"
            count = draw_class(levels, label, name, images, margin, path)
            logger.info(f"{name}: {f'{count} prototypes, {path}' if count else 'no prototypes'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--classes", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--margin", type=float, default=0.3, help="surroundings of a box, as a share of its size")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger()
    try:
        show(args.config_file, args.weights, args.output, args.classes, args.margin, args.opts)
    except DistillError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes a distilled student as plain Detectron2 reads it: a config and a checkpoint, no teacher, no distillers.

    python tools/export_student.py --config-file CONFIG --weights W --output DIR

``DIR/config.yaml`` holds Detectron2's own keys only, unless the student itself is an FCOS or stands on a backbone of
timm: then ``MODEL.FCOS`` or ``MODEL.TIMM`` stays, and who loads it imports ``distill.modeling`` and calls
``add_distill_config`` first. For a Python config, ``DIR/config.yaml`` is read by ``LazyConfig.load``; a config that
cannot be dumped, as with functions in it, is written as ``DIR/config.py``, which loads the original file.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger

import distill.modeling  # noqa: F401  registers its backbones and meta-architectures
from distill.errors import DistillError
from distill.modeling.checkpoint import load_detector
from distill.recipes import YamlRecipe, explain, load_recipe

logger = logging.getLogger("detectron2.export")


def export(config_file: str, weights: str, output: str, opts: list[str]) -> None:
    """Exports one student.

    Args:
        config_file: the config that it was trained with, such as OUTPUT_DIR/config.yaml.
        weights: its checkpoint.
        output: the folder to write.
        opts: overrides of the config.

    Raises:
        DistillError: the checkpoint does not fill the student.
    """
    recipe = load_recipe(config_file, opts).plain()
    cfg = recipe.cfg
    device, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE, "cpu", weights
    model = load_detector(recipe, "student")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.MODEL.DEVICE = device
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    written = recipe.write(str(folder), str(folder / "model_final.pth"))
    logger.info(f"{folder} holds {Path(written).name} and model_final.pth")
    ours = [key for key in ("FCOS", "TIMM") if key in cfg.MODEL]
    if ours and isinstance(recipe, YamlRecipe):
        logger.info(
            f"The student is built from MODEL.{' and MODEL.'.join(ours)}: to load it, import distill.modeling and call "
            "distill.add_distill_config(cfg) before cfg.merge_from_file."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger()
    try:
        export(args.config_file, args.weights, args.output, args.opts)
    except DistillError as error:
        sys.exit(f"error: {explain(error, args.config_file)}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Draws what a detector finds on images, be it a checkpoint with its config or a file of tools/export_student.py.

    python tools/predict.py --weights exported/model.onnx --input photo.jpg folder --output drawn
    python tools/predict.py --weights W --config-file CONFIG --input folder --output drawn --json detections.json

The JSON is COCO's (images, annotations with scores, categories), with the detections of every score. Of a distilled
run's checkpoint, the detector is the student.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pycocotools.mask as mask_util
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from drawing import DRAWN_PIXELS, LONGEST_PIXELS, MIN_SCORE, plain_text
from PIL import Image
from torch import nn
from tqdm import tqdm

import distill.modeling  # noqa: F401  registers its backbones and meta-architectures
from distill.config import check_output_dir
from distill.data import register_from_config, seen_path
from distill.errors import DistillError
from distill.export import build_input_mapper, class_names, load_deployed
from distill.modeling.checkpoint import load_detector
from distill.recipes import explain, load_recipe

logger = logging.getLogger("detectron2.predict")

EXPORTED = (".ts", ".onnx")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def load(weights: str, config_file: str, opts: Sequence[str]) -> tuple[nn.Module, Callable[[dict], dict], list[str]]:
    """Loads a detector of any kind.

    Args:
        weights: a checkpoint, or an exported file.
        config_file: of a checkpoint.
        opts: overrides of the config.

    Returns:
        The detector in evaluation mode, what reads an image for it, and the names of its classes.

    Raises:
        DistillError: the weights cannot be loaded, or a config is missing or of no use.
    """
    if weights.endswith(EXPORTED):
        if config_file or opts:
            raise DistillError(f"{weights} contains its own settings: leave out --config-file and overrides.")
        detector = load_deployed(weights)
        if not detector.metadata.knows_resizing:
            logger.warning(
                f"{weights} does not say how its images are resized, so they stay as they are: its config resizes for "
                "testing in a way of its own. Give images that are resized so, or export it with --size HEIGHT WIDTH."
            )
        return detector.eval(), build_input_mapper(detector.metadata), detector.metadata.class_names
    if not config_file:
        raise DistillError(
            f"{weights} is taken for a checkpoint, which needs --config-file. Exported files end in .ts or .onnx."
        )
    recipe = load_recipe(config_file, opts)
    for sets in (recipe.cfg.DATASETS.TEST, recipe.cfg.DATASETS.TRAIN):  # either names the classes
        try:
            register_from_config(recipe.cfg, sets)
            break
        except DistillError as error:
            logger.warning(f"The classes may lack their names: {error}")
    names = class_names(recipe)
    own = recipe.detector(weights)
    if own.cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        own.cfg.MODEL.DEVICE = "cpu"
    return load_detector(own, "detector").eval(), recipe.build_mapper(), names


def find_images(inputs: Sequence[str], output: Path) -> dict[Path, Path]:
    """The images to draw on.

    Args:
        inputs: images, and folders of images.
        output: the folder for the drawn ones.

    Returns:
        The file to write for each image.

    Raises:
        DistillError: there is no such file or folder, a folder has no image, or a drawn image would overwrite an image
            or another drawn one.
    """
    images: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
            if not found:
                raise DistillError(f"The folder {path} has no image ({', '.join(IMAGES)}).")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise DistillError(f"--input {path} is neither a file nor a folder.")
    given = {path.resolve() for path in images}
    targets: dict[Path, Path] = {}
    drawn: set[Path] = set()
    for path in dict.fromkeys(images):
        target = output / (path.name if path.suffix.lower() in IMAGES else f"{path.name}.png")
        if target.resolve() in given:
            raise DistillError(f"Drawing into {output} would overwrite the image {target}: give another --output.")
        if target in drawn:
            raise DistillError(f"Two images are called {path.name}: draw them one by one, into folders of their own.")
        targets[path] = target
        drawn.add(target)
    return targets


def draw(path: Path, instances: Instances, metadata: Metadata, target: Path) -> None:
    """Draws detections.

    Args:
        path: the image.
        instances: what to draw.
        metadata: has the names of the classes.
        target: the file to write.
    """
    image = read_image(seen_path(str(path)), "RGB")
    height, width = image.shape[:2]
    scale = max(1.0, min(DRAWN_PIXELS / min(height, width), LONGEST_PIXELS / max(height, width)))
    drawn = Visualizer(image, metadata, scale).draw_instance_predictions(instances)
    Image.fromarray(drawn.get_image()).save(target)


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    """Runs the detector on all images. One that cannot be read does not stop the others.

    Args:
        args: the parsed command line.

    Raises:
        DistillError: see :func:`load` and :func:`find_images`; or some images cannot be read.
    """
    targets = find_images(args.input, args.output)
    model, mapper, names = load(args.weights, args.config_file, args.opts)
    metadata = Metadata(thing_classes=[plain_text(name) for name in names])
    check_output_dir(str(args.output), "--output")
    if args.json:
        check_output_dir(str(args.json.parent), "--json's folder")
        if args.json.is_dir():
            raise DistillError(f"--json is {str(args.json)!r}, which is a folder: name a file.")
    content: dict[str, list[dict]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    }
    unreadable = []
    try:
        for path, target in tqdm(targets.items(), "images", unit="image"):
            try:
                item = mapper({"file_name": seen_path(str(path))})
            except DistillError as error:
                unreadable.append(f"{path} ({error.__cause__ or error})")
                continue
            instances = model([item])[0]["instances"].to("cpu")
            image_id = len(content["images"])
            size = {"height": item["height"], "width": item["width"]}
            content["images"].append({"id": image_id, "file_name": str(path), **size})
            content["annotations"] += instances_to_coco_json(instances, image_id)
            draw(path, instances[instances.scores >= args.min_score], metadata, target)
    finally:
        if args.json:
            write_json(content, args.json)
    logger.info(f"{len(content['images'])} drawn images are in {args.output}")
    if unreadable:
        raise DistillError(f"{len(unreadable)} of {len(targets)} images cannot be read: {', '.join(unreadable)}")


def write_json(content: dict[str, list[dict]], path: Path) -> None:
    """Writes detections as pycocotools reads annotations.

    Args:
        content: COCO's, but for what an annotation has beside a detection.
        path: the file to write.
    """
    for index, found in enumerate(content["annotations"], 1):
        mask, (_, _, width, height) = found.get("segmentation"), found["bbox"]
        found.update(id=index, area=float(mask_util.area(mask)) if mask else width * height, iscrowd=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a checkpoint, or an exported file (.ts, .onnx)")
    parser.add_argument("--config-file", default="", help="of a checkpoint")
    parser.add_argument("--input", required=True, nargs="+", help="images, and folders of images")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for the drawn images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the detections, too")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of what is drawn, default: %(default)s")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ..., overrides of the config")
    args = parser.parse_args()
    setup_logger()
    setup_logger(name="distill")
    try:
        predict(args)
    except DistillError as error:
        sys.exit(f"error: {explain(error, args.config_file)}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes a distilled student without teacher and distillers: as plain Detectron2 reads it, or as TorchScript or ONNX.

    python tools/export_student.py --config-file CONFIG --weights W --output DIR
    python tools/export_student.py --config-file CONFIG --weights W --output DIR --format onnx --evaluate

The first writes a config and a checkpoint. ``DIR/config.yaml`` holds Detectron2's own keys only, unless the student
itself is an FCOS or stands on a backbone of timm: then ``MODEL.FCOS`` or ``MODEL.TIMM`` stays, and who loads it imports
``distill.modeling`` and calls ``add_distill_config`` first. For a Python config, ``DIR/config.yaml`` is read by
``LazyConfig.load``; a config that cannot be dumped, as with functions in it, is written as ``DIR/config.py``, which
loads the original file.

The others write ``DIR/model.ts`` or ``DIR/model.onnx``, run it on images of DATASETS.TEST, and compare what it finds
with the student in PyTorch. See docs/deployment.md.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger
from torch import nn

import distill.modeling  # noqa: F401  registers its backbones and meta-architectures
from distill.config import check_output_dir, forget_record
from distill.data import register_from_config
from distill.errors import DistillError
from distill.export import (
    TOLERANCE,
    DeployedDetector,
    FileFault,
    FileMetadata,
    build_input_mapper,
    compare_on,
    describe,
    eager_detector,
    evaluate_both,
    import_onnx,
    load_deployed,
    output_names,
    pad_image,
    random_inputs,
    read_test_inputs,
    register_test_sets,
    write_onnx,
    write_torchscript,
)
from distill.modeling.checkpoint import load_detector
from distill.recipes import Recipe, YamlRecipe, explain, load_recipe

logger = logging.getLogger("detectron2.export")

FILES = {"torchscript": ("model.ts", write_torchscript), "onnx": ("model.onnx", write_onnx)}
RANDOM_SIZE = (480, 640)  # of random images, where nothing says a size


def load_student(recipe: Recipe, weights: str, device: str) -> nn.Module:
    """Builds the student and loads its weights.

    Args:
        recipe: the student's own.
        weights: its checkpoint.
        device: where to.

    Returns:
        The student, in training mode.

    Raises:
        DistillError: the checkpoint does not fill the student.
    """
    cfg = recipe.cfg
    before, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE, device, weights
    model = load_detector(recipe, "student")
    cfg.MODEL.DEVICE = before
    return model


def export(config_file: str, weights: str, output: str, opts: list[str]) -> None:
    """Exports one student as plain Detectron2 reads it.

    Args:
        config_file: the config that it was trained with, such as OUTPUT_DIR/config.yaml.
        weights: its checkpoint.
        output: the folder to write.
        opts: overrides of the config.

    Raises:
        DistillError: the checkpoint does not fill the student, or ``output`` is its own folder.
    """
    folder = Path(output)
    if folder.resolve() in {Path(given).resolve().parent for given in (config_file, weights)}:
        raise DistillError(
            f"--output is {output}, which holds the training itself: its config and checkpoint would be written over. "
            "Name another folder."
        )
    recipe = load_recipe(config_file, opts)
    imports, recipe = list(recipe.cfg.DISTILL.IMPORTS), recipe.plain()
    model = load_student(recipe, weights, "cpu")
    folder = folder.resolve()  # what the config says of it holds wherever it is loaded from
    check_output_dir(str(folder), "--output")
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    forget_record(str(folder))  # of an earlier export of a Python config
    written = recipe.write(str(folder), str(folder / "model_final.pth"))
    logger.info(f"{folder} holds {Path(written).name} and model_final.pth")
    if imports:
        logger.info(f"If parts of the student come from DISTILL.IMPORTS, import {', '.join(imports)} to load it.")
    ours = [key for key in ("FCOS", "TIMM") if key in recipe.cfg.MODEL]
    if ours and isinstance(recipe, YamlRecipe):
        logger.info(
            f"The student is built from MODEL.{' and MODEL.'.join(ours)}: to load it, import distill.modeling and call "
            "distill.add_distill_config(cfg) before cfg.merge_from_file."
        )


def export_file(args: argparse.Namespace) -> None:
    """Exports one student as a TorchScript or an ONNX file, and checks the file.

    Args:
        args: the parsed command line.

    Raises:
        DistillError: the checkpoint does not fill the student, the student cannot be exported, the file finds other
            things than the student does, or what was asked for cannot be.
    """
    if args.format == "onnx":
        import_onnx("onnx")
        import_onnx("onnxruntime")
    recipe = load_recipe(args.config_file, args.opts)
    try:
        register_test_sets(recipe)  # they name the classes
        recipe.check_evaluation(True)
    except DistillError:
        if args.evaluate:
            raise
        with contextlib.suppress(DistillError):  # the training sets do, too
            register_from_config(recipe.cfg, recipe.cfg.DATASETS.TRAIN)
    model = load_student(recipe.plain(), args.weights, args.device).eval().requires_grad_(False)
    metadata = describe(recipe, model, args.size, args.device)
    if not metadata.knows_resizing:
        logger.warning(
            "The config resizes images for testing in a way that the file cannot tell (expected ResizeShortestEdge, "
            "with one length, bilinear): resize them so before you run it, or give --size HEIGHT WIDTH."
        )
    images, source = images_to_check(recipe, metadata, args.num_images, args.evaluate)
    traced = pad_image(images[0], metadata).to(args.device)
    metadata = replace(metadata, outputs=output_names(model, traced))

    folder = Path(args.output)
    check_output_dir(str(folder), "--output")
    name, write = FILES[args.format]
    path, unchecked = folder / name, folder / f"unchecked_{name}"  # an earlier good file stays until this one is, too
    write(model, traced, unchecked, metadata)
    logger.info(f"{unchecked} is written: comparing it with the student in PyTorch on {source}.")
    reference = eager_detector(model, metadata)
    with set_aside(unchecked, folder / f"rejected_{name}"):
        detector = load_file(unchecked)
        check_file(reference, detector, model, images, f"{path} on {source}")
        if args.evaluate:
            recipe.cfg.OUTPUT_DIR = str(folder)
            own = build_input_mapper(metadata) if metadata.knows_resizing else None
            if args.size is None:
                evaluate_both(recipe, model, detector, mapper=own)
            else:  # the student, too, on images that are scaled and padded to the size
                evaluate_both(recipe, reference, detector, own, own)
    unchecked.replace(path)
    logger.info(f"{path} finds what the student in PyTorch finds.")


@contextlib.contextmanager
def set_aside(path: Path, rejected: Path) -> Iterator[None]:
    """Renames a file that does not pass its check, so that nobody deploys it.

    Args:
        path: of the file.
        rejected: what it is called then.

    Raises:
        FileFault: what the check raises, with the file's new name.
        DistillError: another error, with the file's name, which stays.
    """
    try:
        yield
    except FileFault as error:
        path.replace(rejected)
        raise FileFault(f"{error} The file is now {rejected}.") from error
    except DistillError as error:  # says nothing about the file
        raise DistillError(f"{error} The file is {path}, for it has not passed its check.") from error


def load_file(path: Path) -> DeployedDetector:
    """Loads a file that was just written.

    Args:
        path: of the file.

    Returns:
        The detector.

    Raises:
        FileFault: it cannot be loaded.
    """
    try:
        return load_deployed(path)
    except DistillError as error:
        raise FileFault(str(error)) from error


def images_to_check(
    recipe: Recipe, metadata: FileMetadata, number: int, is_required: bool
) -> tuple[list[torch.Tensor], str]:
    """The images that a file is checked on.

    Args:
        recipe: names the test sets.
        metadata: of the file.
        number: how many images of the test sets, at most.
        is_required: whether it is an error that there are none; else there are random ones then, and the log says why.

    Returns:
        Images as Detectron2's mapper gives them, uint8 Tensor[3, H, W], and what they are. For a file that takes any
        size there is one more, of a size of its own: all images of a test set often have the same.

    Raises:
        DistillError: the test sets cannot be read and are required.
    """
    try:
        mapper = build_input_mapper(metadata) if metadata.knows_resizing else recipe.build_mapper()
        inputs = read_test_inputs(recipe, mapper, number)
        source = f"{len(inputs)} images of {', '.join(recipe.cfg.DATASETS.TEST)}"
    except DistillError as error:
        if is_required:
            raise
        logger.warning(f"No image of a test set: the file is checked on random images instead. {error}")
        if metadata.size:
            size = (metadata.size[0] * 3 // 4, metadata.size[1])
        else:
            size = (metadata.short_edge, metadata.short_edge * 4 // 3) if metadata.short_edge else RANDOM_SIZE
        inputs = random_inputs(size, number)
        source = f"{number} random images"
    images = [x["image"] for x in inputs]
    if metadata.size is None:
        height, width = images[0].shape[1:]
        images.append(images[0][:, : max(1, height * 3 // 4), : max(1, width * 2 // 3)])
        source += " and a part of one"
    return images, source


def check_file(
    reference: DeployedDetector,
    detector: DeployedDetector,
    model: nn.Module,
    images: list[torch.Tensor],
    what: str,
) -> None:
    """Compares what a file finds with what the student in PyTorch finds.

    Args:
        reference: the student, as the file is called.
        detector: the file.
        model: the student.
        images: uint8 Tensor[3, H, W] each.
        what: the file and the images, for the messages.

    Raises:
        FileFault: they differ.
    """
    difference = compare_on(reference, detector, model, images)
    result = (
        f"{what}: {difference.detections} detections, the largest difference is {difference.box:.1e} of a box's size, "
        f"{difference.score:.1e} of a score"
    )
    if "pred_masks" in detector.metadata.outputs:
        result += f", {difference.mask:.1e} of a mask's cell"
    logger.info(result)
    if not difference.largest <= TOLERANCE:
        raise FileFault(
            f"{result}; expected at most {TOLERANCE}. The file does not find what the student in PyTorch finds: do not "
            "deploy it. If the student computes with fixed sizes, give --size HEIGHT WIDTH."
        )
    if not difference.detections:
        logger.warning(f"{what}: the student finds nothing there, so the comparison says little.")


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml or config.py of the training")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint of that training")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument("--format", choices=["detectron2", *FILES], default="detectron2")
    group = parser.add_argument_group("for torchscript and onnx")
    group.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: images of any size")
    group.add_argument("--num-images", type=int, metavar="N", help="images to compare on, default: 8")
    group.add_argument("--evaluate", action="store_true", help="compare the AP on DATASETS.TEST, too")
    group.add_argument("--device", help="what a torchscript file runs on, such as cuda; default: cpu")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the arguments and fills in their defaults.

    Args:
        args: the parsed command line.

    Raises:
        DistillError: one has no use or is impossible.
    """
    given = {"--size": args.size, "--num-images": args.num_images, "--evaluate": args.evaluate, "--device": args.device}
    useless = [name for name, value in given.items() if value not in (None, False)]
    if args.format == "detectron2" and useless:
        raise DistillError(f"{', '.join(useless)} is for files: add --format torchscript or --format onnx.")
    if args.num_images is not None and args.num_images < 1:
        raise DistillError(f"--num-images is {args.num_images}: expected a number above 0.")
    if args.size is not None and min(args.size) < 1:
        raise DistillError(f"--size is {args.size[0]} {args.size[1]}: expected height and width in pixels.")
    args.num_images = args.num_images or 8
    args.device = args.device or "cpu"
    if args.format == "onnx" and args.device != "cpu":
        raise DistillError(f"--device is {args.device}: an ONNX file runs on whatever its runtime has, leave it out.")
    if args.device not in ("cpu", "cuda"):
        raise DistillError(f"--device is {args.device}: expected cpu or cuda.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise DistillError("--device is cuda, and no CUDA GPU is available: export on a machine that has one.")


def main() -> None:
    args = argument_parser().parse_args()
    setup_logger()
    setup_logger(name="distill")
    try:
        check_arguments(args)
        if args.format == "detectron2":
            export(args.config_file, args.weights, args.output, args.opts)
        else:
            export_file(args)
    except DistillError as error:
        sys.exit(f"error: {explain(error, args.config_file)}")


if __name__ == "__main__":
    main()

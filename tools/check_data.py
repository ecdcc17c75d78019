#!/usr/bin/env python3
"""Checks datasets as a training does, and draws twelve of their images, so that one sees the boxes where they belong.

    python tools/check_data.py voc:/data/cells:trainval [coco:... yolo:...] [--check skip] [--output DIR]

Each is a form of DATASETS.REGISTER, with or without its name. Exit status 1: there are faults.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from drawing import plain_text

from distill.config import check_output_dir
from distill.data import register_datasets
from distill.errors import DistillError

NUM_DRAWN = 12


def draw_sheet(name: str, path: Path) -> None:
    """Draws images with their annotations, evenly spread over the dataset.

    Args:
        name: a registered dataset.
        path: the PNG to write.
    """
    records = DatasetCatalog.get(name)
    metadata = Metadata(thing_classes=[plain_text(x) for x in MetadataCatalog.get(name).thing_classes])
    chosen = records[:: max(1, len(records) // NUM_DRAWN)][:NUM_DRAWN]
    figure, axes = plt.subplots(3, 4, figsize=(16, 12))
    for axis in axes.flat:
        axis.axis("off")
    for axis, record in zip(axes.flat, chosen):
        try:
            image = read_image(record["file_name"], "RGB")
        except OSError as error:  # with --check off nobody has looked
            raise DistillError(f"The image '{record['file_name']}' cannot be read: {error}") from error
        drawn = Visualizer(image, metadata, 384 / min(image.shape[:2])).draw_dataset_dict(record)
        axis.imshow(drawn.get_image())
        axis.set_title(plain_text(Path(record["file_name"]).name), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="FORM:...")
    parser.add_argument("--check", default="error", metavar="error|skip|off", help="as DATASETS.CHECK")
    parser.add_argument("--load-truncated", action="store_true", help="as INPUT.TRUNCATED load")
    parser.add_argument(
        "--output", type=Path, default=Path("output/check_data"), metavar="DIR", help="for drawn images"
    )
    args = parser.parse_args()
    setup_logger(name="distill")
    try:
        check_output_dir(str(args.output), "--output")
    except DistillError as error:
        sys.exit(f"error: {error}")
    has_faults = False
    for index, text in enumerate(args.data):
        is_named = "=" in text.split(":")[0]
        entry = text if is_named else f"data{index + 1}={text}"
        name = entry.partition("=")[0]
        try:
            register_datasets([entry], args.check, load_truncated=args.load_truncated)
        except DistillError as error:
            has_faults = True
            print(f"error: {error}", file=sys.stderr)
            continue
        draw_sheet(name, args.output / f"{name}.png")
        print(f"{name}: {len(DatasetCatalog.get(name))} images, drawn in {args.output / f'{name}.png'}")
    sys.exit(has_faults)


if __name__ == "__main__":
    main()

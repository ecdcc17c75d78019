#!/usr/bin/env python3
"""The project's main job in minutes: a teacher, a student, and the same student distilled, side by side.

    python tools/demo.py [--output output/demo]
    python tools/demo.py --data TRAIN TEST     # your own photos, each in a form of DATASETS.REGISTER without its name:
                                               # such as voc:ROOT:SPLIT, coco:JSON:IMAGE_ROOT, yolo:data.yaml:SPLIT

Trains them with train_net.py, on ``digit_scenes`` (which needs no download) or on your photos, prints one table, and
draws their detections side by side. Finished stages are kept, and an interrupted one goes on from its last checkpoint.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from drawing import MIN_SCORE, draw_boxes, label, true_boxes
from measuring import time_images
from runs import ROOT, TrainingFailed, read_metrics, train
from tabulate import tabulate

from distill.config import CLASS_NODES, load_config, student_config
from distill.data import register_from_config
from distill.data.digit_scenes import prepare_digit_scenes
from distill.engine.checkpoints import write_file
from distill.errors import DistillError
from distill.modeling.checkpoint import load_detector


class Stage(NamedTuple):
    """One training: what the table calls it, its config, and its folder below ``--output``."""

    name: str
    config: str
    folder: str
    opts: tuple[str, ...] = ()


# the student starts from what fits of the teacher, besides
INHERIT = ("DISTILL.STUDENT.INHERIT", "['backbone.fpn_output', 'head']")
STAGES = (
    Stage("teacher", "configs/demo/teacher.yaml", "teacher"),
    Stage("student", "configs/demo/student.yaml", "student"),
    Stage("student, distilled", "configs/demo/review.yaml", "review"),
    Stage("the same, inheriting", "configs/demo/review.yaml", "review_inherit", INHERIT),
)
NUM_DRAWN, NUM_TIMED = 6, 20


def photo_opts(train_set: str, test_set: str, opts: Sequence[str] = ()) -> list[str]:
    """Registers datasets of the user's own.

    Args:
        train_set: to train on, such as ``voc:ROOT:SPLIT``, ``coco:JSON:IMAGE_ROOT`` or ``yolo:data.yaml:SPLIT``.
        test_set: to test on, the same.
        opts: the user's overrides, such as ``DATASETS.CHECK skip``.

    Returns:
        Overrides of the demo's configs for photos, ``[KEY, VALUE, ...]``, before those.

    Raises:
        DistillError: see :func:`distill.data.register_from_config`.
    """
    entries = [f"demo_train={train_set}", f"demo_test={test_set}"]
    cfg = load_config(STAGES[0].config, opts)
    cfg.DATASETS.REGISTER = entries
    register_from_config(cfg)
    classes = MetadataCatalog.get("demo_train").thing_classes
    model = load_config(STAGES[0].config).MODEL
    node = CLASS_NODES[model.META_ARCHITECTURE]
    opts = {
        "DATASETS.REGISTER": entries,
        "DATASETS.TRAIN": ["demo_train"],
        "DATASETS.TEST": ["demo_test"],
        f"MODEL.{node}.NUM_CLASSES": len(classes),
        "MODEL.ANCHOR_GENERATOR.SIZES": [[2 * side for side in level] for level in model.ANCHOR_GENERATOR.SIZES],
        "INPUT.MIN_SIZE_TRAIN": [256],
        "INPUT.MAX_SIZE_TRAIN": 384,
        "INPUT.MIN_SIZE_TEST": 256,
        "INPUT.MAX_SIZE_TEST": 384,
        "INPUT.RANDOM_FLIP": "horizontal",
    }
    return [str(item) for pair in opts.items() for item in pair]


def check_settings(output: Path, opts: Sequence[str]) -> None:
    """Refuses to go on with models of other data or other settings; of none, notes these.

    Args:
        output: the folder of the stages' folders.
        opts: ``[KEY, VALUE, ...]``, those of all trainings.

    Raises:
        DistillError: the folder is of other ones.
    """
    path, settings = output / "settings.json", list(opts)
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise DistillError(
                f"{path} is damaged: {error}. Remove the folder {output}, or give another --output."
            ) from error
        if before == settings:
            return
        if any(output.glob("*/metrics.json")):  # or nothing has been trained
            raise DistillError(
                f"The models in {output} were trained with {' '.join(before) or 'no overrides'}, not with "
                f"{' '.join(settings) or 'none'}: give another --output, or remove that folder."
            )
    output.mkdir(parents=True, exist_ok=True)
    write_file(str(path), json.dumps(settings))


def train_stage(stage: Stage, folder: Path, overrides: Sequence[str]) -> None:
    """Trains one model, showing its progress; returns at once if it is finished.

    Args:
        stage: which.
        folder: its OUTPUT_DIR.
        overrides: ``[KEY, VALUE, ...]``.

    Raises:
        SystemExit: the training failed; the end of its log is shown.
    """
    name = stage.name
    finished = folder / "finished"  # model_final.pth is there before its evaluation is
    if finished.exists():
        print(f"{name}: finished already ({folder})")
        return

    def show(step: dict) -> None:
        left = timedelta(seconds=int(step["eta_seconds"]))
        print(f"{name}: step {step['iteration'] + 1}, loss {step['total_loss']:.2f}, {left} left", flush=True)

    log = folder / "train.log"
    print(f"{name}: training, log in {log}", flush=True)
    try:
        train(stage.config, folder, overrides, show)
    except TrainingFailed as error:
        sys.exit(
            f"{error}\nerror: training the {name} failed, see {log}. Run it again to go on from the last checkpoint."
        )
    finished.touch()


def draw(records: list[dict], detections: dict[str, list], metadata: Metadata, path: Path) -> None:
    """Draws images in rows: ground truth, and the detections of each model above MIN_SCORE.

    Args:
        records: the images, in Detectron2's dataset format.
        detections: for each model a list of ``Instances``, one per image.
        metadata: of the dataset, for the names of its classes.
        path: the PNG to write.
    """
    columns = ["ground truth", *detections]
    figure, axes = plt.subplots(
        len(records), len(columns), figsize=(2.4 * len(columns), 2.4 * len(records)), squeeze=False
    )
    names = metadata.get("thing_classes", [])
    for row, record in enumerate(records):
        image = read_image(record["file_name"], "RGB")
        boxes, classes = true_boxes(record)
        drawn = [draw_boxes(image, boxes, [label(names, number) for number in classes])]
        for instances in detections.values():
            sure = instances[row][instances[row].scores >= MIN_SCORE]
            classes, scores = sure.pred_classes.tolist(), sure.scores.tolist()
            labels = [label(names, number, score) for number, score in zip(classes, scores)]
            drawn.append(draw_boxes(image, sure.pred_boxes.tensor.numpy(), labels))
        for axis, name, picture in zip(axes[row], columns, drawn):
            axis.imshow(picture)
            axis.axis("off")
            if row == 0:
                axis.set_title(name, fontsize=10)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def stage_config(folder: Path) -> CfgNode:
    """The config of a trained detector, which is the student's where there is one.

    Args:
        folder: the OUTPUT_DIR of its stage.

    Returns:
        The config, with the trained weights.
    """
    cfg = student_config(load_config(str(folder / "config.yaml")))
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    return cfg


@torch.no_grad()
def show(output: Path) -> None:
    """Prints the table and draws the detections of what has been trained.

    Args:
        output: the folder of the stages' folders; ``table.md`` and ``detections.png`` are written there.
    """
    configs = {stage.name: stage_config(output / stage.folder) for stage in STAGES}
    models = {name: load_detector(cfg, name).eval() for name, cfg in configs.items()}
    cfg = configs[STAGES[0].name]
    (test_set,) = cfg.DATASETS.TEST
    records = DatasetCatalog.get(test_set)[:NUM_TIMED]
    mapper = DatasetMapper(cfg, is_train=False)
    inputs = [mapper(record) for record in records]
    times = time_images(models, dict.fromkeys(models, inputs), NUM_TIMED)
    rows = []
    for stage in STAGES:
        scores = next(record for record in reversed(read_metrics(output / stage.folder)) if "bbox/AP" in record)
        parameters = sum(p.numel() for p in models[stage.name].parameters()) / 1e6
        metrics = [scores[f"bbox/{key}"] for key in ("AP", "AP50", "AP75")]
        rows.append([stage.name, *metrics, parameters, times[stage.name]])
    headers = ["model", "AP", "AP50", "AP75", "parameters (M)", "ms per image"]
    table = tabulate(rows, headers, tablefmt="pipe", floatfmt=("", ".1f", ".1f", ".1f", ".1f", ".1f"))
    (output / "table.md").write_text(table + "\n")

    detections = {name: [x["instances"].to("cpu") for x in model(inputs[:NUM_DRAWN])] for name, model in models.items()}
    picture = output / "detections.png"
    draw(records[:NUM_DRAWN], detections, MetadataCatalog.get(test_set), picture)
    student = output / STAGES[-1].folder
    print(
        f"\n{table}\n\nThe detections side by side: {picture}\n"
        f"To take the distilled student away: python tools/export_student.py --config-file {student}/config.yaml "
        f"--weights {student}/model_final.pth --output {output}/exported\n"
        "Its backbone is timm's: who loads it needs this package (no teacher). A student on Detectron2's own ResNet "
        "needs Detectron2 alone."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: output/demo, output/demo_photos with --data"
    )
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="datasets of your own")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., for all trainings")
    args = parser.parse_args()
    output = (args.output or Path("output/demo_photos" if args.data else "output/demo")).resolve()

    setup_logger(name="distill")
    if args.data and not ROOT.samefile("."):
        raise DistillError(
            f"The paths of --data are relative to {ROOT}, where the trainings run: start the demo there."
        )
    os.chdir(ROOT)
    if not args.data:
        prepare_digit_scenes()
    opts = [*(photo_opts(*args.data, args.opts) if args.data else []), *args.opts]
    check_settings(output, opts)
    teacher = output / STAGES[0].folder
    learn = [
        *("DISTILL.TEACHER.CONFIG_FILE", str(teacher / "config.yaml")),
        *("DISTILL.TEACHER.WEIGHTS", str(teacher / "model_final.pth")),
    ]
    for stage in STAGES:
        train_stage(stage, output / stage.folder, [*learn, *opts, *stage.opts])
    try:
        show(output)
    except DistillError as error:
        raise DistillError(f"{error} To train a stage again, remove its folder in {output}.") from error


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")

#!/usr/bin/env python3
"""The project's main job on data that needs no download: a teacher, a student, and the same student distilled.

    python tools/demo.py [--output output/demo]

Trains the three with train_net.py on ``digit_scenes``, prints one table, and draws their detections side by side.
Finished stages are kept, and an interrupted one goes on from its last checkpoint.
"""

import argparse
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from runs import TrainingFailed, read_metrics, train
from tabulate import tabulate

from distill.config import load_config, student_config
from distill.data.digit_scenes import prepare_digit_scenes
from distill.errors import DistillError
from distill.modeling.checkpoint import load_detector

STAGES = {"teacher": "teacher", "student": "student", "student, distilled": "review"}
NUM_DRAWN, MIN_SCORE = 6, 0.5
NUM_TIMED = 20
SCALE = 3.0  # of the drawn images, whose 128 pixels hold no text


def train_stage(name: str, config: str, folder: Path, overrides: list[str]) -> None:
    """Trains one model, showing its progress; returns at once if it is finished.

    Args:
        name: what to call it.
        config: its config file.
        folder: its OUTPUT_DIR.
        overrides: ``[KEY, VALUE, ...]``.

    Raises:
        SystemExit: the training failed; the end of its log is shown.
    """
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
        train(config, folder, overrides, show)
    except TrainingFailed as error:
        sys.exit(
            f"{error}\nerror: training the {name} failed, see {log}. Run it again to go on from the last checkpoint."
        )
    finished.touch()


def time_inference(models: dict[str, torch.nn.Module], inputs: list[dict]) -> dict[str, float]:
    """Times the models in turns, one image at a time.

    Args:
        models: detectors by name.
        inputs: images in Detectron2's format; the first three warm up.

    Returns:
        Median ms per image by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for index, image in enumerate(inputs):
        for name, model in models.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            model([image])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= 3:  # warm
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def draw(records: list[dict], detections: dict[str, list], metadata: Metadata, path: Path) -> None:
    """Draws images in rows: ground truth, and the detections of each model above MIN_SCORE.

    Args:
        records: the images, in Detectron2's data set format.
        detections: for each model a list of ``Instances``, one per image.
        metadata: of the data set, for the names of its classes.
        path: the PNG to write.
    """
    columns = ["ground truth", *detections]
    figure, axes = plt.subplots(len(records), len(columns), figsize=(2.4 * len(columns), 2.4 * len(records)))
    for row, record in enumerate(records):
        image = read_image(record["file_name"], "RGB")
        drawn = [Visualizer(image, metadata, SCALE).draw_dataset_dict(_boxes_alone(record))]
        for instances in detections.values():
            sure = instances[row][instances[row].scores >= MIN_SCORE]
            drawn.append(Visualizer(image, metadata, SCALE).draw_instance_predictions(sure))
        for axis, name, picture in zip(axes[row], columns, drawn):
            axis.imshow(picture.get_image())
            axis.axis("off")
            if row == 0:
                axis.set_title(name, fontsize=10)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def _boxes_alone(record: dict) -> dict:
    annotations = [{k: v for k, v in a.items() if k != "segmentation"} for a in record["annotations"]]
    return {**record, "annotations": annotations}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., for all three trainings")
    args = parser.parse_args()
    output = args.output.resolve()

    setup_logger(name="distill")
    prepare_digit_scenes()
    weights = ["DISTILL.TEACHER.WEIGHTS", str(output / "teacher" / "model_final.pth")]
    for name, stage in STAGES.items():
        extra = args.opts + (weights if stage == "review" else [])
        train_stage(name, f"configs/demo/{stage}.yaml", output / stage, extra)

    models, rows = {}, []
    for name, stage in STAGES.items():
        cfg = student_config(load_config(str(output / stage / "config.yaml")))
        cfg.MODEL.WEIGHTS = str(output / stage / "model_final.pth")
        models[name] = load_detector(cfg, name).eval()
    dataset = DatasetCatalog.get("digit_scenes_val")
    records = dataset[:NUM_TIMED]
    inputs = [{"image": torch.from_numpy(read_image(r["file_name"], "BGR").transpose(2, 0, 1).copy())} for r in records]
    times = time_inference(models, inputs)
    for (name, model), stage in zip(models.items(), STAGES.values()):
        scores = next(record for record in reversed(read_metrics(output / stage)) if "bbox/AP" in record)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([name, *(scores[f"bbox/{key}"] for key in ("AP", "AP50", "AP75")), parameters, times[name]])
    headers = ["model", "AP", "AP50", "AP75", "parameters (M)", "ms per image"]
    table = tabulate(rows, headers, tablefmt="pipe", floatfmt=("", ".1f", ".1f", ".1f", ".1f", ".1f"))
    (output / "table.md").write_text(table + "\n")

    detections = {name: [x["instances"].to("cpu") for x in model(inputs[:NUM_DRAWN])] for name, model in models.items()}
    picture = output / "detections.png"
    draw(records[:NUM_DRAWN], detections, MetadataCatalog.get("digit_scenes_val"), picture)
    print(f"\n{table}\n\nThe detections side by side: {picture}")


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error} To train that stage again, remove its folder.")

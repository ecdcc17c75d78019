"""Images of the test set where teacher and student differ most."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from drawing import draw_boxes, ignored_boxes, label, true_boxes
from markupsafe import Markup
from PIL import Image
from torch import nn

from distill.config import num_classes
from distill.data import register_from_config
from distill.engine import teacher_mapper
from distill.errors import DistillError
from distill.modeling.classes import build_class_map
from distill.recipes import Recipe
from distill.recipes.base import Mapper
from report_parts.reading import Run

logger = logging.getLogger("detectron2.report")

IOU = 0.5  # from which on two boxes are of one object
COLORS = {"true": "#38bdf8", "right": "#22c55e", "wrong": "#f97316"}


class Found(NamedTuple):
    """Objects in an image, annotated or detected.

    Attributes:
        boxes: ``[N, 4]``, x0, y0, x1, y1 in pixels.
        classes: of each, as the run numbers them.
        scores: of each; None of annotated ones.
    """

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None


class Example(NamedTuple):
    """An image of the page: its pictures with their captions, in the order of the columns, and how many detections of
    teacher and student (or of ground truth and student) have no counterpart."""

    name: str
    pictures: list[tuple[str, Markup]]
    differences: int


def match(first: Found, second: Found) -> dict[int, int]:
    """Pairs the objects of two lists: each of the first, in the order of its scores, takes the one of the second that
    overlaps most, among those of its class with an IoU of 0.5 or more that are not taken.

    Args:
        first: detections.
        second: detections, or what is annotated.

    Returns:
        By index in the first, the index in the second.
    """
    order = range(len(first.classes))
    if first.scores is not None:
        order = sorted(order, key=lambda i: -first.scores[i])
    overlaps = pairwise_iou(*(Boxes(torch.as_tensor(x.boxes, dtype=torch.float32)) for x in (first, second))).tolist()
    pairs: dict[int, int] = {}
    for i in order:
        free = [
            j
            for j, number in enumerate(second.classes)
            if number == first.classes[i] and overlaps[i][j] >= IOU and j not in pairs.values()
        ]
        if free:
            pairs[i] = max(free, key=lambda j: overlaps[i][j])
    return pairs


def without_ignored(found: Found, truth: Found, record: dict) -> Found:
    """Leaves out what no metric counts: detections of difficult objects, and those within crowds.

    Args:
        found: detections.
        truth: what they are compared with first.
        record: the image, in Detectron2's dataset format.

    Returns:
        The others.
    """
    boxes, classes, are_crowds = ignored_boxes(record)
    if not classes or not found.classes:
        return found
    theirs, own = (Boxes(torch.as_tensor(x, dtype=torch.float32)) for x in (boxes, found.boxes))
    overlaps = torch.where(torch.tensor(are_crowds)[:, None], pairwise_ioa(theirs, own), pairwise_iou(theirs, own))
    same = torch.tensor(classes)[:, None] == torch.tensor(found.classes)
    is_ignored = ((overlaps >= IOU) & same).any(0)
    hits = match(found, truth)
    kept = [i for i in range(len(found.classes)) if i in hits or not is_ignored[i]]
    scores = None if found.scores is None else [found.scores[i] for i in kept]
    return Found(found.boxes[kept], [found.classes[i] for i in kept], scores)


def count_differences(first: Found, second: Found) -> int:
    """How many objects of two lists have no counterpart in the other, see :func:`match`."""
    return len(first.classes) + len(second.classes) - 2 * len(match(first, second))


def choose(firsts: Sequence[Found], seconds: Sequence[Found], number: int) -> list[int]:
    """The images with most differences, the first ones among equals.

    Args:
        firsts: of each image what the one detects.
        seconds: what the other does.
        number: how many to choose.

    Returns:
        Their indices, those with most differences first; images without a difference are left out.
    """
    counts = [count_differences(a, b) for a, b in zip(firsts, seconds, strict=True)]
    differing = [index for index, count in enumerate(counts) if count]
    return sorted(differing, key=lambda index: -counts[index])[:number]


def read_test_set(run: Run) -> tuple[str, list[dict]]:
    """The first test set of a run.

    Args:
        run: its datasets are registered here.

    Returns:
        The name, and the images in Detectron2's dataset format.

    Raises:
        DistillError: it names none, or it cannot be read.
    """
    register_from_config(run.cfg, run.cfg.DATASETS.TEST)
    if not run.cfg.DATASETS.TEST:
        raise DistillError("The config names no test set.")
    name = run.cfg.DATASETS.TEST[0]
    if name not in DatasetCatalog.list():
        raise DistillError(f"The dataset {name} is not registered here.")
    try:
        return name, DatasetCatalog.get(name)
    except Exception as error:  # whatever a loader raises, such as for missing files
        raise DistillError(f"The dataset {name} cannot be read: {error}") from error


def class_numbers(run: Run, teacher: Recipe) -> dict[int, int] | None:
    """Which of the run's classes each of the teacher's is.

    Args:
        run: whose DISTILL.CLASS_MAP counts; without one, classes of one name are the same if their numbers differ.
        teacher: its recipe.

    Returns:
        By the teacher's number; None where both have the same classes.

    Raises:
        DistillError: it cannot be told.
    """
    cfg = run.cfg.clone()
    cfg.defrost()
    if not cfg.DISTILL.CLASS_MAP:
        if num_classes(cfg) == num_classes(teacher.cfg):
            return None
        cfg.DISTILL.CLASS_MAP = ["names"]
    return {theirs: own for own, theirs in build_class_map(cfg).items()}


@torch.no_grad()
def detect(
    model: nn.Module,
    mapper: Mapper,
    records: Sequence[dict],
    min_score: float,
    title: str,
    numbers: dict[int, int] | None = None,
) -> list[Found]:
    """Runs a detector over images, and says how long that takes.

    Args:
        model: in eval mode.
        mapper: what reads an image for it.
        records: the images.
        min_score: detections below it are left out.
        title: for the log.
        numbers: see :func:`class_numbers`.

    Returns:
        Of each image what is detected.
    """
    found = []
    started = logged = time.perf_counter()
    for index, record in enumerate(records):
        (output,) = model([mapper(record)])
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= min_score]
        classes = instances.pred_classes.tolist()
        if numbers is not None:
            instances = instances[[number in numbers for number in classes]]
            classes = [numbers[number] for number in classes if number in numbers]
        found.append(Found(instances.pred_boxes.tensor.double().numpy(), classes, instances.scores.tolist()))
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            left = (logged - started) / (index + 1) * (len(records) - 1 - index)
            logger.info(f"{title}: image {index + 1} of {len(records)}, {left:.0f} s left")
    return found


def show_examples(
    run: Run,
    student: nn.Module,
    teacher: tuple[Recipe, nn.Module] | None,
    records: Sequence[dict],
    number: int,
    min_score: float,
) -> list[Example]:
    """The images where teacher and student differ most; without a teacher, where ground truth and student do.

    Args:
        run: whose test images these are.
        student: its detector, in eval mode.
        teacher: recipe and detector, in eval mode, if there is one.
        records: the images to choose from.
        number: how many to choose.
        min_score: detections below it do not count.

    Returns:
        The images, those with most differences first.

    Raises:
        DistillError: an image cannot be read, or it cannot be told which of the teacher's classes is which.
    """
    truths = [Found(*true_boxes(record)) for record in records]
    detections = {}
    if teacher is not None:
        recipe, model = teacher
        mapper, numbers = teacher_mapper(run.recipe, recipe), class_numbers(run, recipe)
        detections["teacher"] = detect(model, mapper, records, min_score, "teacher", numbers)
    detections[run.name] = detect(student, run.recipe.build_mapper(), records, min_score, run.name)
    for name, found in detections.items():
        detections[name] = [without_ignored(*items) for items in zip(found, truths, records)]
    reference = detections["teacher"] if teacher is not None else truths
    names = MetadataCatalog.get(run.cfg.DATASETS.TEST[0]).get("thing_classes", [])
    examples = []
    for index in choose(detections[run.name], reference, number):
        record, truth = records[index], truths[index]
        image = read_image(record["file_name"], "RGB")
        total = len(truth.classes)
        pictures = [(f"ground truth: {total}", _picture(image, truth, [COLORS["true"]] * total, names))]
        for name, found in detections.items():
            hits = match(found[index], truth)
            colors = [COLORS["right" if i in hits else "wrong"] for i in range(len(found[index].classes))]
            text = f"{name}: {len(hits)} right, {len(colors) - len(hits)} wrong, {total - len(hits)} missed"
            pictures.append((text, _picture(image, found[index], colors, names)))
        differences = count_differences(detections[run.name][index], reference[index])
        examples.append(Example(record["file_name"].rpartition("/")[2], pictures, differences))
    return examples


def _picture(image: np.ndarray, found: Found, colors: list[str], names: Sequence[str]) -> Markup:
    """A drawn image as the address of a JPEG that is a part of the page."""
    scores = found.scores or [None] * len(found.classes)
    labels = [label(names, number, score) for number, score in zip(found.classes, scores)]
    stream = io.BytesIO()
    Image.fromarray(draw_boxes(image, found.boxes, labels, colors)).save(stream, "JPEG", quality=80)
    return Markup("data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode())

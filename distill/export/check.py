"""Whether an exported file finds what the detector in PyTorch does: detection by detection, and by its AP."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import check_datasets, register_from_config
from ..errors import DistillError
from ..recipes import Recipe
from ..recipes.base import Mapper
from .deployed import DeployedDetector, FileFault
from .tracing import nms_of_files

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
AP_TOLERANCE = 0.1


@dataclass
class Difference:
    """The largest differences between the detections of two detectors.

    Attributes:
        box: of a coordinate, in shares of the box's longer side (at least a pixel), since coordinates are computed as
            shares of a box.
        score: of a score. A detection that the other side does not have counts by what its score has above what the
            other side had to give it to leave it out: the threshold, or the lowest score of a full list.
        mask: of a cell's probability.
        detections: how many were compared.
    """

    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    detections: int = 0

    @property
    def largest(self) -> float:
        """Of all three."""
        return max(self.box, self.score, self.mask)

    def __or__(self, other: Difference) -> Difference:
        """Of two images together."""
        return Difference(
            *(max(a, b) for a, b in ((self.box, other.box), (self.score, other.score), (self.mask, other.mask))),
            self.detections + other.detections,
        )


def compare(expected: Instances, found: Instances, threshold: float = 0.0, limit: float = math.inf) -> Difference:
    """Compares the detections on one image, each with the nearest one of its class, in whatever order they come.

    Args:
        expected: of the detector.
        found: of the file.
        threshold: the score that a detection must exceed.
        limit: how many detections an image may have.

    Returns:
        The largest differences.
    """
    boxes, other_boxes = (x.pred_boxes.tensor.cpu() for x in (expected, found))
    scores, other_scores = (x.scores.cpu() for x in (expected, found))
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1.0)
    box_costs = (boxes[:, None] - other_boxes).abs().amax(2) / side[:, None]
    score_costs = (scores[:, None] - other_scores).abs()
    costs = torch.maximum(box_costs, score_costs).nan_to_num(nan=math.inf)
    costs[expected.pred_classes.cpu()[:, None] != found.pred_classes.cpu()] = math.inf
    result = Difference(detections=len(expected))
    unmatched = set(range(len(found)))
    for index in range(len(expected)):
        nearest = int(costs[index].argmin()) if len(found) else 0
        if not unmatched or costs[index, nearest] == math.inf:
            result.score = max(result.score, _above_cut(scores[index], other_scores, threshold, limit))
            continue
        costs[:, nearest] = math.inf
        unmatched.remove(nearest)
        result.box = max(result.box, float(box_costs[index, nearest]))
        result.score = max(result.score, float(score_costs[index, nearest]))
        if expected.has("pred_masks"):
            difference = (expected.pred_masks[index].cpu() - found.pred_masks[nearest].cpu()).abs().max()
            result.mask = max(result.mask, float(difference.nan_to_num(nan=math.inf)))
    for index in unmatched:
        result.score = max(result.score, _above_cut(other_scores[index], scores, threshold, limit))
    return result


def _above_cut(score: Tensor, kept: Tensor, threshold: float, limit: float) -> float:
    cut = max(threshold, float(kept.min())) if len(kept) >= limit else threshold
    return max(0.0, float((score - cut).nan_to_num(nan=math.inf)))


def compare_on(
    reference: DeployedDetector, detector: DeployedDetector, model: nn.Module, images: Sequence[Tensor]
) -> Difference:
    """Runs a detector and a file of it on images.

    Args:
        reference: the detector, see :func:`eager_detector`.
        detector: the file, see :func:`load_deployed`.
        model: the detector, which says what it leaves out.
        images: uint8 Tensor[3, H, W] each.

    Returns:
        The largest differences, over all images.

    Raises:
        DistillError: the file or the detector cannot be run on an image; of the file it is a :class:`FileFault`.
    """
    threshold, limit = _cut_offs(model)
    result = Difference()
    started = logged = time.perf_counter()
    for index, image in enumerate(images):
        found = detector.detect(image)
        with nms_of_files():
            own = reference.detect(image)
        result |= compare(own, found, threshold, limit)
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            left = (logged - started) / (index + 1) * (len(images) - index - 1)
            logger.info(f"compared {index + 1} of {len(images)} images, {left:.0f} s left")
    return result


def _cut_offs(model: nn.Module) -> tuple[float, float]:
    """The score that a detection must exceed, and how many an image may have; 0 and no limit where not known."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", model)
    if isinstance(predictor, nn.ModuleList):  # of a cascade, whose last stage decides
        predictor = predictor[-1]
    limit = getattr(predictor, "test_topk_per_image", getattr(predictor, "max_detections_per_image", math.inf))
    return max(0.0, getattr(predictor, "test_score_thresh", 0.0)), math.inf if limit < 0 else limit


def read_test_inputs(recipe: Recipe, mapper: Mapper, number: int) -> list[dict]:
    """Reads the first images of the test sets.

    Args:
        recipe: names the test sets.
        mapper: reads an image.
        number: how many, at most.

    Returns:
        The images in Detectron2's format.

    Raises:
        DistillError: there is no test set, or it cannot be read.
    """
    register_test_sets(recipe)
    names = ", ".join(recipe.cfg.DATASETS.TEST)
    try:
        records = recipe.test_images()[:number]
    except (KeyError, OSError, AssertionError) as error:
        raise DistillError(
            f"The test set {names} cannot be read: {type(error).__name__}: {error}. Detectron2 looks for its own "
            "datasets below $DETECTRON2_DATASETS; DATASETS.REGISTER and DATASETS.TEST name others."
        ) from error
    return [mapper(record) for record in records]


def register_test_sets(recipe: Recipe) -> None:
    """Registers the test sets of a config and checks that the detector fits them.

    Args:
        recipe: its DATASETS.TEST and DATASETS.REGISTER name them.

    Raises:
        DistillError: there is none, it does not exist, or it has another number of classes.
    """
    cfg = recipe.cfg
    if not cfg.DATASETS.TEST:
        raise DistillError("DATASETS.TEST names no test set: set it to a dataset of the detector's classes.")
    register_from_config(cfg, cfg.DATASETS.TEST)
    check_datasets(cfg, is_training=False)


def random_inputs(size: tuple[int, int], number: int) -> list[dict]:
    """Images of random colours, coarse and fine, for want of others.

    Args:
        size: height and width.
        number: how many.

    Returns:
        The images in Detectron2's format.
    """
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(number):
        coarse, fine = (torch.rand(1, 3, cells, cells, generator=generator) for cells in (6, 48))
        layers = [F.interpolate(layer, size=size, mode="bilinear", align_corners=False)[0] for layer in (coarse, fine)]
        images.append({"image": (255 * (0.7 * layers[0] + 0.3 * layers[1])).to(torch.uint8)})
    return images


def evaluate_both(
    recipe: Recipe,
    student: nn.Module,
    detector: nn.Module,
    student_mapper: Mapper | None = None,
    mapper: Mapper | None = None,
) -> dict[str, tuple[float, float]]:
    """Evaluates a detector and a file of it on the test sets, by Detectron2's evaluators.

    Args:
        recipe: names the test sets and OUTPUT_DIR, where the evaluators write.
        student: the detector.
        detector: the file.
        student_mapper: what reads the images for the detector; by default the config's own.
        mapper: the same for the file.

    Returns:
        The AP of both, in percent, by task (and, of several test sets, by their names), such as "bbox/AP".

    Raises:
        DistillError: there is nothing to evaluate.
        FileFault: some AP differs by more than 0.1.
    """
    results = []
    for name, model, read in (("student", student, student_mapper), ("file", detector, mapper)):
        flat = flatten_results_dict(recipe.evaluate(model, read, f"evaluation/{name}"))
        results.append({key: float(value) for key, value in flat.items() if key.rpartition("/")[2] == "AP"})
    expected, found = results
    if not expected:
        raise DistillError("The evaluation on DATASETS.TEST gave no AP: is there an evaluator and a test set?")
    both = {key: (value, found.get(key, math.nan)) for key, value in expected.items()}
    table = ", ".join(f"{key} {theirs:.2f} (in PyTorch {own:.2f})" for key, (own, theirs) in both.items())
    logger.info(f"The file's {table}")
    differing = [key for key, (own, theirs) in both.items() if not _agree(own, theirs)]
    if differing:
        raise FileFault(f"The file's {table}: {', '.join(differing)} differs by more than {AP_TOLERANCE}.")
    return both


def _agree(ap: float, other: float) -> bool:
    if math.isnan(ap) and math.isnan(other):  # without any detection
        return True
    return abs(ap - other) <= AP_TOLERANCE

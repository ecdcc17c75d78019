"""Detections as pictures."""

from collections.abc import Sequence

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer

MIN_SCORE = 0.5  # of a detection that is drawn
DRAWN_PIXELS = 384  # short side of a drawn image: text needs them
LONGEST_PIXELS = 16384  # long side: a JPEG has 65535 at most


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[str], colors: Sequence[str] | None = None
) -> np.ndarray:
    """Draws boxes on an image, which is brought to DRAWN_PIXELS.

    Args:
        image: ``uint8[H, W, 3]``, RGB.
        boxes: ``[N, 4]``, x0, y0, x1, y1 in pixels of the image.
        labels: of each box.
        colors: of each box, in matplotlib's terms, opaque; by default random and half transparent.

    Returns:
        The picture, ``uint8[H', W', 3]``, RGB.
    """
    height, width = image.shape[:2]
    drawing = Visualizer(image, scale=min(DRAWN_PIXELS / min(height, width), LONGEST_PIXELS / max(height, width)))
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if colors is not None:
        for box, color in zip(boxes, colors):  # below those of overlay_instances, which are half transparent
            drawing.draw_box(box, alpha=1, edge_color=color)
        colors = list(colors)
    return drawing.overlay_instances(boxes=boxes, labels=list(labels), assigned_colors=colors).get_image()


def true_boxes(record: dict) -> tuple[np.ndarray, list[int]]:
    """The annotated objects of an image, without crowds and those marked as difficult.

    Args:
        record: in Detectron2's dataset format.

    Returns:
        Boxes ``[N, 4]`` as x0, y0, x1, y1, and their classes.
    """
    kept = [x for x in record.get("annotations", []) if not (x.get("iscrowd") or x.get("difficult"))]
    return _boxes(kept), [x["category_id"] for x in kept]


def ignored_boxes(record: dict) -> tuple[np.ndarray, list[int], list[bool]]:
    """What :func:`true_boxes` leaves out, since no metric counts its detections.

    Args:
        record: in Detectron2's dataset format.

    Returns:
        Boxes ``[N, 4]`` as x0, y0, x1, y1, their classes, and whether each is a crowd.
    """
    left_out = [x for x in record.get("annotations", []) if x.get("iscrowd") or x.get("difficult")]
    return _boxes(left_out), [x["category_id"] for x in left_out], [bool(x.get("iscrowd")) for x in left_out]


def _boxes(annotations: Sequence[dict]) -> np.ndarray:
    boxes = [BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def label(names: Sequence[str], number: int, score: float | None = None) -> str:
    """What is written beside a box.

    Args:
        names: of the classes; may be empty.
        number: of the class.
        score: of a detection.

    Returns:
        Such as "cat 87%".
    """
    name = plain_text(names[number]) if number < len(names) else str(number)
    return name if score is None else f"{name} {score:.0%}"


def plain_text(text: str) -> str:
    """Text for matplotlib, which would read a formula between two dollar signs.

    Args:
        text: any.

    Returns:
        The same, to be shown as it is.
    """
    return text.replace("$", r"\$")

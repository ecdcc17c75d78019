"""Looks at a dataset's images and boxes before the training, and makes them what Detectron2 reads."""

import logging
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from ..errors import DistillError
from .formats import Fault, Source
from .images import SEEN, Header, read_headers

logger = logging.getLogger(__name__)

MODES = ("error", "skip", "off")


class Kind(NamedTuple):
    """A kind of fault: what the report says, and whether nothing is lost by mending it."""

    text: str
    is_harmless: bool = False


KINDS = {
    "image missing": Kind("images do not exist"),
    "image unreadable": Kind("images cannot be read"),
    "image cut off": Kind("images are cut off (INPUT.TRUNCATED load reads what is there)"),
    "image unknown": Kind("annotations belong to an image that is not listed, and are left out", True),
    "size differs": Kind("annotations give another width and height than their image has"),
    "annotation missing": Kind("images of the split have no annotation"),
    "annotation unreadable": Kind("annotations cannot be read (not XML, not numbers, or in pixels instead of shares)"),
    "class unknown": Kind("annotations have no class, or one that is not declared"),
    "box not finite": Kind("boxes are absent, or not finite numbers"),
    "box swapped": Kind("boxes have their corners in the wrong order"),
    "box outside": Kind("boxes lie outside of their image"),
    "box empty": Kind("boxes have no area and are dropped", True),
    "mask size differs": Kind("run-length encoded masks have another size than their image"),
    "mask unreadable": Kind("run-length encoded masks cannot be decoded"),
    "crowd": Kind("objects are crowds (iscrowd 1), neither learned nor evaluated", True),
    "mask missing": Kind("objects have no mask, as others have, and get their box's", True),
}

_NOTES = {"16 bits": "have 16 bits a channel, scaled to 8", "transparency": "have an alpha channel, shown on white"}


def check_source(name: str, source: Source, mode: str = "error", load_truncated: bool = False) -> None:
    """Checks a dataset, in place: heights and widths become those that a person sees, boxes are in pixels, what is
    harmless is mended.

    Args:
        name: of the dataset.
        source: as it was read.
        mode: "error"; "skip" leaves faulty images out; "off" trusts sizes and boxes, reads headers only where the
            annotation gives no size, and takes files as they are.
        load_truncated: whether an image that is cut off is used as far as it goes.

    Raises:
        DistillError: there are faults, or with "skip" no image is left.
    """
    wanted = [r["file_name"] for r in source.records if mode != "off" or not (r["height"] and r["width"])]
    headers = read_headers(wanted, name + source.records[0]["file_name"] if source.records else name)
    faults = list(source.faults)
    notes: dict[str, list[str]] = defaultdict(list)
    is_turned = False
    for record in source.records:
        header = headers.get(record["file_name"])
        if header is not None:
            is_turned |= _check_image(record, header, faults, notes, load_truncated)
        _to_pixels(record)
        if mode != "off":
            _check_boxes(record, faults)
    for note, files in notes.items():
        logger.info(f"{name}: {len(files)} images {note}, such as {files[0]}.")
    if is_turned or any(fault.kind not in ("image unknown", "crowd") for fault in faults):
        source.json_file = ""  # which knows nothing of it
    if mode == "off":
        return
    harmless = [fault for fault in faults if KINDS[fault.kind].is_harmless]
    if harmless:
        logger.warning(f"{name}: " + "; ".join(describe(harmless)) + ".")
    real = [fault for fault in faults if not KINDS[fault.kind].is_harmless]
    if real and mode == "error":
        raise DistillError(
            f"The dataset {name} has faults:\n  " + "\n  ".join(describe(real)) + "\nFix them, or set DATASETS.CHECK "
            "skip to leave these images out. tools/check_data.py lists them without training."
        )
    if real:
        faulty = {id(fault.record) for fault in real}
        kept = [record for record in source.records if id(record) not in faulty]
        left_out = len(source.records) - len(kept)
        logger.warning(f"{name}: {left_out} of {len(source.records)} images are left out: {'; '.join(describe(real))}.")
        source.records = kept
        if not kept:
            raise DistillError(f"The dataset {name} has no image without a fault: {'; '.join(describe(real))}.")


def describe(faults: list[Fault]) -> list[str]:
    """
    Args:
        faults: any.

    Returns:
        A line for each kind: how many, and the first three files.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault.file)
    lines = []
    for kind, files in by_kind.items():
        unique = list(dict.fromkeys(files))
        more = f", and {len(unique) - 3} more" if len(unique) > 3 else ""
        lines.append(f"{len(files)} {KINDS[kind].text}: {', '.join(unique[:3])}{more}")
    return lines


def _check_image(record: dict, header: Header, faults: list[Fault], notes: dict, load_truncated: bool) -> bool:
    """Whether the annotations were turned."""
    file = record["file_name"]
    if header.fault and not (header.fault == "image cut off" and load_truncated):
        faults.append(Fault(header.fault, record, file))
        if not header.width:
            return False
    given, stored, seen = (record["width"], record["height"]), (header.width, header.height), header.seen_size
    record["width"], record["height"] = seen
    is_turned = all(given) and given != seen
    if is_turned:
        if given != stored:
            faults.append(Fault("size differs", record, file))
            return False
        for annotation in list(record["annotations"]):
            try:
                _turn(annotation, header)
            except (ValueError, TypeError):  # of its mask
                faults.append(Fault("mask unreadable", record, file))
                record["annotations"].remove(annotation)
        notes["are rotated by their EXIF tag"].append(file)
    if header.needs:
        notes[_NOTES[header.needs]].append(file)
    if header.needs or header.fault:
        record["file_name"] = SEEN + file
    return is_turned


def _mask_fault(mask: dict, height: int, width: int) -> str:
    if list(mask["size"]) != [height, width]:
        return "mask size differs"
    try:
        counts = mask["counts"].encode() if isinstance(mask["counts"], str) else mask["counts"]
        is_whole = sum(_run_lengths(counts)) == height * width  # or pycocotools leaves the rest as the memory was
        return "" if is_whole and mask_util.decode(mask) is not None else "mask unreadable"
    except (ValueError, TypeError, IndexError):
        return "mask unreadable"


def _run_lengths(counts: bytes) -> list[int]:
    """Of COCO's compressed encoding: five bits a character, with the sign in the last; from the fourth run on, the
    difference to the run before the last."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, bits = 0, 0, 0x20
        while bits & 0x20:
            bits = counts[position] - 48
            value |= (bits & 0x1F) << shift
            shift, position = shift + 5, position + 1
        value -= (bits & 0x10) << (shift - 4)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    if any(run < 0 for run in runs):
        raise ValueError(counts)
    return runs


def _turn(annotation: dict, header: Header) -> None:
    """Turns a box and its mask with their image, by EXIF orientation 5 to 8."""
    w, h, orientation = header.width, header.height, header.orientation

    def turn(points: np.ndarray) -> np.ndarray:
        x, y = points[:, 0], points[:, 1]
        return np.stack([h - y if orientation in (6, 7) else y, w - x if orientation in (7, 8) else x], 1)

    corners = turn(np.reshape(annotation["bbox"], (2, 2)))
    annotation["bbox"] = [*corners.min(0).tolist(), *corners.max(0).tolist()]
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        pixels = mask_util.decode(mask)
        turned = {5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels)}[orientation]
        annotation["segmentation"] = mask_util.encode(np.asfortranarray(turned))
    elif mask:
        annotation["segmentation"] = [turn(np.reshape(polygon, (-1, 2))).reshape(-1).tolist() for polygon in mask]


def _to_pixels(record: dict) -> None:
    w, h = record["width"], record["height"]
    for annotation in record["annotations"]:
        if annotation.pop("relative", False):
            annotation["bbox"] = [value * (h if i % 2 else w) for i, value in enumerate(annotation["bbox"])]
            for polygon in annotation.get("segmentation", ()):
                polygon[:] = [value * (h if i % 2 else w) for i, value in enumerate(polygon)]


def _check_boxes(record: dict, faults: list[Fault]) -> None:
    w, h, kept = record["width"], record["height"], []
    for annotation in record["annotations"]:
        x0, y0, x1, y1 = annotation["bbox"]
        kind = ""
        if not all(math.isfinite(value) for value in annotation["bbox"]):
            kind = "box not finite"
        elif x1 < x0 or y1 < y0:
            kind = "box swapped"
        elif x1 == x0 or y1 == y0:
            kind = "box empty"
        elif w and (x1 <= 0 or y1 <= 0 or x0 >= w or y0 >= h):
            kind = "box outside"
        elif w and isinstance(mask := annotation.get("segmentation"), dict):
            kind = _mask_fault(mask, h, w)
        if kind:
            faults.append(Fault(kind, record, record["file_name"].removeprefix(SEEN)))
        else:
            kept.append(annotation)
    record["annotations"] = kept

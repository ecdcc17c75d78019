"""What every reader of annotations returns, and how images and splits are found."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from ...errors import DistillError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case


class Fault(NamedTuple):
    """Something wrong with one image or one of its annotations.

    Attributes:
        kind: a key of :data:`distill.data.check.KINDS`.
        record: of the image; None where there is none.
        file: the file to look at.
    """

    kind: str
    record: dict | None
    file: str


@dataclass
class Source:
    """A dataset as it was read.

    Attributes:
        classes: names, in the order of ``category_id``.
        records: in Detectron2's dataset format; boxes are XYXY_ABS. ``height`` and ``width`` are those of the
            annotation, or 0 where it gives none.
        evaluator_type: "coco" or "pascal_voc".
        faults: what the reader found.
        metadata: more for Detectron2's ``MetadataCatalog``.
        json_file: a COCO JSON that Detectron2's evaluator reads as it is, if no image is left out.
    """

    classes: list[str]
    records: list[dict]
    evaluator_type: str
    faults: list[Fault] = field(default_factory=list)
    metadata: dict = field(default_factory=dict)
    json_file: str = ""


def require(is_good: bool, name: str, message: str) -> None:
    """Ends the reading of a dataset.

    Args:
        is_good: whether there is nothing to say.
        name: of the dataset.
        message: what was found, what was expected, and what to do.

    Raises:
        DistillError: ``is_good`` is False.
    """
    if not is_good:
        raise DistillError(f"DATASETS.REGISTER, {name}: {message}")


def find_images(folders: Sequence[Path]) -> dict[str, Path]:
    """The images in folders, not in those below.

    Args:
        folders: the first that has an image of a name wins.

    Returns:
        Files by their name without its ending.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in IMAGE_TYPES:
                found.setdefault(path.stem, path)
    return found


def walk(folder: Path, types: Sequence[str] = IMAGE_TYPES) -> list[Path]:
    """The files of some types in a folder and all below it, also where links lead.

    Args:
        folder: may not exist.
        types: endings, in lower case.

    Returns:
        Files, sorted.
    """
    found: list[Path] = []
    seen: set[str] = set()
    links: list[str] = []

    def visit(top: str) -> None:
        for place, folders, files in os.walk(top):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            links.extend(link for name in folders if os.path.islink(link := os.path.join(place, name)))
            found.extend(path for file in files if (path := Path(place, file)).suffix.lower() in types)

    root = os.path.realpath(folder)
    visit(str(folder))  # before what links lead to, so that a file keeps its real place
    while links:
        links.sort()
        link = links.pop(0)
        if not f"{root}/".startswith(f"{os.path.realpath(link)}/"):  # a link upwards holds other data, too
            visit(link)
    return sorted(found)


def read_names(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without spaces around them.

    Raises:
        DistillError: it is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DistillError(f"'{path}' is not UTF-8 text ({error.reason}): save it as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]


def read_classes(path: Path) -> list[str]:
    """The names of classes in a text file, one a line.

    Raises:
        DistillError: it is not UTF-8, or a line between others is empty: it would shift the numbers of those behind it.
    """
    names = read_names(path)
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    used = [index for index, line in enumerate(lines) if line]
    empty = next((index + 1 for index in range(used[0], used[-1]) if not lines[index]), None) if used else None
    if empty:
        raise DistillError(
            f"'{path}' has no class in its line {empty}: expected a name on each line, whose numbers count from 0."
        )
    return names


def given_classes(text: str | Sequence[str]) -> list[str]:
    """Class names from an entry of DATASETS.REGISTER.

    Args:
        text: the names between commas, or the path of a file with one a line (for names with a comma or a colon); or
            the names themselves.

    Returns:
        The names; none for an empty text.
    """
    if not isinstance(text, str):
        return list(text)
    if os.path.isfile(text):
        return read_names(Path(text))
    return [part.strip() for part in text.split(",")] if text else []


def check_classes(name: str, classes: Sequence[str]) -> None:
    """
    Raises:
        DistillError: there is no class, or one twice.
    """
    require(bool(classes), name, "it declares no class, and no annotated object has one: expected one class at least.")
    twice = sorted({c for c in classes if list(classes).count(c) > 1})
    require(not twice, name, f"the classes {', '.join(twice)} are there more than once: expected names that differ.")


def select(name: str, split: str, stems: Sequence[str], folder: Path, own: Sequence[str] = ()) -> list[str]:
    """The images of a split that no folder of the dataset describes.

    Args:
        name: of the dataset.
        split: "all"; a file with a name on each line; or a share such as "0.8", drawn by the hash of each name and so
            the same everywhere, whose rest is "-0.2".
        stems: names of all images, without their ending.
        folder: what the file's path may be relative to.
        own: the splits that the dataset describes, for the error.

    Returns:
        Names, in the order of the file, or sorted.

    Raises:
        DistillError: it is none of these, or without an image.
    """
    if split == "all":
        return sorted(stems)
    for path in (folder / split, folder / f"{split}.txt", Path(split)):
        if path.is_file():
            names = read_names(path)
            require(bool(names), name, f"the split '{path}' is empty: expected the name of an image on each line.")
            known = set(stems)
            return list(dict.fromkeys(_without_column(line, known) for line in names))
    share = _share(split)
    if share is not None:
        require(0 < abs(share) <= 1, name, f"the share {split} is not between -1 and 1.")
        drawn = sorted(set(stems), key=lambda stem: hashlib.sha1(stem.encode()).digest())  # a.jpg and a.png together
        # the rest of 0.8 is -0.2, for any number of images
        first = round(len(drawn) * (share if share > 0 else 1 + share))
        chosen = sorted(drawn[:first] if share > 0 else drawn[first:])
        require(bool(chosen), name, f"the share {split} of {len(drawn)} images is none: expected a larger one.")
        return chosen
    lists = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))) or "none"
    expected = ", ".join([*own, "all", "a share such as 0.8 or -0.2 (its rest)"])
    require(
        False,
        name,
        f"there is no split {split!r}: expected {expected}, or a file with a name on each line. Lists in '{folder}': "
        f"{lists}.",
    )
    return []


def _share(split: str) -> Fraction | None:
    """The number that a split is, exactly, or a share and its rest could overlap; None where it is a name."""
    try:
        return Fraction(split)
    except (ValueError, ZeroDivisionError):
        return None


def _without_column(line: str, stems: set[str]) -> str:
    """The image of a line of a split. PASCAL VOC's lists of one class have a second column, -1, 0 or 1; a name may have
    spaces, too. A path is cut to its name."""
    first, _, last = line.rpartition(" ")
    candidates = [line, first.strip()] if last in ("-1", "0", "1") and first else [line]
    for candidate in [x for line in candidates for x in dict.fromkeys([line, line.replace("\\", "/")])]:
        path = Path(candidate)
        names = [candidate, path.name]
        if path.suffix[1:].isalpha():
            below = path.with_suffix("").as_posix()
            names = [candidate, below, below.removeprefix("data/"), path.name, path.stem]  # CVAT's begin with data/
        for stem in names:
            if stem in stems:
                return stem
    return candidates[-1]


def enclosing(box: Sequence[float], degrees: float) -> list[float]:
    """The upright box around a rotated one. CVAT writes the box before its rotation, and the angle as an attribute.

    Args:
        box: XYXY, before it is rotated around its centre.
        degrees: the angle.

    Returns:
        XYXY.
    """
    if degrees % 360 == 0:
        return list(box)
    x0, y0, x1, y1 = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = (x1 - x0) * cos + (y1 - y0) * sin, (x1 - x0) * sin + (y1 - y0) * cos
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def absolute(path: Path) -> str:
    """A path that does not depend on the current folder; links stay."""
    return os.path.abspath(path)
